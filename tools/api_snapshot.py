"""Write `tests/api.txt`: every public name of the four packages, with its signature.

    uv run python tools/api_snapshot.py

A test compares the file with the code, so that a changed signature is a conscious act: run this, and read the diff.
The signatures are read from the source, so that they are the same for every Python and every transformers, and need
neither vLLM nor weights.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "api.txt"
WIDTH = 110
# The modules that users import. The other rooms of core may change with any version.
MODULES = """
nnterp nnterp.anatomy nnterp.certificate nnterp.collection nnterp.errors nnterp.frozen nnterp.gradients nnterp.logging
nnterp.nnsight_utils nnterp.plain_nnsight nnterp.positions nnterp.readout nnterp.rename_utils nnterp.skipping
nnterp.steering nnterp.testing nnterp.utils nnterp.values nnterp.vllm nnterp.interventions nnterp.prompts
nnterp.prompts.tasks nnterp.prompt_utils nnterp.display
""".split()
# What Python, a notebook or a copy calls, and no user.
UNSAID = frozenset(
    "__copy__ __deepcopy__ __del__ __dir__ __eq__ __getattr__ __getstate__ __hash__ __init_subclass__ __post_init__ "
    "__reduce__ __repr__ __rich__ __setattr__ __delattr__ __setstate__ __str__ __slots__ __match_args__".split()
)
SHOWN_DECORATORS = ("classmethod", "staticmethod", "contextmanager", "overload")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """Where a name is defined: a module of this workspace and the statement in it, or something of another package."""

    module: str
    name: str
    node: ast.stmt | None = None

    @property
    def home(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@cache
def file_of(module: str) -> Path | None:
    """The source of a module of this workspace; None for a module of another package."""
    for source in sorted((ROOT / "packages").glob("*/src")):
        path = source.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def statements(module: str) -> dict[str, list[tuple[ast.stmt, str]]]:
    """What each name at the top of a module is bound by, with the module that an import brings it from."""
    file = file_of(module)
    assert file is not None, module
    bound: dict[str, list[tuple[ast.stmt, str]]] = {}

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    bound.setdefault(node.name, []).append((node, ""))
                case ast.ImportFrom(module=str(source), names=names):
                    for alias in names:
                        bound.setdefault(alias.asname or alias.name, []).append((node, f"{source}:{alias.name}"))
                case ast.Import(names=names):
                    for alias in names:
                        bound.setdefault(alias.asname or alias.name, []).append((node, f":{alias.name}"))
                case ast.Assign(targets=targets):
                    for target in targets:
                        if isinstance(target, ast.Name):
                            bound.setdefault(target.id, []).append((node, ""))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    bound.setdefault(name, []).append((node, ""))
                case ast.If():
                    visit(node.body)
                    visit(node.orelse)
                case ast.Try():
                    visit(node.body)

    visit(ast.parse(file.read_text(encoding="utf-8")).body)
    return bound


def public_names(module: str) -> list[str]:
    """The names that a module offers: its `__all__`, else what it defines without an underscore."""
    bound = statements(module)
    for node, _ in bound.get("__all__", []):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            return sorted(ast.literal_eval(node.value))
    if any(source == "nnterp.lazy:names_on_demand" for _, source in bound.get("names_on_demand", [])):
        return public_names(f"{module}._names")
    return sorted(n for n, ways in bound.items() if not n.startswith("_") and not any(source for _, source in ways))


@cache
def find(module: str, name: str) -> Found:
    """Where a name of a module is defined, through any number of imports."""
    if "names_on_demand" in statements(module) and file_of(f"{module}._names"):
        module = f"{module}._names"
    ways = statements(module).get(name, [])
    if not ways:
        return Found(module, name)
    node, source = ways[-1]
    if not source:
        return Found(module, name, node)
    origin, _, imported = source.partition(":")
    if file_of(origin) is None or not origin:
        return Found(origin, imported)
    return Found(origin, imported) if file_of(f"{origin}.{imported}") else find(origin, imported)


def ancestors(found: Found) -> Iterator[Found]:
    """A class and its bases, the nearest first; those of other packages have no node."""
    yield found
    if isinstance(found.node, ast.ClassDef):
        for base in found.node.bases:
            name = ast.unparse(base).split("[")[0]
            known = statements(found.module).get(name)
            yield from ancestors(find(found.module, name)) if known else [Found("", name)]


def members(found: Found) -> dict[str, list[ast.stmt]]:
    """The public members of a class by name, inherited ones too."""
    seen: dict[str, list[ast.stmt]] = {}
    for owner in reversed(list(ancestors(found))):
        if not isinstance(owner.node, ast.ClassDef):
            continue
        own: dict[str, list[ast.stmt]] = {}
        for node in owner.node.body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    own.setdefault(name, []).append(node)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    own[name] = [node]
                case ast.Assign(targets=[ast.Name(id=name)]):
                    own[name] = [node]
        seen.update(own)  # the nearest definition, at the place of the first one: so dataclasses order their fields
    return {n: nodes for n, nodes in seen.items() if (not n.startswith("_") or n.endswith("__")) and n not in UNSAID}


def _in_order(named: tuple[str, list[ast.stmt]]) -> tuple[bool, str]:
    """Fields as they are written, because that is the order of a dataclass's arguments; then the rest by name."""
    name, (first, *_) = named
    return (False, "") if isinstance(first, ast.AnnAssign) else (True, name)


def decorators(node: Function) -> set[str]:
    """The last words of a function's decorators."""
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def parameters(arguments: ast.arguments) -> list[str]:
    """Parameters as they are written, one text each."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    texts = [_parameter(a, default) for a, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        texts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        texts.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        texts.append("*")
    texts += [_parameter(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*texts, *([f"**{_parameter(arguments.kwarg, None)}"] if arguments.kwarg else [])]


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}{equals + ast.unparse(default) if default is not None else ''}"


def function(node: Function, indent: str, word: str = "def") -> list[str]:
    """The lines of a function: one, or one for each parameter."""
    marks = "".join(f"@{name} " for name in SHOWN_DECORATORS if name in decorators(node))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    texts = parameters(node.args)
    line = f"{indent}{marks}{word} {node.name}({', '.join(texts)}){returns}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{indent}{marks}{word} {node.name}(", *(f"{indent}    {text}," for text in texts), f"{indent}){returns}"]


def member(name: str, nodes: list[ast.stmt], indent: str) -> list[str]:
    """The lines of a member of a class."""
    first = nodes[0]
    if isinstance(first, ast.AnnAssign):
        default = f" = {ast.unparse(first.value)}" if first.value is not None else ""
        return [f"{indent}{name}: {ast.unparse(first.annotation)}{default}"]
    if isinstance(first, ast.Assign):
        return [f"{indent}{name} = {ast.unparse(first.value)}"]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if {"property", "cached_property"} & decorators(functions[0]):
        returned = f": {ast.unparse(functions[0].returns)}" if functions[0].returns else ""
        return [f"{indent}property {name}{returned}{' (can be set)' if len(functions) > 1 else ''}"]
    said = [node for node in functions if "overload" in decorators(node)] or functions[-1:]
    return [line for node in said for line in function(node, indent)]


def public_homes() -> set[str]:
    """Where everything that is public is defined."""
    return {find(module, name).home for module in MODULES for name in public_names(module)}


def entry(name: str, found: Found, homes: set[str]) -> list[str]:
    """The lines of one public name."""
    match found.node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return function(found.node, "  ")
        case ast.ClassDef():
            above = [a for a in list(ancestors(found))[1:] if a.node is None or a.home in homes]
            bases = ", ".join(dict.fromkeys(a.name for a in above))
            marks = "".join(f"@{ast.unparse(d)} " for d in found.node.decorator_list if "dataclass" in ast.unparse(d))
            lines = [f"  {marks}class {name}{f'({bases})' if bases else ''}"]
            for own, nodes in sorted(members(found).items(), key=_in_order):
                lines += member(own, nodes, "    ")
            return lines
        case ast.AnnAssign():
            return [f"  {name}: {ast.unparse(found.node.annotation)}"]
        case None:
            return [f"  {name}: {found.home}"]
    return [f"  {name}"]


def snapshot() -> str:
    """The text of the file."""
    homes, said = public_homes(), {}
    lines = [f"The public names of nnterp. `uv run python {Path(__file__).relative_to(ROOT)}` writes this file."]
    for module in MODULES:
        lines += ["", module]
        for name in public_names(module):
            found = find(module, name)
            first = said.setdefault(found.home, f"{module}.{name}")
            lines += entry(name, found, homes) if first == f"{module}.{name}" else [f"  {name}: see {first}"]
    lines += ["", "values of the table", *(f"  {name} {shape}" for name, shape in values())]
    return "\n".join(lines) + "\n"


def values() -> list[tuple[str, str]]:
    """The names that stand for values in a trace, with their shapes."""
    from nnterp.table import VALUES

    return sorted((name, re.sub(r"\s+", " ", str(value.shape))) for name, value in VALUES.items())


def main() -> int:
    """Write the file."""
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    print(f"wrote {SNAPSHOT.relative_to(ROOT)}: git diff shows what changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
