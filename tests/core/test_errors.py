"""Every error has a section in docs/errors.md whose code raises it, and a traceback that names the section."""

from __future__ import annotations

import ast
import builtins
import copy
import pickle
import re
import tomllib
import traceback
import warnings
from pathlib import Path

import pytest
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.tracing.tracer import WithBlockNotFoundError

import nnterp
from nnterp import display, errors, interventions, positions, prompts, testing
from nnterp.cli import explain
from nnterp.errors import NnterpError, ShapeError, Unavailable

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
PREAMBLE, *PARTS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
SECTIONS = {part.partition("\n")[0]: part for part in PARTS}
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^print\(.*\)  # → (.*)$", flags=re.MULTILINE)
PACKAGES = (nnterp, interventions, prompts, display, positions, testing, errors)
OF_NNSIGHT = {"OutOfOrderError", "WithBlockNotFoundError"}
OF_PYTHON = {"NameError", "UnboundLocalError"}  # of a forgotten .save()


def own_errors() -> set[str]:
    """The errors and warnings that the packages offer."""
    offered = {
        name: getattr(package, name) for package in PACKAGES for name in getattr(package, "__all__", vars(package))
    }
    return {name for name, kind in offered.items() if isinstance(kind, type) and issubclass(kind, Exception)}


def test_every_error_has_a_section_and_every_section_an_error():
    assert {"ShapeError", "UnprovenWarning", "CollisionError", "ImageWriterMissing"} <= own_errors()
    assert own_errors() | OF_NNSIGHT | OF_PYTHON == set(SECTIONS)


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """What the page defines at its beginning; sections need nothing of each other."""
    given = {"__name__": "errors_page"}
    run(BLOCK.search(PREAMBLE)[2], given, tmp_path_factory.mktemp("errors"))
    return given


def run(code: str, names: dict, folder: Path) -> None:
    """Run a block as a file of its own, because nnsight reads its source."""
    file = folder / f"block_{len(list(folder.iterdir()))}.py"
    file.write_text(code, encoding="utf-8")
    exec(compile(code, str(file), "exec"), names)


def told(error: BaseException) -> str:
    """The last line of a traceback, with the package that a user imports the class from."""
    kind = type(error)
    home = "" if kind.__module__ == "builtins" else re.sub(r"[.]_.*", "", kind.__module__) + "."
    return f"{home}{kind.__name__}: {error}"


@pytest.mark.parametrize("name", SECTIONS)
def test_the_code_of_a_section_raises_its_error_with_its_message(name, begin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = dict(begin)
    (kind, wrong), (shown, message), *rest = BLOCK.findall(SECTIONS[name])
    assert (kind, shown) == ("python", "text")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(wrong, names, tmp_path)
        except Exception as error:
            found: list = [error]
        else:
            found = [one.message for one in caught]
    kinds = {base.__name__: base for one in found for base in type(one).__mro__}
    assert name in kinds, f"{name} was not raised, but {found!r}"
    texts = [told(one) for one in found if isinstance(one, kinds[name])]
    assert any(same(message, text) for text in texts), "\n".join(texts)
    capsys.readouterr()
    for language, code in rest:
        assert language == "python"
        with warnings.catch_warnings():
            if issubclass(kinds[name], Warning):
                warnings.simplefilter("error", kinds[name])
            run(code, names, tmp_path)
        assert capsys.readouterr().out.split() == " ".join(PROMISE.findall(code)).split()


def same(pattern: str, text: str) -> bool:
    """Whether a message is as shown, in lines of another length; `…` stands for what differs between machines."""
    pattern, text = (" ".join(one.split()) for one in (pattern, text))
    return re.fullmatch(re.escape(pattern).replace("…", ".*"), text) is not None


def test_a_message_on_the_page_is_compared_whole():
    assert same("a … c\nd", "a b b c d")
    assert not same("a", "a b")
    assert not same("a.c", "abc")


def test_a_traceback_ends_with_where_the_error_is_explained_and_the_message_is_as_it_was():
    error = ShapeError("layers_output[3] has another shape.")
    assert str(error) == "layers_output[3] has another shape."
    assert traceback.format_exception_only(error)[-1] == "What to do: nnterp explain ShapeError\n"
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert other.__notes__ == error.__notes__
        assert other.args == error.args


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in vars(errors).items() if isinstance(kind, type) and "Warning" not in name)
)
def test_every_error_of_nnterp_has_the_pointer(name):
    assert issubclass(getattr(errors, name), NnterpError)
    assert getattr(errors, name)("text").__notes__ == [f"What to do: nnterp explain {name}"]


def test_a_missing_value_is_an_unavailable_one(toy):
    with pytest.raises(Unavailable) as caught:
        toy.place("router_logits", 0)
    assert type(caught.value) is Unavailable
    assert caught.value.reason == "the layer has no mixture of experts"


def explained(capsys, *words: str) -> tuple[int, str, str]:
    parser = explain.argparse.ArgumentParser()
    explain.configure(parser)
    status = explain.run(parser.parse_args(words))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("spelling", ["ShapeError", "shapeerror", "nnterp.errors.ShapeError"])
def test_explain_prints_the_section(capsys, spelling):
    status, out, _ = explained(capsys, spelling)
    assert status == 0
    assert out.startswith("ShapeError\n")
    for _, code in BLOCK.findall(SECTIONS["ShapeError"]):
        assert all(line.strip() in out for line in code.splitlines())
    assert "PaddingError" not in out


@pytest.mark.parametrize("name", SECTIONS)
def test_what_explain_prints_can_be_run_as_it_stands(name, capsys):
    """Every name in the code of a section is Python's, made in it, or made by the lines that are printed below it."""
    printed = explained(capsys, name)[1]
    code = "".join(code for language, code in BLOCK.findall(SECTIONS[name]) if language == "python")
    _, said, below = printed.partition("To run this code, put these lines above it:")
    above = "\n".join(line.removeprefix("    ") for line in below.strip("\n").splitlines())
    given: dict = {}
    exec(compile(re.sub("^model = .*$", "model = None", above, flags=re.MULTILINE), "printed", "exec"), given)
    whole = ast.parse(code)
    names = [node for node in ast.walk(whole) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in ast.walk(whole) if isinstance(node, ast.FunctionDef | ast.ExceptHandler)}
    made |= {node.arg for node in ast.walk(whole) if isinstance(node, ast.arg)}
    assert {node.id for node in names if isinstance(node.ctx, ast.Load)} <= made | set(given) | set(dir(builtins))
    texts = {node.value for node in ast.walk(whole) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert "model" in given or not any("model.trace" in text for text in texts)  # code in a text
    assert bool(said) == bool(above.strip())


def test_links_are_shown_as_pages(capsys):
    out = explained(capsys, "PaddingError")[1]
    assert "which prompts share a batch (docs/certificate.md#which-prompts-share-a-batch)" in out.replace("\n", " ")


def test_explain_lists_the_errors_without_a_name(capsys):
    status, out, _ = explained(capsys)
    assert status == 0
    assert all(name in out for name in SECTIONS)


def test_explain_says_which_name_was_meant(capsys):
    status, out, said = explained(capsys, "ShapeErorr")
    assert (status, out) == (2, "")
    assert "ShapeErorr" in said
    assert "ShapeError" in said


@pytest.mark.parametrize("base", [ValueError, RuntimeError, UserWarning, KeyError, Exception])
def test_explain_says_which_errors_are_of_a_class_of_pythons(base, capsys):
    status, out, said = explained(capsys, base.__name__)
    kinds = {name for name, kind in own_kinds().items() if issubclass(kind, base)}
    assert (status, out) == (2, "")
    assert f"{base.__name__} is Python's own" in said
    assert {name for name in set(SECTIONS) - OF_PYTHON if re.search(rf"\b{name}\b", said)} == kinds
    assert not any(name in said for name in OF_PYTHON)
    assert ("None of nnterp's is a KeyError" in said) == (base is KeyError)


def own_kinds() -> dict[str, type]:
    kinds = {name: getattr(package, name) for package in PACKAGES for name in SECTIONS if hasattr(package, name)}
    return {**kinds, "OutOfOrderError": OutOfOrderError, "WithBlockNotFoundError": WithBlockNotFoundError}


def test_explain_says_of_a_name_near_none_what_there_is(capsys):
    said = explained(capsys, "Zzz")[2]
    assert all(name in said for name in SECTIONS)


def test_what_explain_prints_is_the_page():
    assert (Path(explain.__file__).with_name("errors.md")).read_text(encoding="utf-8") == PAGE, (
        "run: cp docs/errors.md packages/nnterp-core/src/nnterp/cli/errors.md"
    )


def test_explain_is_a_command():
    project = tomllib.loads((ROOT / "packages/nnterp-core/pyproject.toml").read_text())["project"]
    assert project["entry-points"]["nnterp.commands"]["explain"] == "nnterp.cli.explain"
