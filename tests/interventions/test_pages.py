"""The page on interventions runs as it stands."""

import re
import runpy
from pathlib import Path

import pytest

from nnterp import interventions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "page.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)), encoding="utf-8")
    names = runpy.run_path(str(file), run_name="page")
    assert names["read"].vocabulary[names["read"]["top_ids"][0, 0, 0].item()] == " France"
    assert names["table"].labels == names["again"].labels
    text = names["model"].tokenizer.decode(names["texts"][1][0])
    assert text.startswith("The capital of Spain is Paris")


def test_the_page_on_attribution_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
    file = tmp_path / "attribution.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)), encoding="utf-8")
    names = runpy.run_path(str(file), run_name="page")
    assert names["heads"].shape == (2, names["model"].num_layers, names["model"].num_heads)
    assert names["direct"]["residue"].abs().max() < 1e-4 * names["direct"]["logits"].abs().max()
    assert names["by_position"].tokens[0][-1] == " is"


def test_the_page_on_dictionaries_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "dictionaries.md").read_text(encoding="utf-8")
    file = tmp_path / "dictionaries.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)), encoding="utf-8")
    names = runpy.run_path(str(file), run_name="page")
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


@pytest.mark.parametrize("name", interventions.__all__)
def test_every_public_name_is_documented(name):
    documented = getattr(interventions, name).__doc__
    assert documented
    assert not documented.startswith(f"{name}("), "a dataclass without a docstring of its own"
