"""The comparison with other engines: it catches wrong numbers, our adapter agrees, the page says what is stored."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnterp.testing import tiny_checkpoint

TOOLS = Path(__file__).parents[2] / "tools" / "engines"
sys.path.insert(0, str(TOOLS))

import causes  # noqa: E402
import comparing  # noqa: E402
import environments  # noqa: E402
import page  # noqa: E402
import running  # noqa: E402
from adapters import nnterp_2  # noqa: E402
from cells import CELLS, left_padded, own_tokens  # noqa: E402
from child import Run  # noqa: E402
from comparing import ABSENT, AGREES, NONE, REFUSED, WRONG, outcome  # noqa: E402
from reference import Examined  # noqa: E402
from results import FILE, Results, shortened  # noqa: E402

sys.path.remove(str(TOOLS))

VALUE = torch.arange(1.0, 7.0).reshape(1, 2, 3)
REFERENCE = {"stream.0@0": VALUE, "stream.1@0": 2 * VALUE, "stream.1@1": -VALUE}


def came_of(given, errors=None):
    return outcome("stream", [0, 1], REFERENCE, given, errors or {})


@pytest.mark.parametrize(
    ("given", "errors", "kind"),
    [
        ({"stream.0": VALUE, "stream.1": 2 * VALUE}, {}, AGREES),
        ({"stream.0": VALUE[0], "stream.1": -VALUE}, {}, AGREES),
        ({"stream.0": VALUE * (1 + 5e-5), "stream.1": 2 * VALUE}, {}, AGREES),
        ({"stream.0": VALUE * (1 + 5e-4), "stream.1": 2 * VALUE}, {}, WRONG),
        ({"stream.0": VALUE, "stream.1": VALUE}, {}, WRONG),
        ({"stream.0": VALUE, "stream.1": 2 * VALUE[:, :1]}, {}, WRONG),
        ({"stream.0": VALUE, "stream.1": 2 * VALUE.transpose(1, 2)}, {}, WRONG),
        ({"stream.0": VALUE * float("nan"), "stream.1": 2 * VALUE}, {}, WRONG),
        ({"stream.0": VALUE + 1, "stream.1": 2 * VALUE}, {"stream.1": "no"}, WRONG),
        ({"stream.0": VALUE}, {"stream.1": "no"}, REFUSED),
        ({}, {"load": "no"}, REFUSED),
        ({}, {}, ABSENT),
    ],
)
def test_one_number_that_differs_is_an_error(given, errors, kind):
    assert came_of(given, errors).kind == kind


def test_without_a_reference_nothing_counts():
    assert outcome("stream", [], {}, {"stream.0": VALUE}, {}).kind == NONE


def test_what_differs_is_said():
    found = came_of({"stream.0": VALUE * 1.5, "stream.1": 2 * VALUE})
    assert re.fullmatch(r"off by 0\.5 at 0", found.detail)
    assert "shape [3, 2]" in came_of({"stream.0": VALUE.mT, "stream.1": 2 * VALUE}).detail


@pytest.fixture(scope="module", params=["gpt2", "gemma2", "falcon"])
def examined(request, tmp_path_factory):
    """A checkpoint and its reference."""
    folder = tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return folder, Examined(folder)


def came(adapter, examined):
    folder, found = examined
    facts = json.loads(json.dumps(found.facts))
    run = Run(adapter, folder, facts, found.tensors["vector"])
    run.everything()
    offered = [cell for cell in CELLS if hasattr(adapter, cell)]
    return comparing.outcomes(facts, found.tensors, run.tensors, run.errors, offered, list(CELLS))


def test_ours_agrees_and_a_planted_error_is_caught(examined):
    """Our values are the reference's; those of another layer are not."""
    found = came(nnterp_2, examined)
    compared = {cell: one for cell, one in found.items() if one.kind != NONE}
    assert {cell for cell, one in compared.items() if one.kind != AGREES} == set()
    assert {"stream", "readout", "padded", "write", "attention", "mlp"} <= set(compared)

    def refuses(model, ids, layer):
        raise ValueError("no such value")

    planted = SimpleNamespace(
        NAME="nnterp",
        load=nnterp_2.load,
        stream=lambda model, ids, layer: nnterp_2.stream(model, ids, layer) * (1.001 if layer == 1 else 1),
        mlp=lambda model, ids, layer: nnterp_2.mlp(model, ids, max(layer - 1, 0)),
        attention=refuses,
    )
    kinds = {cell: one.kind for cell, one in came(planted, examined).items()}
    assert (kinds["stream"], kinds["mlp"], kinds["attention"], kinds["write"]) == (WRONG, WRONG, REFUSED, ABSENT)


def test_the_batch_is_padded_on_the_left():
    ids, mask = left_padded([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_page_is_that_of_the_stored_result():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(Results.read())


def test_the_counts_of_the_page_are_those_of_the_stored_result():
    """Counted from the file's letters, without the code that makes the page."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    tables = re.findall(r"^\| engine \| agrees.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) == 1 + len(CELLS)
    for number, table in enumerate(tables):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
        assert [row[0] for row in rows] == [engine.title for engine in environments.ENGINES]
        for row, engine in zip(rows, environments.ENGINES, strict=True):
            letters = stored["engines"][engine.adapter]["letters"].values()
            counts = Counter("".join(one if number == 0 else one[number - 1] for one in letters))
            assert [int(n) for n in row[1:]] == [*(counts[k] for k in "=rx-"), sum(counts[k] for k in "=rx-")]


def test_results_come_back_as_they_were_written(tmp_path):
    results = Results.read()
    results.write(tmp_path / "again.json")
    assert Results.read(tmp_path / "again.json") == results
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == FILE.read_text(encoding="utf-8")


def test_every_cause_is_of_numbers_that_differ():
    results = Results.read()
    for cause in causes.CAUSES:
        wrong = results.wrong(cause.engine)
        differing = {t for cell in cause.cells for t in wrong.get(cell, ())}
        assert set(cause.types) <= differing, cause


def test_stored_texts_do_not_name_this_machine():
    assert shortened("at /home/me/engines/x/y.py of <A object at 0x7f12>") == "at .../y.py of <A object at 0x...>"
    assert not re.search(r"/(tmp|home|root|work)/", FILE.read_text(encoding="utf-8"))


def test_adapters_offer_what_is_compared():
    assert running.offered("nnterp_2") == list(CELLS)
    assert set(running.offered("nnterp_1")) == {*CELLS} - {"head"}


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 2, 3, 4)])
def test_what_belongs_to_the_tokens_of_a_padded_batch(shape):
    batch = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    long, short = batch.unbind(len(shape) - 3)
    expected = torch.cat([long, short[..., 2:, :]], dim=-2)
    assert torch.equal(own_tokens(batch, [[5, 6, 7], [8]]), expected)
    assert torch.equal(own_tokens(batch.transpose(-3, -2), [[5, 6, 7], [8]]), expected)
