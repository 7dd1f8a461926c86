"""`nnterp lens` and `nnterp demo`, as a user runs them."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nnterp import plugins
from nnterp.cli import main
from nnterp.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_lens_prints_what_the_model_says(checkpoint, capsys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (
        main(["lens", checkpoint, "The capital of [bold]France[/bold] is", "--html", str(tmp_path / "lens.html")]) == 0
    )
    out = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer("The capital of [bold]France[/bold] is", return_tensors="pt")
    with torch.no_grad():
        probability, token = model(**ids).logits[0, -1].softmax(-1).max(-1)
    from nnterp.token_text import TokenNames

    rows = [line for line in out.splitlines() if re.match(r"\s+\d+ ", line)]
    assert len(rows) == model.config.num_hidden_layers
    assert TokenNames(tokenizer)(token) in rows[0]
    assert f"{100 * probability:.1f} %" in rows[0]
    assert "plotly.js" in (tmp_path / "lens.html").read_text()


def test_lens_says_which_layers_it_shows_and_how_to_see_all(capsys, tmp_path):
    deep = str(tiny_checkpoint("llama", tmp_path, num_hidden_layers=26))

    def printed(*words):
        assert main(["lens", deep, "The capital of France is", *words]) == 0
        out = capsys.readouterr().out
        return {int(row) for row in re.findall(r"^\s+(\d+) .*%", out, re.MULTILINE)}, " ".join(out.split())

    rows, out = printed()
    said = re.search(r"24 of 26 layers are shown: ([\d, ]+)\. --all-layers prints all\.", out)
    assert {int(layer) for layer in said[1].split(",")} == rows
    assert len(rows) == 24
    rows, out = printed("--all-layers")
    assert rows == set(range(26))
    assert "are shown" not in out


def test_lens_refuses_in_one_line(checkpoint, capsys, tmp_path):
    assert main(["lens", checkpoint, "The", "--html", str(tmp_path / "lens.docx")]) == 1
    assert "its suffix must be one of .html" in capsys.readouterr().err
    assert main(["lens", str(tmp_path / "nothing"), "The"]) == 1
    assert capsys.readouterr().err.startswith("nnterp lens: ")


@pytest.mark.parametrize("command", [["check"], ["lens", "--", "prompt"], ["demo", "--model"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "MODEL is empty"),
        ("./nofolder", "There is no folder ./nofolder"),
        ("tests", "The folder tests holds no config.json"),
        ("llamma", "'llamma' is no folder here, and the hub did not give it"),
    ],
)
def test_a_name_that_stands_for_nothing_is_one_line(command, name, told, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    words = [command[0], name, "prompt"] if command[0] == "lens" else [*command, name]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nnterp {command[0]}: {told}")
    assert error.count("\n") == 1
    if name == "llamma":
        assert "Names that are near: llama" in error


def test_every_command_takes_the_toy_and_shows_examples(capsys):
    assert main(["check", "toy"]) == 0
    assert "model.layers.*.self_attn" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.search(r"nnterp-core \d+\.\d+.*nnsight \d.*torch \d", capsys.readouterr().out)
    for command in plugins.names(plugins.COMMANDS):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"examples:\n  nnterp {command}" in capsys.readouterr().out


@pytest.mark.parametrize("width", [50, 80, 120])
def test_tables_fit_the_terminal_and_cut_nothing(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["lens", "toy", "The capital of France is"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match(r"\s+\d+ ", line)]
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    for row in rows:  # the most probable token and at least one of those after it, each with its probability
        assert len(re.findall(r"\S+ +[█▏▎▍▌▋▊▉]* +<?\d+\.\d %|\S+ <?\d+\.\d %", row)) >= 2
    assert ("█" in out) == (width >= 72)


@pytest.mark.parametrize("width", [50, 80, 140])
def test_a_certificate_fits_the_terminal(width, toy):
    console = Console(file=StringIO(), width=width)
    console.print(toy.certificate)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for line in toy.certificate.lines:
        assert line.name in text or width == 140
        assert line.error is None or f"{line.error:.1e}" in text
    assert ("allowed 1e-05" in text) == (width < 140)


def test_a_model_type_is_a_name_in_every_command(capsys):
    for words in (["check", "llama"], ["lens", "llama", "The"], ["demo", "--model", "llama"]):
        assert main(words) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "llama is a model type of transformers: this is a tiny model of that type with random weights" in out


@pytest.mark.parametrize("command", [["lens", "x", "The", "--html", "f.html"], ["demo", "--html", "f.html"]])
def test_figure_without_display_says_what_to_install(command, capsys, monkeypatch):
    monkeypatch.setattr(plugins, "load", _without_figures(plugins.load))
    assert main(command) == 1
    assert "pip install nnterp-display" in capsys.readouterr().err


def _without_figures(load):
    return lambda group, name: None if group in (plugins.FIGURES, "nnterp.writers") else load(group, name)


def test_demo_on_any_model(checkpoint, capsys, tmp_path):
    path = tmp_path / "demo.html"
    assert main(["demo", "--model", checkpoint, "--html", str(path)]) == 0
    out = capsys.readouterr().out
    for part in (
        "model.layers.*.self_attn",
        "logit_lens(",
        "model.steer(",
        "patchscope_lens(",
        "all lines hold",
        str(path),
    ):
        assert part in out
    assert path.exists()


def test_demo_without_display_still_works(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(plugins, "load", _without_figures(plugins.load))
    assert main(["demo", "--model", checkpoint]) == 0
    assert "pip install nnterp-display" in capsys.readouterr().out


def test_demo_shows_what_the_toy_model_knows(capsys, tmp_path):
    assert main(["demo", "--html", str(tmp_path / "demo.html")]) == 0
    out = capsys.readouterr().out
    lens, steering, patchscope = (re.search(f"{n}\\. .*?(?=\n{n + 1}\\. )", out, re.DOTALL)[0] for n in (2, 3, 4))
    assert re.search(r"·Paris leads from layer [1-9]\d* on and ends at \d\d\.\d %", lens)
    rows = [line for line in steering.splitlines() if " %" in line]
    columns = [re.findall(r"(·?\w+)\s+[█▏▎▍▌▋▊▉]*\s+<?[\d.]+ %", row) for row in rows]
    pleasant, unpleasant = ({row[i] for row in columns} for i in (1, 2))
    assert pleasant & {"·perfect", "·wonderful", "·great", "·lovely", "·beautiful"}
    assert unpleasant & {"·bleak", "·gloomy", "·dreadful", "·terrible", "·nasty", "·horrible"}
    assert not pleasant & unpleasant
    assert "'France' is read out of layer" in patchscope
