"""What a public function returns and raises stands in its docstring, under `Returns:` and `Raises:`.

The names are those of `tests/api.txt`, read from the source, so that nothing is imported and no model is built. The
first sentence may say what is returned ("...; returns the index"), as it does for a property and for a method that
makes another object of its own class (`load`, `select`). Files that travel to a remote worker travel with their
docstrings, where sections cost bytes: there a sentence names the errors. Methods between double underscores and
errors that say that a subclass has to do the work are left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import api_snapshot as api

NOTHING = {"None", "NoReturn", "Never", "Iterator[None]"}  # the last is a `with` block without `as`
TRAVELLING = ("nnterp.traced.", "nnterp.selectors.", "nnterp.errors.", "nnterp.record.", "nnterp.tensors.")
TRAVELLING += ("nnterp.values._read_order.",)


def functions(name: str, found: api.Found) -> Iterator[tuple[str, api.Function]]:
    """A public function, or the public methods and properties of a class, each with its full name."""
    if isinstance(found.node, api.Function):
        yield name, found.node
    elif isinstance(found.node, ast.ClassDef):  # a base that two bases share comes after both, as in Python
        bases = {owner.home: owner for owner in reversed([*api.ancestors(found)])}
        every = [
            (f"{owner.home}.{node.name}", node)
            for owner in reversed(bases.values())
            if isinstance(owner.node, ast.ClassDef)
            for node in owner.node.body
            if isinstance(node, api.Function) and not node.name.startswith("_")
        ]
        seen: set[str] = set()
        for i, (full, node) in enumerate(every):
            inherited = any(base.name == node.name for _, base in every[i + 1 :])
            if node.name not in seen and (ast.get_docstring(node) or not inherited):
                seen.add(node.name)  # what a nearer class defines is what users see
                yield full, node


def said() -> dict[str, api.Function]:
    """Every public function, once; of a property only what reads it, of overloads only what runs."""
    found = {}
    for module in api.MODULES:
        for name in api.public_names(module):
            where = api.find(module, name)
            for full, node in functions(where.home, where):
                if not {"overload", "setter", "deleter"} & api.decorators(node):
                    found[full] = node
    return found


PUBLIC = said()


def is_property(node: api.Function) -> bool:
    return bool({"property", "cached_property"} & api.decorators(node))


def section(node: api.Function, title: str) -> str | None:
    """What a docstring says under a title; None without it."""
    shown = re.search(rf"^{title}:\n((?:[ ]+\S.*\n|\n)+)", f"{ast.get_docstring(node) or ''}\n", flags=re.MULTILINE)
    return shown[1] if shown else None


def raised(node: api.Function) -> set[str]:
    """The errors that a function's own statements raise, functions defined inside it left out."""
    names: set[str] = set()

    def visit(statement: ast.AST) -> None:
        if isinstance(statement, ast.Raise) and isinstance(statement.exc, ast.Call | ast.Name | ast.Attribute):
            error = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
            name = ast.unparse(error).rpartition(".")[2]
            names.update([name] if name[:1].isupper() and name != "NotImplementedError" else [])
        for child in ast.iter_child_nodes(statement):
            if not isinstance(child, api.Function | ast.Lambda | ast.ClassDef):
                visit(child)

    visit(node)
    return names


def makes_its_own(name: str, node: api.Function) -> bool:
    """Whether a method returns an object of its own class."""
    return node.returns is not None and ast.unparse(node.returns) in ("Self", name.split(".")[-2])


def returns_unsaid(name: str, node: api.Function) -> bool:
    """Whether a function returns something that its docstring does not have under `Returns:` or `Yields:`."""
    annotation = ast.unparse(node.returns) if node.returns else "None"
    if annotation in NOTHING or is_property(node) or makes_its_own(name, node) or name.startswith(TRAVELLING):
        return False
    first = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return not (re.search(r"(^Returns?|; returns) ", first) or section(node, "Returns") or section(node, "Yields"))


def raises_unsaid(name: str, node: api.Function) -> list[str]:
    """The errors that a function raises and its docstring does not name under `Raises:`."""
    text = (ast.get_docstring(node) if name.startswith(TRAVELLING) else section(node, "Raises")) or ""
    return sorted(error for error in raised(node) if not re.search(rf"\b{error}\b", text))


def test_every_public_function_says_what_it_returns():
    assert [name for name, node in PUBLIC.items() if not ast.get_docstring(node)] == []
    unsaid = {name: ast.unparse(node.returns) for name, node in PUBLIC.items() if returns_unsaid(name, node)}
    assert unsaid == {}, "say what they return under `Returns:`"


DTYPE = re.compile(r"\b(dtype|float32|float64|int64|int32|bool)\b")
DEVICE = re.compile(r"\b(devices?|CPU)\b")
AS_THE_MODEL_HAS_IT = tuple(f"nnterp.traced._{file}." for file in "readout layouts places sums accessors".split())


def kind_unsaid(name: str, node: api.Function) -> list[str]:
    """What is not said of the tensor that a function returns, "dtype" or "device".

    It is looked for where the docstring says what is returned: in the first paragraph and under `Returns:`; of
    properties and of what travels, anywhere.
    """
    if node.returns is None or ast.unparse(node.returns) != "torch.Tensor" or name.startswith(AS_THE_MODEL_HAS_IT):
        return []
    whole = ast.get_docstring(node) or ""
    anywhere = is_property(node) or name.startswith(TRAVELLING)
    text = whole if anywhere else whole.partition("\n\n")[0] + (section(node, "Returns") or "")
    return [word for word, said in (("dtype", DTYPE), ("device", DEVICE)) if not said.search(text)]


def test_every_public_function_that_returns_a_tensor_says_its_dtype_and_device():
    unsaid = {name: words for name, node in PUBLIC.items() if (words := kind_unsaid(name, node))}
    assert unsaid == {}, "say it where they say what they return"


def test_every_public_function_says_what_it_raises():
    unsaid = {name: errors for name, node in PUBLIC.items() if (errors := raises_unsaid(name, node))}
    assert unsaid == {}, "say under `Raises:` when they raise these"


def test_the_names_are_those_of_the_snapshot():
    """Every line of a function or method in `tests/api.txt` has its function here."""
    shown = re.findall(
        r"^ +(?:@\w+ )*(?:def|property) ([a-z]\w*)", api.SNAPSHOT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(PUBLIC) > 400
    assert set(shown) == {name.rpartition(".")[2] for name in PUBLIC}


SAMPLE = '''
def sample(a: int) -> {returns}:
    """{text}"""
    if a:
        raise errors.ShapeError("a")
    try:
        pass
    except ValueError:
        raise
    def inner() -> None:
        raise KeyError
    return a
'''


@pytest.mark.parametrize(
    ("name", "returns", "text", "unsaid"),
    [
        ("m.sample", "int", "The number.", (True, ["ShapeError"])),
        (
            "m.sample",
            "int",
            "The number.\n\n    Returns:\n        It.\n\n    Raises:\n        Other: It.",
            (False, ["ShapeError"]),
        ),
        (
            "m.sample",
            "int",
            "A.\n\n    Raises:\n        ShapeError: Of it.\n\n    Example:\n        Returns:",
            (True, []),
        ),
        ("m.sample", "int", "Returns ShapeError.", (False, ["ShapeError"])),
        ("m.sample", "int", "Find it; returns\n    the number.", (False, ["ShapeError"])),
        ("m.sample", "int", "What it returns is a number.", (True, ["ShapeError"])),
        ("m.sample", "None", "Nothing.", (False, ["ShapeError"])),
        ("m.Kind.sample", "Kind", "Another.", (False, ["ShapeError"])),
        ("m.Kind.sample", "Kind | None", "Another.", (True, ["ShapeError"])),
        ("nnterp.traced._m.sample", "int", "The number, or ShapeError.", (False, [])),
    ],
)
def test_what_is_not_said_is_seen(name, returns, text, unsaid):
    (node,) = ast.parse(SAMPLE.format(returns=returns, text=text)).body
    assert (returns_unsaid(name, node), raises_unsaid(name, node)) == unsaid


@pytest.mark.parametrize(
    ("returns", "text", "unsaid"),
    [
        ("torch.Tensor", "The states, float32 on the CPU.", []),
        ("torch.Tensor", "The states.", ["dtype", "device"]),
        ("torch.Tensor", "The states.\n\n    Returns:\n        In the dtype of `a`.", ["device"]),
        ("torch.Tensor", "The states.\n\n    Of a device, in a dtype.", ["dtype", "device"]),
        ("int", "The number.", []),
    ],
)
def test_a_tensor_of_no_kind_is_seen(returns, text, unsaid):
    (node,) = ast.parse(SAMPLE.format(returns=returns, text=text)).body
    assert kind_unsaid("m.sample", node) == unsaid
