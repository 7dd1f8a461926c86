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


@pytest.mark.parametrize("name", interventions.__all__)
def test_every_public_name_is_documented(name):
    documented = getattr(interventions, name).__doc__
    assert documented
    assert not documented.startswith(f"{name}("), "a dataclass without a docstring of its own"
