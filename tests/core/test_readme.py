"""The Python blocks of READMEs and docs run and print what is promised beside them; links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import nnterp

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted((ROOT / "packages").glob("*/README.md"))]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Run elsewhere: tests/core/test_errors.py, tests/remote/test_page.py, tests/interventions/test_pages.py,
# tests/vllm/run.py.
ELSEWHERE = ("errors.md", "remote.md", "interventions.md", "attribution.md", "vllm.md")
LONG = ("gallery.md", "lenses.md")
PROMPTS = ["The capital of France is", "The Eiffel Tower is in the city of"]  # pages go on with a model and prompts
PROMISE = re.compile(r"^print\(.*\)  # → (.*)$", flags=re.MULTILINE)


def snippets(readme: Path) -> str:
    """The file's Python blocks, in order, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", readme.read_text(encoding="utf-8"), flags=re.M | re.S))


def name(readme: Path) -> str:
    return readme.relative_to(ROOT).as_posix()


def pages_with_code():
    """The pages that are run here."""
    for page in [*READMES, *PAGES]:
        if page in READMES or (snippets(page) and page.name not in ELSEWHERE):
            yield pytest.param(page, id=name(page), marks=[pytest.mark.slow] if page.name in LONG else [])


@pytest.mark.parametrize("readme", pages_with_code())
def test_snippets_run(readme, tmp_path, capsys, monkeypatch, toy, keep_proofs):
    program = snippets(readme)
    assert program, f"{name(readme)} shows no code"
    monkeypatch.chdir(tmp_path)  # nothing in the repository is found by accident, nothing is written into it
    file = tmp_path / "readme_snippets.py"
    if not torch.cuda.is_available():
        program = program.replace('device="cuda"', 'device="cpu"')
    file.write_text(program, encoding="utf-8")
    given = {} if readme in READMES else {"model": toy, "prompts": PROMPTS, "nnterp": nnterp, "torch": torch}
    runpy.run_path(str(file), given, run_name="readme")
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for promised in PROMISE.findall(program):
        assert promised in printed
        printed = printed[printed.index(promised) + 1 :]


def test_the_main_readme_promises_something():
    assert len(PROMISE.findall(snippets(ROOT / "README.md"))) >= 3


def links():
    """Each page with each of its links, code left out."""
    for page in (*READMES, ROOT / "CONTRIBUTING.md", *PAGES):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            yield page, target


def test_links_inside_the_repository_lead_somewhere():
    inside = [(page, target) for page, target in links() if not re.match(r"[a-z]+:|#", target)]
    assert len(inside) > 100
    missing = [(name(page), target) for page, target in inside if not (page.parent / target.partition("#")[0]).exists()]
    assert missing == []


def test_links_to_the_web_are_well_formed():
    host = r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[^\s]*)?"
    web = [(name(page), target) for page, target in links() if re.match(r"[a-z]+:", target)]
    assert web
    assert [at for at in web if not re.fullmatch(host, at[1]) or at[1].endswith((".", ",", "#"))] == []


def test_the_two_commands_stand_at_the_top():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:8]
    assert "pip install uv && uv run nnterp demo" in lines
    assert "uv run pytest -n auto" in lines
