"""The one-way street: nothing imports display, display imports core alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"


def imported(path: Path):
    """Modules a file imports when it runs: what stands under TYPE_CHECKING is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
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
    for path in (PACKAGES / "nnterp-display" / "src").rglob("*.py"):
        found = [name for name in imported(path) if name.startswith(("nnterp.interventions", "nnterp.prompt"))]
        assert not found, path


@pytest.mark.parametrize("module", ["nnterp", "nnterp.interventions", "nnterp.prompts", "nnterp.cli"])
def test_importing_another_package_loads_nothing_of_display(module):
    code = (
        f"import sys, {module}; "
        "print([m for m in sys.modules if m.split('.')[0] == 'plotly' or m.startswith('nnterp.display')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
