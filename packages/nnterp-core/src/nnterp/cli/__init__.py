"""The `nnterp` command. Its subcommands come from whichever packages are installed (entry points `nnterp.commands`)."""

from __future__ import annotations

import argparse
import sys
from typing import Protocol

from nnterp import plugins


class Command(Protocol):
    """A subcommand: an object with these, registered under its name in the entry point group `nnterp.commands`."""

    help: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit status."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(
        prog="nnterp", description="One interface to the inside of any causal language model."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, Command] = {}
    for name in plugins.names(plugins.COMMANDS):
        command: Command = plugins.load(plugins.COMMANDS, name)
        commands[name] = command
        command.configure(subparsers.add_parser(name, help=command.help, description=command.help))
    arguments = parser.parse_args(argv)
    return commands[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
