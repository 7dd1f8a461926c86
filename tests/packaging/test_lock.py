"""`requirements.lock`: what uv resolves, for plain pip; without the address of a registry."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import lock


def test_it_names_no_registry_and_hashes_every_file():
    text = lock.LOCK.read_text(encoding="utf-8")
    assert re.findall(r"\S*(?:://|@ |--(?!hash=)\w|file:)\S*", text.removeprefix(lock.HEAD)) == []
    wanted = re.split(r"\n(?=\S)", text.removeprefix(lock.HEAD).strip())
    assert len(wanted) >= 50
    for requirement in wanted:
        assert re.match(r"[\w.-]+==[\w.]+", requirement), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement
    assert {"torch", "transformers", "nnsight", "plotly"} <= set(lock.pinned(text))
    assert not [name for name in lock.pinned(text) if name.startswith("nnterp")]


@pytest.mark.packaging
@pytest.mark.slow
def test_it_is_what_uv_resolves():
    if shutil.which("uv") is None:
        pytest.skip("uv, which resolves what the file has to say, is not here: pip install uv")
    text, expected = lock.LOCK.read_text(encoding="utf-8"), lock.resolved()
    before, now = lock.pinned(text), lock.pinned(expected)
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    differ = ", ".join(f"{name} {before.get(name)} → {now.get(name)}" for name in names)
    assert text == expected, f"Run `uv run python tools/lock.py`. Other versions: {differ or 'none, but other files'}"
