"""What importing nnterp brings: nothing heavy until a name is used, and then every name that was promised."""

from __future__ import annotations

import ast
import pickle
import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nnterp
from nnterp import _siblings, interventions, plugins
from nnterp.cli import main

HEAVY = {"torch", "transformers", "nnsight", "numpy", "rich"}
LAZY = [nnterp, interventions]


def run(program: str) -> list[str]:
    """The words that a program prints, in a process that has imported nothing."""
    return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True).stdout.split()


@pytest.fixture
def with_torch(processes):
    """The words that a program prints, in a process that has imported torch and nothing of nnterp."""

    def run(program: str) -> list[str]:
        printed, said, failed = processes.run(program)
        assert not failed, said
        return printed.split()

    return run


COMMANDS = [["--help"], ["--version"], *([name, "--help"] for name in plugins.names(plugins.COMMANDS))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_commands_help_imports_no_torch(words):
    printed = run(
        "import sys\n"
        "from nnterp.cli import main\n"
        f"try: main({words})\n"
        "except SystemExit: print('modules', *sys.modules)"
    )
    modules = set(printed[printed.index("modules") + 1 :])
    assert HEAVY & modules == set()
    assert "nnterp.cli" in modules


def test_help_lists_the_commands_of_all_packages_and_a_command_imports_no_other():
    help = run("import sys; from nnterp.cli import main; main(['--help'])")
    assert {"check", "demo", "lens", "proofs"} <= set(help)
    asked = "import sys\nfrom nnterp.cli import main\ntry: main(['check', '--help'])\nfinally: print(*sys.modules)"
    printed = run(asked)
    assert "nnterp.cli.check" in printed
    assert "nnterp.interventions" not in printed


def test_importing_is_light_until_a_name_is_used(with_torch):
    assert HEAVY & set(run("import sys, nnterp, nnterp.interventions; print(*sys.modules)")) == set()
    before = with_torch("import sys, nnterp; print(*sys.modules)")
    assert "nnterp.standardized_transformer" not in before
    used = with_torch("import sys, nnterp; nnterp.toy_checkpoint(); print(*sys.modules)")
    assert "nnterp.standardized_transformer" in used


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_every_way_of_asking_for_a_name(package, with_torch):
    name = package.__name__
    star = with_torch(f"from {name} import *\nprint(*sorted(n for n in globals() if not n.startswith('_')))")
    assert set(package.__all__) <= set(star)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is getattr(sys.modules[f"{name}._names"], public)
    assert package.__all__[0] in pydoc.plain(pydoc.render_doc(package))


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_type_checkers_see_the_names(package):
    """The `__init__` imports the module of names for them, and hides `__getattr__`, which allows any name."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    imported = {alias.name for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == {"*", "__all__"}
    assert "__getattr__" in ast.unparse(branch.orelse)
    assert "__getattr__" not in ast.unparse([node for node in tree.body if node is not branch])


def test_submodules_and_names_that_are_not_there():
    printed = run("import nnterp\nprint(nnterp.errors.Unproven.__name__)\nprint(hasattr(nnterp, '_private'))\n")
    assert printed == ["Unproven", "False"]
    with pytest.raises(AttributeError, match="module 'nnterp' has no attribute 'Standardized'"):
        nnterp.Standardized
    with pytest.raises(ImportError, match="cannot import name 'Standardized'"):
        from nnterp import Standardized  # noqa: F401


def test_a_sibling_that_is_not_installed_says_what_to_install():
    program = (
        "import sys, nnterp\n"
        "nnterp.__path__ = [p for p in nnterp.__path__ if 'display' not in p]\n"
        "print(hasattr(nnterp, 'display'))\n"
        "try: import nnterp.display\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    assert " ".join(run(program)) == (
        "False nnterp.display is in a package of its own, which is not installed: pip install nnterp-display"
    )


def test_a_command_that_is_not_installed_says_what_to_install(monkeypatch, capsys):
    pages = (Path(__file__).parents[2] / "packages").glob("*/pyproject.toml")
    projects = [tomllib.loads(page.read_text(encoding="utf-8"))["project"] for page in pages]
    brought = {
        name: project["name"]
        for project in projects
        for name in project.get("entry-points", {}).get(plugins.COMMANDS, {})
    }
    siblings = {name: package for name, package in brought.items() if package != "nnterp-core"}
    assert siblings == _siblings.COMMANDS
    monkeypatch.setattr(plugins, "names", lambda group: tuple(sorted(set(brought) - set(siblings))))
    for name, package in siblings.items():
        assert main([name, "toy", "a prompt"]) == 2
        said = f"nnterp {name} comes with {package}, which is not installed: pip install {package}\n"
        assert capsys.readouterr().err == said
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "not installed: demo (pip install nnterp-interventions)" in capsys.readouterr().out


def test_pickles_name_the_module_that_defines_a_class(with_torch):
    config = nnterp.RenameConfig(attn_name="braid")
    assert pickle.loads(pickle.dumps(config)) == config
    read = with_torch(f"import pickle; print(pickle.loads({pickle.dumps(config)!r}).attn_name)")
    assert read == ["braid"]
