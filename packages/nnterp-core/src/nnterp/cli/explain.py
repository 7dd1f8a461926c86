"""`nnterp explain`: print what an error means and what to do, from the page that comes with nnterp."""

from __future__ import annotations

import argparse
import ast
import builtins
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from nnterp import errors

help = "say what an error of nnterp means and what to write instead, offline"
_CODE = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
examples = ("explain ShapeError", "explain")

ELSEWHERE = {  # errors with a section that are not defined in core: Python's class that each is a kind of
    "OutOfOrderError": Exception,
    "WithBlockNotFoundError": Exception,
    "TokenizationError": ValueError,
    "CollisionError": ValueError,
    "IncompleteRunError": RuntimeError,
    "ImageWriterMissing": RuntimeError,
    "DictionaryMismatch": UserWarning,
    "MissingScoresWarning": UserWarning,
    "SharedTokenWarning": UserWarning,
}


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
        print(f"nnterp explain: {_unknown(name, sections)}", file=sys.stderr)
        return 2
    print(sections[found])
    return 0


def _unknown(name: str, sections: Iterable[str]) -> str:
    """What to say of a name that has no section: a class of Python's own, or a misspelt one."""
    base = getattr(builtins, name, None)
    if isinstance(base, type) and issubclass(base, BaseException):
        owned = [own for own in sections if not hasattr(builtins, own)]
        kinds = [own for own in owned if issubclass(ELSEWHERE.get(own) or getattr(errors, own), base)]
        ours = f"Of nnterp's, these are {name}s: {', '.join(kinds)}." if kinds else f"None of nnterp's is a {name}."
        return (
            f"{name} is Python's own, and has no section here: its message says what was wrong. {ours} "
            "`nnterp explain` lists all names."
        )
    near = difflib.get_close_matches(name, sections, n=3)
    if near:
        return f"there is no error {name!r}; names near it: {', '.join(near)}. `nnterp explain` lists all."
    return f"there is no error {name!r}; there are {', '.join(sections)}."


def _sections() -> dict[str, str]:
    """The sections of docs/errors.md as text for a terminal: code is indented, links are shown as pages."""
    page = Path(__file__).with_name("errors.md").read_text(encoding="utf-8")
    top, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    return {part.partition("\n")[0]: _plain(f"{part.strip()}\n\n{_beginning(top, part)}") for part in parts}


def _beginning(top: str, part: str) -> str:
    """What the code of a section needs of the page's first block, in words and as a block."""
    block, *_ = _CODE.findall(top)
    wanted = set(re.findall(r"\w+", "\n".join(_CODE.findall(part))))
    kept: list[str] = []
    for statement in reversed(ast.parse(block).body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            statement.names = [name for name in statement.names if name.name in wanted]
            text = ast.unparse(statement) if statement.names else ""
        else:
            made = statement.targets[0] if isinstance(statement, ast.Assign) else statement
            named = made.id if isinstance(made, ast.Name) else getattr(made, "name", "")
            text = ast.get_source_segment(block, statement) or "" if named in wanted else ""
            wanted |= set(re.findall(r"\w+", text))
        kept = [f"\n{text}" if text.startswith("def ") else text, *kept] if text else kept
    code = "\n".join(kept)
    return f"To run this code, put these lines above it:\n\n```python\n{code}\n```" if code else ""


def _plain(section: str) -> str:
    lines, code = [], False
    for line in section.splitlines():
        if line.startswith("```"):
            code = not code
        else:
            lines.append(f"    {line}".rstrip() if code else line)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r"\1 (docs/\2)", "\n".join(lines))
