"""What a notebook shows: tables, cells run by magics, short tracebacks."""

from __future__ import annotations

import linecache
import sys
import traceback
from html.parser import HTMLParser
from types import ModuleType

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.schema.config import CONFIG

PROMPT = "The capital of France is"


class Cells(HTMLParser):
    """The texts of a table's cells, row by row."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def test_support_and_anatomy_are_tables(toy):
    support = toy.support()
    header, *rows = Cells(support._repr_html_()).rows
    assert header == ["value", "where", "why not elsewhere"]
    assert [tuple(row) for row in rows] == support.rows()
    assert {row[0]: row[1] for row in rows}["layers_output"] == "layers 0–7"
    names = dict(Cells(toy.anatomy._repr_html_()).rows)
    assert names["ln_final"] == "model.norm"


def test_the_models_own_repr_shows_standard_names(toy):
    shown = repr(toy)
    for standard, native in toy.anatomy.rows():
        assert any(standard in line and native in line for line in shown.splitlines())
    assert toy.certificate.verdict in shown
    assert len(shown.splitlines()) < 15
    assert toy.certificate.verdict in toy._repr_html_().replace("&#x27;", "'")


# -- cells that a magic runs -----------------------------------------------------------------------------------------


@pytest.fixture
def magic(monkeypatch):
    """`magic(name, filename, cell, **scope)`: run a cell as IPython's magics do, from a frame that holds its source."""
    module = ModuleType("IPython.core.magics.execution")
    source = (
        "def time(expr, scope):\n"
        "    exec(compile(expr, '<timed exec>', 'exec'), scope)\n"
        "def timeit(cell, scope):\n"
        "    stmt, transform = '', lambda text: text\n"
        "    exec(compile(cell, '<magic-timeit>', 'exec'), scope)\n"
        "def prun(cell, scope):\n"
        "    _run_with_profiler(cell, scope)\n"
        "def _run_with_profiler(code, scope):\n"
        "    exec(compile(code, '<string>', 'exec'), scope)\n"
    )
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(name, cell, **scope):
        scope = {"__name__": "__main__", **scope}
        getattr(module, name)(cell, scope)
        return scope

    yield run
    for filename in ("<timed exec>", "<magic-timeit>", "<string>"):
        linecache.cache.pop(filename, None)


@pytest.mark.parametrize("name", ["time", "timeit", "prun"])
def test_a_traced_cell_runs_under_a_magic(name, magic, toy):
    cell = "with model.trace(prompt):\n    stream = model.layers_output[{}].save()\n"
    with torch.no_grad(), toy.trace(PROMPT):
        first, second = toy.layers_output[2].save(), toy.layers_output[5].save()
    for layer, expected in ((2, first), (5, second), (2, first)):  # cells of a magic share a file name
        scope = magic(name, cell.format(layer), model=toy, prompt=PROMPT)
        assert torch.equal(scope["stream"], expected)
    lines = "z = 1\nwith model.generate(prompt, max_new_tokens=2) as tracer:\n    ids = tracer.result.save()\n"
    assert magic(name, lines, model=toy, prompt=PROMPT)["ids"].shape == (1, 7)


def test_the_magics_of_ipython_have_these_names():
    execution = pytest.importorskip("IPython.core.magics.execution")
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    seen = {}

    def look():
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__") == execution.__name__:
                seen[frame.f_code.co_name] = set(frame.f_locals)
            frame = frame.f_back

    shell.user_ns["look"] = look
    for cell in ("%%time\nlook()\nx = 1", "%%timeit -n 1 -r 1\nlook()", "%%prun -q\nlook()"):
        assert shell.run_cell(cell).success
    assert "expr" in seen["time"]
    assert {"transform", "cell", "stmt"} <= seen["timeit"]
    assert "code" in seen["_run_with_profiler"]


# -- tracebacks ------------------------------------------------------------------------------------------------------


def files(error):
    return [entry.filename for entry in traceback.extract_tb(error.__traceback__)]


def forward_pass(error):
    return [file for file in files(error) if "torch/nn" in file or "/transformers/" in file]


def test_an_error_of_nnterp_in_a_block_shows_the_block_and_not_the_forward_pass(toy):
    with pytest.raises(IndexError, match=r"layers_output\[99\]: the model has 8 layers") as caught, toy.trace(PROMPT):
        toy.layers_output[3].save()
        toy.layers_output[99].save()
    shown = traceback.extract_tb(caught.value.__traceback__)
    assert forward_pass(caught.value) == []
    assert len(shown) <= 7
    assert shown[-2].line == "toy.layers_output[99].save()"
    assert shown[-1].filename.endswith("traced/_accessors.py")


def test_an_error_of_the_block_itself_keeps_what_is_below_the_block(toy):
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught, toy.trace(PROMPT):
        toy.layers_output[3] @ torch.zeros(3, 3)
    assert forward_pass(caught.value) == []
    assert files(caught.value)[-1] == __file__
    with pytest.raises(OutOfOrderError, match="In this order the lines of the block work") as late, toy.trace(PROMPT):
        toy.layers_output[3].save()
        toy.layers_output[1] = toy.layers_output[1] * 2
    assert forward_pass(late.value) == []


def test_the_whole_traceback_is_there_in_debug_mode_and_for_errors_of_the_model(toy, monkeypatch):
    def broken(*_):
        raise RuntimeError("the model broke")

    handle = toy._module.lm_head.register_forward_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="the model broke") as caught, toy.trace(PROMPT):
            toy.layers_output[3].save()
    finally:
        handle.remove()
    assert len(forward_pass(caught.value)) > 2
    monkeypatch.setattr(CONFIG.APP, "DEBUG", True)
    with pytest.raises(IndexError) as caught, toy.trace(PROMPT):
        toy.layers_output[3].save()
        toy.layers_output[99].save()
    assert len(forward_pass(caught.value)) > 4
