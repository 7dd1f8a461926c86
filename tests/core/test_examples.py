"""Every public name has an example, and every example runs and prints what it promises.

Examples stand in docstrings, under `Example:`. What travels to a remote worker is sent with its docstring, so its
example stands in docs/errors.md or docs/api instead, which tests/core/test_errors.py and test_readme.py run. Examples
may use `model` (the toy, with attention probabilities), `prompts`, `torch`, `nnterp` and the public names of all
packages.
"""

from __future__ import annotations

import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nnterp
from nnterp import display, errors, interventions, positions, testing
from nnterp import prompts as prompts_package
from nnterp.prompts import tasks

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = (nnterp, interventions, prompts_package, display, tasks, positions, testing, errors)
TRAVELLING = ("nnterp.traced", "nnterp.errors", "nnterp.selectors")
PROMPTS = ["The capital of France is", "The Eiffel Tower is in the city of"]
PROMISE = re.compile(r"^print\(.*\)  # → (.*)$", flags=re.MULTILINE)


def public(package: Any) -> Iterator[tuple[str, Any]]:
    """The classes and functions that a package offers, each by its full name."""
    for name in getattr(package, "__all__", vars(package)):
        found = getattr(package, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            yield f"{package.__name__}.{name}", found


def methods(found: Any) -> Iterator[tuple[str, Any]]:
    """The public methods of a class that nnterp defines."""
    if inspect.isclass(found):
        for name, kind in inspect.getmembers(found):
            made = getattr(kind, "__func__", kind)
            if not name.startswith("_") and str(getattr(made, "__module__", "")).startswith("nnterp."):
                yield name, made


def example(found: Any) -> str | None:
    """The code under `Example:` in a docstring of its own."""
    own = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    shown = re.search(r"^Example:\n((?: {4}.*\n|\n)+)", f"{inspect.cleandoc(own or '')}\n", flags=re.MULTILINE)
    return textwrap.dedent(shown[1]).strip("\n") if shown else None


def on_a_page(name: str) -> bool:
    """Whether code of a page of the reference shows a name, or an error has a section, whose code raises it."""
    if f"\n## {name}\n\n```python\n" in (DOCS / "errors.md").read_text(encoding="utf-8"):
        return True
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.md")]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)]
    return any(re.search(rf"\b{name}\b", block) for block in blocks)


NAMES = {full: found for package in PACKAGES for full, found in public(package)}
EXAMPLES = {full: code for full, found in NAMES.items() if (code := example(found))}
EXAMPLES |= {
    f"{full}.{name}": code
    for full, found in NAMES.items()
    for name, method in methods(found)
    if (code := example(method))
}


def test_every_public_name_has_an_example():
    without = [
        name
        for name, found in NAMES.items()
        if name not in EXAMPLES and not (found.__module__.startswith(TRAVELLING) and on_a_page(name.rpartition(".")[2]))
    ]
    assert without == []


@pytest.fixture(scope="module")
def shared():
    """What every example may use."""
    modules = {"display": display, "positions": positions, "tasks": tasks, "testing": testing}
    names = {name: getattr(package, name) for package in (*PACKAGES[:3], testing) for name in package.__all__} | modules
    model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint(), enable_attention_probs=True)
    return {**names, "model": model, "nnterp": nnterp, "torch": torch, "prompts": PROMPTS}


def run_doctest(name, names):
    """Run an example that is written with prompts, and compare what it shows."""
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name] + "\n", names, name, None, 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


HUB = ("nnterp.load_transcoders", "nnterp.interventions.lens_from_hub")  # their examples download


@pytest.mark.parametrize("name", HUB)
def test_an_example_that_downloads_fails_only_because_nothing_can_be_reached(name, shared):
    with pytest.raises(FileNotFoundError, match="is not there, or cannot be reached"):
        exec(EXAMPLES[name], dict(shared))


def marked(name):
    """A name, slow if its example starts a remote worker, as such tests are."""
    return pytest.param(name, marks=[pytest.mark.slow] * ("RemoteWorker(" in EXAMPLES[name]))


@pytest.mark.parametrize("name", [marked(name) for name in dict.fromkeys(EXAMPLES) if name not in HUB])
def test_every_example_runs(name, shared, tmp_path, monkeypatch, capsys, keep_proofs):
    monkeypatch.chdir(tmp_path)
    names = {**shared, "__name__": "example"}
    try:
        if EXAMPLES[name].startswith(">>>"):
            run_doctest(name, names)
        else:
            file = tmp_path / "example.py"  # traces read their source
            file.write_text(EXAMPLES[name], encoding="utf-8")
            exec(compile(EXAMPLES[name], str(file), "exec"), names)
    finally:
        nnterp.detach(shared["model"])
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for promised in PROMISE.findall(EXAMPLES[name]):
        assert promised in printed
        printed = printed[printed.index(promised) + 1 :]
