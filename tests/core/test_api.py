"""The public names and their signatures are those of `tests/api.txt`, and that file says the truth."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import api_snapshot as api

ROOT = Path(__file__).parents[2]
IMPORTABLE = [m for m in api.MODULES if m != "nnterp.vllm" or importlib.util.find_spec("vllm")]


def difference(known: list[str], now: list[str]) -> list[str]:
    """A unified diff in which each place says its module and its class."""
    lines = list(difflib.unified_diff(known, now, "tests/api.txt", "the code", lineterm=""))
    for i, line in enumerate(lines):
        if line.startswith("@@"):
            above = known[: int(line.split()[1].split(",")[0].lstrip("-")) + 3]
            owners = [next((text for text in reversed(above) if re.match(p, text)), "") for p in (r"\w", r"  \S")]
            lines[i] = f"@@ {' '.join(' '.join(owners).split())}"
    return lines


def test_the_public_names_are_those_of_the_snapshot():
    known = api.SNAPSHOT.read_text(encoding="utf-8").splitlines()
    if changed := difference(known, api.snapshot().splitlines()):
        said = "Public names or their signatures changed. If that is meant, run `uv run python tools/api_snapshot.py`, "
        pytest.fail("\n".join([said + "and say in the changelog what users will notice:", *changed]), pytrace=False)


def test_a_difference_says_where_it_is():
    known = api.SNAPSHOT.read_text(encoding="utf-8").splitlines()
    start = known.index("  class StandardizedTransformer(TransformersModel, LanguageModel)")
    line = next(i for i in range(start, len(known)) if known[i].startswith("    def validate_images("))
    now = [*known[:line], "    def validate_images(self, prompt: Any, again: bool) -> Certificate", *known[line + 1 :]]
    lines = difference(known, now)
    assert "@@ nnterp class StandardizedTransformer(TransformersModel, LanguageModel)" in lines
    assert "+    def validate_images(self, prompt: Any, again: bool) -> Certificate" in lines


def test_what_the_pages_import_is_in_the_snapshot():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "packages").glob("*/README.md")]
    words = "|".join((r"(?:from|import) (nnterp[\w.]*)", r"automodule:: (nnterp[\w.]*)"))
    named = {a or b for page in pages for a, b in re.findall(words, page.read_text(encoding="utf-8"))}
    assert {"nnterp", "nnterp.positions"} < named
    assert named - set(api.MODULES) == set()


@pytest.mark.parametrize("module", IMPORTABLE)
def test_the_snapshot_has_the_names_that_python_sees(module):
    imported = importlib.import_module(module)
    listed = getattr(imported, "__all__", None)
    if listed is None:
        own = {n: thing for n, thing in vars(imported).items() if not n.startswith("_")}
        listed = [n for n, thing in own.items() if getattr(thing, "__module__", None) == module]
    assert set(api.public_names(module)) == set(listed)


def described(module: str) -> list[tuple[str, ast.arguments]]:
    """The functions of a module, and the methods of its classes, with the parameters that the snapshot gives."""
    found = []
    for name in api.public_names(module):
        definition = api.find(module, name)
        if isinstance(definition.node, ast.FunctionDef):
            found.append((name, definition.node.args))
        elif isinstance(definition.node, ast.ClassDef):
            for own, nodes in api.members(definition).items():
                if isinstance(nodes[-1], ast.FunctionDef) and not {"property", "cached_property", "setter"} & (
                    api.decorators(nodes[-1])
                ):
                    found.append((f"{name}.{own}", nodes[-1].args))
    return found


def kinds(arguments: ast.arguments) -> list[tuple[str, str, bool]]:
    """(name, kind, whether it has a default) of each parameter in the source."""
    positional = [(a.arg, "POSITIONAL_ONLY") for a in arguments.posonlyargs]
    positional += [(a.arg, "POSITIONAL_OR_KEYWORD") for a in arguments.args]
    given = len(positional) - len(arguments.defaults)
    found = [(name, kind, i >= given) for i, (name, kind) in enumerate(positional)]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "VAR_POSITIONAL", False))
    only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(a.arg, "KEYWORD_ONLY", default is not None) for a, default in only]
    return [*found, *([(arguments.kwarg.arg, "VAR_KEYWORD", False)] if arguments.kwarg else [])]


@pytest.mark.parametrize("module", IMPORTABLE)
def test_the_snapshot_has_the_signatures_that_python_sees(module):
    imported = importlib.import_module(module)
    for name, arguments in described(module):
        owner, _, method = name.rpartition(".")
        holder = getattr(imported, owner) if owner else imported
        thing = inspect.getattr_static(holder, method)
        seen = inspect.signature(getattr(thing, "__func__", thing)).parameters.values()
        expected = [(p.name, p.kind.name, p.default is not p.empty) for p in seen]
        assert kinds(arguments) == expected, f"{module}.{name}"


@pytest.mark.parametrize("module", IMPORTABLE)
def test_fields_come_in_the_order_of_the_arguments(module):
    imported = importlib.import_module(module)
    for name in api.public_names(module):
        definition = api.find(module, name)
        if isinstance(definition.node, ast.ClassDef) and "@dataclass" in api.entry(name, definition, set())[0]:
            fields = [
                own
                for own, nodes in api.members(definition).items()
                if isinstance(nodes[0], ast.AnnAssign) and "ClassVar" not in ast.unparse(nodes[0])
            ]
            taken = inspect.signature(getattr(imported, name)).parameters
            public = [argument for argument in taken if not argument.startswith("_")]
            assert [own for own in fields if own in taken] == public, f"{module}.{name}"


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("def f(a: int, b: str='x') -> None: ...", "def f(a: int, b: str='y') -> None: ...", "b: str = 'y'"),
        ("def f(a): ...", "def f(a, *, c): ...", "def f(a, *, c)"),
        ("def f(a, b): ...", "def f(b, a): ...", "def f(b, a)"),
    ],
)
def test_a_changed_signature_changes_the_text(before, after, shown):
    said = ["\n".join(api.function(ast.parse(text).body[0], "")) for text in (before, after)]
    assert said[0] != said[1]
    assert shown in said[1]
