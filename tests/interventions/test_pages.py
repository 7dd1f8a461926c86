"""Pages on interventions run as they stand, and make what they say."""

import re
import runpy
from pathlib import Path

import pytest

from nnterp import interventions

DOCS = Path(__file__).parents[2] / "docs"
PROMISE = re.compile(r"^print\(.*\)  # → (.*)$", flags=re.MULTILINE)


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    """The names that a page of docs/ defines, run by itself; what it promises to print, it prints."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        text = (DOCS / name).read_text(encoding="utf-8")
        program = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S))
        file = tmp_path / "page.py"
        file.write_text(program, encoding="utf-8")
        names = runpy.run_path(str(file), run_name="page")
        printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
        for promised in PROMISE.findall(program):
            assert promised in printed
            printed = printed[printed.index(promised) + 1 :]
        return names

    return run


def test_the_page_on_interventions_runs(page):
    names = page("interventions.md")
    assert names["read"].vocabulary[names["read"]["top_ids"][0, 0, 0].item()] == " France"
    assert names["table"].labels == names["again"].labels
    text = names["model"].tokenizer.decode(names["texts"][1][0])
    assert text.startswith("The capital of Spain is Paris")


def test_the_page_on_attribution_runs(page):
    names = page("attribution.md")
    assert names["heads"].shape == (2, names["model"].num_layers, names["model"].num_heads)
    assert names["direct"]["residue"].abs().max() < 1e-4 * names["direct"]["logits"].abs().max()
    assert names["by_position"].tokens[0][-1] == " is"
    whole = names["whole"]
    assert whole["scores"].sum().item() == pytest.approx((whole["clean"] - whole["corrupted"]).item(), rel=0.02)
    assert names["country"].recovered() > 0.7 > 0.3 > names["country"].recovered("control")


def test_the_page_on_dictionaries_runs(page):
    names = page("dictionaries.md")
    assert names["fit"].explained_variance > 0.9 > 0.5 > names["elsewhere"].explained_variance
    assert "does not seem to belong" in str(names["caught"][-1].message)
    assert names["same"].num_features == names["dictionary"].num_features == 768
    tokenizer, best = names["model"].tokenizer, names["probabilities"].topk(4).indices
    assert {tokenizer.decode(i) for i in best} <= {
        " great",
        " perfect",
        " delicious",
        " wonderful",
        " lovely",
        " excellent",
    }
    assert names["report"].contexts(399)[0]["text"] == 2


def test_every_public_name_is_documented():
    """With a docstring of its own, and not with what a dataclass writes."""
    documented = {name: getattr(interventions, name).__doc__ or "" for name in interventions.__all__}
    assert [name for name, text in documented.items() if not text or text.startswith(f"{name}(")] == []
