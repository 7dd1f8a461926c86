"""The `nnterp` command. Its subcommands come from whichever packages are installed (entry points `nnterp.commands`)."""

from __future__ import annotations

import argparse
import contextlib
import sys
from importlib.metadata import PackageNotFoundError
from typing import Protocol

from nnterp import plugins
from nnterp._siblings import COMMANDS
from nnterp.versions import version_of

PACKAGES = ("nnterp-core", "nnterp-interventions", "nnterp-prompts", "nnterp-display")


class Command(Protocol):
    """A subcommand: an object with these, registered under its name in the entry point group `nnterp.commands`."""

    help: str
    examples: tuple[str, ...]

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit status."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    words = sys.argv[1:] if argv is None else argv
    names = plugins.names(plugins.COMMANDS)
    absent = [f"{name} (pip install {package})" for name, package in COMMANDS.items() if name not in names]
    if words and words[0] in names:  # the others are not imported
        names = (words[0],)
    elif words and words[0] in COMMANDS:
        package = COMMANDS[words[0]]
        print(f"nnterp {words[0]} comes with {package}, which is not installed: pip install {package}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="nnterp",
        description="One interface to the inside of any causal language model.",
        epilog=f"not installed: {', '.join(absent)}" if absent else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=versions())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, Command] = {}
    for name in names:
        command: Command = plugins.load(plugins.COMMANDS, name)
        commands[name] = command
        shown = "\n".join(f"  nnterp {example}" for example in command.examples)
        command.configure(
            subparsers.add_parser(
                name,
                help=command.help,
                description=command.help,
                epilog=f"examples:\n{shown}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    arguments = parser.parse_args(words)
    return commands[arguments.command].run(arguments)


def versions() -> str:
    """The versions of nnterp's packages that are installed, and of what they are built on."""
    found = []
    for package in (*PACKAGES, "nnsight", "transformers", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version_of(package)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
