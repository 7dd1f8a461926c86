"""Which way imports run: no other package imports display, display imports core alone, figures import readers."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
SOURCE = PACKAGES / "nnterp-display" / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imported(path: Path, for_types: bool = False):
    """Modules a file imports when it runs, also inside functions; `for_types` adds those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ["nnterp-core", "nnterp-interventions", "nnterp-prompts"])
def test_no_other_package_imports_display(package):
    files = list((PACKAGES / package / "src").rglob("*.py"))
    assert files
    for path in files:
        names = set(imported(path))
        assert not [name for name in names if name == "nnterp.display" or name.startswith("nnterp.display.")], path
        assert not [name for name in names if name.split(".")[0] == "plotly"], path


def test_display_imports_no_sibling():
    for path in MODULES.values():
        found = [name for name in imported(path) if name.startswith(("nnterp.interventions", "nnterp.prompt"))]
        assert not found, path


def test_display_imports_nothing_private_of_another_package():
    for path in MODULES.values():
        foreign = {name for name in imported(path, for_types=True) if name.split(".")[:2] != ["nnterp", "display"]}
        assert not [name for name in foreign if any(piece.startswith("_") for piece in name.split(".")[1:])], path


def test_imports_inside_display_have_no_circle():
    assert len(MODULES) > 20
    graph = {name: {m for m in imported(path, for_types=True) if m in MODULES} for name, path in MODULES.items()}
    assert graph["nnterp.display._lens"] >= {"nnterp.display._results.lens", "nnterp.display._lens_cells"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_readers_of_results_do_not_draw():
    """They are below the figures: neither they nor what they import needs plotly."""
    readers = [name for name in MODULES if name.startswith("nnterp.display._results.")]
    assert len(readers) > 7
    below, waiting = set(), list(readers)
    while waiting:
        name = waiting.pop()
        below.add(name)
        waiting += [m for m in imported(MODULES[name], for_types=True) if m in MODULES and m not in below]
    assert "nnterp.display" not in below
    for name in below:
        assert not [m for m in imported(MODULES[name], for_types=True) if m.split(".")[0] == "plotly"], name


@pytest.mark.parametrize("module", ["nnterp", "nnterp.interventions", "nnterp.prompts", "nnterp.cli"])
def test_importing_another_package_loads_nothing_of_display(processes, module):
    code = (
        f"import sys, {module}; getattr({module}, '__all__', None); "
        "print([m for m in sys.modules if m.split('.')[0] == 'plotly' or m.startswith('nnterp.display')])"
    )
    out, said, failed = processes.run(code)
    assert not failed, said
    assert out.strip() == "[]"
