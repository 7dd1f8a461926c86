"""The house's own rules: what an import costs and pulls in, which way imports run, what is public and documented."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from functools import cache
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


@pytest.fixture
def fresh(processes):
    """`fresh(code)`: (what it prints, what it writes to stderr) of a program that has not imported nnterp before."""

    def run(code: str) -> tuple[str, str]:
        out, said, failed = processes.run(code)
        assert not failed, said
        return out, said

    return run


@cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, at_import_only: bool = False, for_types: bool = False) -> frozenset[str]:
    """Modules a file imports, absolute; optionally not those inside functions, and those for type checkers too."""
    found: set[str] = set()
    package = path.relative_to(path.parents[[p.name for p in path.parents].index("src")]).parent.parts

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
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

    visit(tree_of(path))
    return frozenset(found)


def short(value: object) -> str:
    return str(value.relative_to(ROOT / "packages")) if isinstance(value, Path) else str(value)


def test_importing_nnterp_is_light(fresh):
    """No plotly, no pandas, no modelling code; nothing is said."""
    out, said = fresh("import json, sys, nnterp; nnterp.Anatomy; print(json.dumps(sorted(sys.modules)))")
    modules = json.loads(out)
    assert "nnterp.standardized_transformer" in modules
    heavy = re.compile(r"(plotly|pandas)(\.|$)|transformers\.models\..*\bmodeling_")
    assert [module for module in modules if heavy.match(module)] == []
    assert not said


def test_importing_nnterp_leaves_the_slow_parts_of_transformers():
    """They take longer than torch to import, and any model that is loaded brings them."""
    program = (
        "import sys, nnterp.interventions, nnterp.prompts; nnterp.interventions.Result; nnterp.Anatomy; "
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, cwd=ROOT, check=True)
    assert {"transformers.modeling_utils", "transformers.generation.utils"} & set(done.stdout.split()) == set()


@pytest.mark.parametrize("sibling", [module for module in SIBLINGS if module != "nnterp.display"])
def test_a_sibling_brings_no_other_sibling_and_nothing_to_draw_with(fresh, sibling):
    program = f"import sys, json, {sibling}; {sibling}.__all__; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(fresh(program)[0])
    others = {module for module, name in SIBLINGS.items() if name != SIBLINGS[sibling]}
    assert others & set(modules) == set()
    assert {"plotly", "pandas"} & set(modules) == set()


def test_display_brings_no_other_sibling(fresh):
    modules = json.loads(fresh("import sys, json, nnterp.display; print(json.dumps(sorted(sys.modules)))")[0])
    assert {module for module in SIBLINGS if module != "nnterp.display"} & set(modules) == set()


def test_imports_run_one_way():
    """A package may import nnterp-core and itself."""
    crossed = {}
    for package, path in FILES:
        foreign = {module: name for module, name in SIBLINGS.items() if name != package}
        if abroad := [m for m in imports(path) for other in foreign if m == other or m.startswith(other + ".")]:
            crossed[short(path)] = abroad
    assert crossed == {}


# -- floors ----------------------------------------------------------------------------------------------------------

# The rooms of nnterp-core, from the ground up. A file may import its own room and rooms on the same floor or below, and
# nothing above; imports for type checkers and inside functions count.
FLOORS = (
    "errors record turn wording rendering plugins toy token_text tensors huggingface devices eager table tiny files "
    "selectors beside images indices arguments defaults generation progress identity resuming versions memory sent "
    "lazy deprecation warn _siblings _ids_alone",
    "anatomy traced loading testing",
    "decoders discovery inputs",
    "facts positions standing fingerprint frozen few_tokens",
    "editing",
    "values",
    "named_transformer",
    "attaching certificate collection dictionaries module_accessor older traced_block renewal",
    "datasets",
    "reading proofs precision image_runs",
    "twin",
    "standardized_transformer",
    "vllm",
    "__init__ _names nnsight_utils rename_utils plain_nnsight utils logging gradients readout skipping steering",
    "cli __main__",
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
WHAT_TRAVELS_IMPORTS = {"errors", "record", "selectors", "table", "tensors", "devices", "traced"}
LONGEST = 400  # lines of a file


def dotted(path: Path) -> str:
    """The module of a file: "nnterp.values._lookup", and "nnterp.values" for its `__init__`."""
    parts = path.relative_to(path.parents[[p.name for p in path.parents].index("src")]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room of a core module: the first name below `nnterp`. A command run with `-m` is a room above all others."""
    pieces = module.split(".")
    return pieces[-1] if pieces[-1] == "__main__" else (pieces[1] if len(pieces) > 1 else "__init__")


MODULES = {dotted(path): (package, path) for package, path in FILES}


@cache
def arrows(path: Path) -> set[str]:
    """The modules of this workspace that a file imports, every import counted."""
    named = imports(path, for_types=True) & MODULES.keys()
    return {m for m in named if not any(other.startswith(f"{m}.") for other in named)} - {dotted(path)}


def test_no_arrow_runs_up():
    core = [module for module, (package, _) in MODULES.items() if package == "nnterp-core"]
    assert {room(module) for module in core} - FLOOR_OF.keys() == set(), "these stand on no floor: add them to FLOORS"
    up = {
        module: above
        for module in core
        if (above := {m for m in arrows(MODULES[module][1]) if FLOOR_OF[room(m)] > FLOOR_OF[room(module)]})
    }
    assert up == {}, "these import what stands above them"


def test_what_travels_imports_the_ground_floor_alone():
    rooms = {room(m) for module, (_, path) in MODULES.items() if room(module) == "traced" for m in arrows(path)}
    assert rooms <= WHAT_TRAVELS_IMPORTS


def test_there_is_no_circle():
    """Neither of files nor of packages' `__init__`, in any of the four distributions."""
    left = {module: arrows(path) for module, (_, path) in MODULES.items()}
    while free := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in free}
    assert left == {}, "these files import each other in a circle, or import one that is in it"


def test_private_modules_stay_in_their_room():
    def house(name: str) -> str:
        """What a private module belongs to: everything before its first private name."""
        pieces = name.split(".")
        private = next((i for i, piece in enumerate(pieces) if piece.startswith("_") and piece != "__main__"), None)
        return name if private is None else ".".join(pieces[:private])

    abroad = {}
    for module, (_, path) in MODULES.items():
        private = {m for m in arrows(path) if house(m) != m and not f"{module}.".startswith(f"{house(m)}.")}
        if private - {"nnterp._siblings"}:
            abroad[module] = private
    assert abroad == {}, "these import private modules of other rooms"


def test_a_file_can_be_held():
    lines = {short(path): len(path.read_text(encoding="utf-8").splitlines()) for _, path in FILES}
    assert {path: length for path, length in lines.items() if length > LONGEST} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    """What a package's files import at the top, it requires itself, or nnterp-core or transformers does."""

    def declared(name: str) -> set[str]:
        project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]
        return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in project["dependencies"]}

    with_transformers = {re.split(r"[^\w.-]", r)[0].lower() for r in requires("transformers") or () if ";" not in r}
    needed = {name.replace("_", "-") for name in declared(package) | declared("nnterp-core") | with_transformers}
    known = packages_distributions()
    undeclared = {
        f"{short(path)}: {module}"
        for name, path in FILES
        if name == package
        for module in {m.partition(".")[0] for m in imports(path, at_import_only=True)}
        if module not in sys.stdlib_module_names and module != "nnterp"
        if not {distribution.lower().replace("_", "-") for distribution in known.get(module, [module])} & needed
    }
    own = {one for one in undeclared if "/nnterp/vllm/" in one and one.endswith(": vllm")}  # it says so on import
    assert undeclared - own == set()


def public_packages() -> list[str]:
    """nnterp and every package in it that is not private."""
    found = ["nnterp"]
    for info in pkgutil.walk_packages(nnterp.__path__, "nnterp."):
        if info.ispkg and not any(piece.startswith("_") for piece in info.name.split(".")):
            found.append(info.name)
    return found


def test_the_packages_are_those_of_the_four_distributions():
    assert {"nnterp", "nnterp.anatomy", "nnterp.traced", "nnterp.values", "nnterp.testing", *SIBLINGS} <= set(
        public_packages()
    )


@pytest.mark.parametrize("name", public_packages())
def test_public_names_are_listed_and_documented(name):
    if name == "nnterp.vllm" and importlib.util.find_spec("vllm") is None:
        with pytest.raises(ImportError, match="vLLM, which is not installed"):
            importlib.import_module(name)
        return
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


def test_every_module_says_what_it_holds():
    assert [short(path) for _, path in FILES if not ast.get_docstring(tree_of(path))] == []


def test_py_typed_and_licence_are_in_every_package():
    for package, modules in PACKAGES.items():
        folder = ROOT / "packages" / package
        assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        for module in modules or ("nnterp",):
            assert (folder / "src" / module.replace(".", "/") / "py.typed").exists()
        owner = folder / "src" / "nnterp" / "__init__.py"
        assert owner.exists() == (package == "nnterp-core"), "nnterp/__init__.py belongs to nnterp-core alone"


def test_what_is_deprecated_says_so_through_one_helper_and_goes_in_time():
    told = 0
    for package, path in FILES:
        tree = tree_of(path)
        uses = [
            n for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute) and "Deprecation" in ast.unparse(n)
        ]
        if path.name == "deprecation.py":
            continue
        assert not uses, f"{short(path)} warns by itself: call `deprecated()`"
        version = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]["version"]
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        for call in (n for n in calls if ast.unparse(n.func) in ("deprecated", "renamed")):
            told += 1
            until = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "removed_in")
            numbers = [tuple(map(int, text.split("."))) for text in (version, until)]
            assert numbers[0] < numbers[1], f"{short(path)}: {ast.unparse(call)}, and {package} is at {version}"
    assert told


def test_warnings_are_shown_at_the_user_s_line_by_one_helper():
    for _, path in FILES:
        calls = [ast.unparse(n.func) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call)]
        assert path.name == "warn.py" or "warnings.warn" not in calls, f"{short(path)}: call `nnterp.warn.warn`"


def test_changelogs_begin_with_the_version_of_their_package():
    for package in PACKAGES:
        folder = ROOT / "packages" / package
        version = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
        headings = re.findall(r"^## (\S+)", (folder / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
        released = headings[headings[:1] == ["Unreleased"] :]
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


def test_the_log_is_silent_until_it_is_enabled(fresh):
    _, said = fresh(
        "from loguru import logger\n"
        "import nnterp\n"
        "inside = {'__name__': 'nnterp.somewhere', 'logger': logger}\n"
        "exec('logger.warning(\"first\")', inside)\n"
        "logger.enable('nnterp')\n"
        "exec('logger.warning(\"second\")', inside)\n"
    )
    assert "first" not in said
    assert "second" in said
