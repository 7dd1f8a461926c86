"""`nnterp explain`: print what an error means and what to do, from the page that comes with nnterp."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

help = "say what an error of nnterp means and what to write instead, offline"
examples = ("explain ShapeError", "explain")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnterp explain`."""
    parser.add_argument("error", nargs="?", help="the name of an error or a warning; without, all names are listed")


def run(arguments: argparse.Namespace) -> int:
    """Print the section of the error; 2 if there is none of this name."""
    sections = _sections()
    if arguments.error is None:
        print("\n".join(sections))
        return 0
    name = arguments.error.rpartition(".")[2]
    found = {known.lower(): known for known in sections}.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name, sections, n=3) or [*sections]
        print(f"nnterp explain: there is no error {name!r}; there are {', '.join(near)}.", file=sys.stderr)
        return 2
    print(sections[found])
    return 0


def _sections() -> dict[str, str]:
    """The sections of docs/errors.md as text for a terminal: code is indented, links are shown as pages."""
    page = Path(__file__).with_name("errors.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    return {part.partition("\n")[0]: _plain(part.strip()) for part in parts}


def _plain(section: str) -> str:
    lines, code = [], False
    for line in section.splitlines():
        if line.startswith("```"):
            code = not code
        else:
            lines.append(f"    {line}".rstrip() if code else line)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r"\1 (docs/\2)", "\n".join(lines))
