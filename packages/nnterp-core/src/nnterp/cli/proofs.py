"""`nnterp proofs`: say which proofs are kept on disk, or delete them."""

from __future__ import annotations

import argparse
import sys

help = "say where proofs are kept on disk, and how many; --clear deletes them"
examples = ("proofs", "proofs --clear")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnterp proofs`."""
    parser.add_argument("--clear", action="store_true", help="delete all of them; models are then proven anew")


def run(arguments: argparse.Namespace) -> int:
    """Print how many there are and where; 1 if they cannot be read or deleted."""
    from nnterp.proofs import clear, kept

    try:
        print(f"Deleted: {clear()}" if arguments.clear else kept())
    except OSError as error:
        print(f"nnterp proofs: {error}", file=sys.stderr)
        return 1
    return 0
