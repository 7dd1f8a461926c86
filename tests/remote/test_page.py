"""The page on remote models runs as it stands, against a strict worker in place of the service."""

import re
import runpy
from pathlib import Path

import nnsight
import pytest

from nnterp import toy_checkpoint
from nnterp.testing import RemoteWorker

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "remote.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")  # nobody answers: `status` says so
    source = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S))
    assert source.count('"meta-llama/Llama-3.1-70B"') == 1
    file = tmp_path / "page.py"
    file.write_text(source.replace('"meta-llama/Llama-3.1-70B"', repr(str(toy_checkpoint()))), encoding="utf-8")
    with RemoteWorker(toy_checkpoint()) as worker, worker.serving():
        names = runpy.run_path(str(file), run_name="page")
        assert len(worker.requests) >= 12
    model, printed = names["model"], capsys.readouterr().out
    assert not model.dispatched
    assert names["lens"].shape[1] == model.num_layers
    assert len(names["norms"]) == model.num_layers
    assert model.tokenizer.decode(names["lens"][0, -1].argmax()).strip() == "Paris"
    assert model.tokenizer.decode(names["patched"][0].argmax()).strip() == "Tokyo"
    assert "Paris" in printed
    assert "IndexError: layers_output[99]" in printed
    assert "bytes were sent" in printed
