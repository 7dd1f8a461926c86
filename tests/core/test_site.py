"""The site of the documentation: every page is reached from its index, and it builds without a warning."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "tools"))
llms = importlib.import_module("llms")


def test_the_index_links_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {f"docs/{link}" for link in re.findall(r"\]\(([^):#]+\.md)\)", index)}
    assert {page for page in PAGES if page != "docs/index.md"} - linked == set()
    assert [page for page in NOTEBOOKS if f"](../{page})" not in index] == []


@pytest.mark.parametrize(
    "package", ["nnterp", "nnterp.vllm", "nnterp.interventions", "nnterp.prompts", "nnterp.display"]
)
def test_every_package_has_its_reference(package):
    directives = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES if page.startswith("docs/api/")]
    assert sum(f".. automodule:: {package}\n" in text for text in directives) == 1


def test_llms_txt_lists_every_page_and_every_public_name():
    listed = "\n".join(llms.lines(ROOT, [*PAGES, "README.md", "notebooks/lens.ipynb"]))
    assert "](docs/tour.html): A tour of nnterp" in listed
    assert "- [What does each layer predict?](notebooks/lens.html): A language model decides" in listed
    assert "`nnterp.interventions.activation_patching`: Run one prompt once for each layer" in listed
    assert re.findall(r"^- .*: ?$", listed, flags=re.MULTILINE) == []  # nothing without a sentence


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for needed in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    for page in [*PAGES, "README.md", *NOTEBOOKS]:
        html = tmp_path / Path(page).with_suffix(".html")
        assert html.is_file()
        assert f"]({Path(page).with_suffix('.html').as_posix()})" in listed
    reference = (tmp_path / "docs/api/interventions.html").read_text(encoding="utf-8")
    assert "activation_patching" in reference
    assert "Ghandeharioun" in reference
    assert 'href="tour.html"' in (tmp_path / "docs/index.html").read_text(encoding="utf-8")
