"""The notebooks of notebooks/ run, show what is stored in them, and are short."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("IPython")
pytest.importorskip("plotly")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
notebooks = importlib.import_module("notebooks")
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PROJECTS = ["attribution", "ioi-circuit", "lens", "probing", "steering"]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def texts(notebook):
    """What each code cell shows, as text."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            yield [
                "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])
                for output in cell["outputs"]
            ]


def same(one: str, other: str) -> bool:
    """Whether two texts agree in their words, and roughly in their numbers."""
    if " ".join(NUMBER.sub("#", one).split()) != " ".join(NUMBER.sub("#", other).split()):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.02, abs=0.02) for a, b in pairs)


def test_stale_outputs_are_noticed():
    assert same("layer 4: 0.881 of 24", "layer 4:  0.884 of 24")
    assert not same("layer 4: 0.88", "layer 4: 0.95")
    assert not same("layer 4: 0.88", "head 4: 0.88")
    assert not same("1 2", "1 2 3")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_is_stored_in_it(name, keep_proofs):
    stored = read(name)
    made = notebooks.run(stored, pictures=False)
    for before, now in zip(texts(stored), texts(made), strict=True):
        assert len(before) == len(now)
        for one, other in zip(before, now, strict=True):
            assert same(one, other), f"run tools/notebooks.py: stored is\n{one}\nand now it shows\n{other}"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTS)
def test_a_notebook_runs_on_a_real_model(name, real, keep_proofs):
    """With half the prompts of a task: on 30 layers each costs seconds."""
    checkpoint, notebook = real("smollm2").repo_id, read(name)
    for cell in notebook["cells"]:
        cell["source"] = [line.replace("(model, n=4", "(model, n=2") for line in cell["source"]]
    shown = list(texts(notebooks.run(notebook, pictures=False, checkpoint=str(checkpoint))))
    assert [len(cell) for cell in shown] == [len(cell) for cell in texts(read(name))]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_complete_and_of_no_machine(name):
    notebook = read(name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert code[-1]["outputs"]
    for cell in texts(notebook):
        for text in cell:
            assert not re.search(r"/(home|root|work|Users|tmp|usr)/|Warning|Traceback", text)
    figures = [o for cell in code for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert all(len(figure["data"]["image/png"]) > 10_000 for figure in figures)
    assert bool(figures) == (name in PROJECTS)


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_takes_fewer_than_thirty_lines(name):
    cells = [notebooks.source_of(cell) for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in cell.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert 5 < len(lines) < 30
    assert sum(len(notebooks.CHOICE.findall(cell)) for cell in cells) == 1


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    text = "\n".join(notebooks.source_of(c) for c in read(name)["cells"] if c["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []
