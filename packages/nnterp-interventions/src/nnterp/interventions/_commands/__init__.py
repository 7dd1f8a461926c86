"""The subcommands `nnterp lens` and `nnterp demo`."""
