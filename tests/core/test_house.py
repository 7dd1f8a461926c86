"""The house's own rules: what an import costs and pulls in, which way imports run, what is public and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions, requires
from pathlib import Path

import pytest

import nnterp

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "nnterp-core": (),
    "nnterp-interventions": ("nnterp.interventions",),
    "nnterp-prompts": ("nnterp.prompts", "nnterp.prompt_utils"),
    "nnterp-display": ("nnterp.display",),
}
SIBLINGS = {module: name for name, modules in PACKAGES.items() for module in modules}
FILES = [(name, path) for name in PACKAGES for path in sorted((ROOT / "packages" / name / "src").rglob("*.py"))]


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """A program run in an interpreter of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def imports(path: Path, at_import_only: bool = False) -> set[str]:
    """Modules a file imports when it runs: not those for type checkers; optionally not those inside functions."""
    found: set[str] = set()
    package = path.relative_to(path.parents[[p.name for p in path.parents].index("src")]).parent.parts

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def short(value: object) -> str:
    return str(value.relative_to(ROOT / "packages")) if isinstance(value, Path) else str(value)


def test_importing_nnterp_is_light():
    """No plotly, no pandas, no modelling code; most of the time is torch's, transformers' and nnsight's own."""
    done = fresh(
        "import json, sys, time; start = time.perf_counter(); import torch, transformers, nnsight\n"
        "middle = time.perf_counter(); import nnterp; end = time.perf_counter()\n"
        "print(json.dumps([sorted(sys.modules), middle - start, end - middle]))"
    )
    modules, theirs, ours = json.loads(done.stdout)
    print(f"import nnterp: {theirs:.2f} s for torch, transformers and nnsight, {ours:.2f} s for nnterp")
    assert "nnterp.standardized_transformer" in modules
    heavy = re.compile(r"(plotly|pandas)(\.|$)|transformers\.models\..*\bmodeling_")
    assert [module for module in modules if heavy.match(module)] == []
    assert not done.stderr


@pytest.mark.parametrize("sibling", [module for module in SIBLINGS if module != "nnterp.display"])
def test_a_sibling_brings_no_other_sibling_and_nothing_to_draw_with(sibling):
    modules = json.loads(fresh(f"import sys, json, {sibling}; print(json.dumps(sorted(sys.modules)))").stdout)
    others = {module for module, name in SIBLINGS.items() if name != SIBLINGS[sibling]}
    assert others & set(modules) == set()
    assert {"plotly", "pandas"} & set(modules) == set()


def test_display_brings_no_other_sibling():
    modules = json.loads(fresh("import sys, json, nnterp.display; print(json.dumps(sorted(sys.modules)))").stdout)
    assert {module for module in SIBLINGS if module != "nnterp.display"} & set(modules) == set()


@pytest.mark.parametrize(("package", "path"), FILES, ids=short)
def test_imports_run_one_way(package, path):
    foreign = {module: name for module, name in SIBLINGS.items() if name != package}
    crossed = [m for m in imports(path) for other in foreign if m == other or m.startswith(other + ".")]
    assert crossed == [], f"{package} may import nnterp-core and itself, not {crossed}"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    """What a package's files import at the top, it requires itself, or nnterp-core or transformers does."""

    def declared(name: str) -> set[str]:
        project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]
        return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in project["dependencies"]}

    with_transformers = {re.split(r"[^\w.-]", r)[0].lower() for r in requires("transformers") or () if ";" not in r}
    needed = declared(package) | declared("nnterp-core") | with_transformers
    known = packages_distributions()
    undeclared = {
        f"{path.name}: {module}"
        for name, path in FILES
        if name == package
        for module in {m.partition(".")[0] for m in imports(path, at_import_only=True)}
        if module not in sys.stdlib_module_names and module != "nnterp"
        if not {distribution.lower() for distribution in known.get(module, [module])} & needed
    }
    assert undeclared == set()


def public_packages() -> list[str]:
    """nnterp and every package in it that is not private."""
    found = ["nnterp"]
    for info in pkgutil.walk_packages(nnterp.__path__, "nnterp."):
        if info.ispkg and not any(piece.startswith("_") for piece in info.name.split(".")):
            found.append(info.name)
    return found


def test_the_packages_are_those_of_the_four_distributions():
    assert {"nnterp", "nnterp.anatomy", "nnterp.values", "nnterp.certificate", "nnterp.testing", *SIBLINGS} <= set(
        public_packages()
    )


@pytest.mark.parametrize("name", public_packages())
def test_public_names_are_listed_and_documented(name):
    package = importlib.import_module(name)
    assert package.__doc__, f"{name} does not say what it is for"
    if name == "nnterp.cli":  # a command line, not a library: `main` and the subcommands
        return
    assert package.__all__, f"{name} does not list its public names"
    assert len(set(package.__all__)) == len(package.__all__)
    for public in package.__all__:
        thing = getattr(package, public)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert thing.__doc__, f"{name}.{public} has no docstring"
            assert not thing.__doc__.startswith(f"{public}("), f"{name}.{public} has only what dataclass writes"


@pytest.mark.parametrize(("package", "path"), FILES, ids=short)
def test_every_module_says_what_it_holds(package, path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_py_typed_and_licence_are_in_every_package():
    for package, modules in PACKAGES.items():
        folder = ROOT / "packages" / package
        assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        for module in modules or ("nnterp",):
            assert (folder / "src" / module.replace(".", "/") / "py.typed").exists()
        owner = folder / "src" / "nnterp" / "__init__.py"
        assert owner.exists() == (package == "nnterp-core"), "nnterp/__init__.py belongs to nnterp-core alone"


def test_changelogs_begin_with_the_version_of_their_package():
    for package in PACKAGES:
        folder = ROOT / "packages" / package
        version = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
        released = re.findall(r"^## (\S+)", (folder / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
        assert released, f"{package}'s changelog names no version"
        assert released[0] == version, f"{package} is at {version}, its changelog at {released[0]}"


@pytest.mark.parametrize("group", ["nnterp.commands", "nnterp.figures"])
def test_what_packages_offer_each_other_can_be_loaded(group):
    points = entry_points(group=group)
    assert points or group != "nnterp.commands"
    for point in points:
        offered = point.load()
        if group == "nnterp.commands":
            assert offered.help
            assert callable(offered.configure)
            assert callable(offered.run)


def test_the_log_is_silent_until_it_is_enabled():
    done = fresh(
        "from loguru import logger\n"
        "import nnterp\n"
        "inside = {'__name__': 'nnterp.somewhere', 'logger': logger}\n"
        "exec('logger.warning(\"first\")', inside)\n"
        "logger.enable('nnterp')\n"
        "exec('logger.warning(\"second\")', inside)\n"
    )
    assert "first" not in done.stderr
    assert "second" in done.stderr
