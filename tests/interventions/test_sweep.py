"""The sweep engine against one plain forward pass with torch hooks per cell, on every architecture that loads."""

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.errors import RenamingError, ShapeError
from nnterp.inputs import encode
from nnterp.interventions._engine import Cell, Edit, Shortcuts, sweep
from nnterp.interventions._engine._tiles import Span, plan
from nnterp.interventions._proving import proven_shortcuts
from nnterp.testing import model_types
from nnterp.values import get_value, site_of

from ..looped_modeling import LOOPED
from .reference import logits_with

# Shorter and longer than the windows of tiny models, two of one length.
PROMPTS = [[11, 42, 57, 93, 130, 200, 31], [60, 77, 101, 15, 180, 222, 9], list(range(40, 53)), [33, 70]]

# Models in which these edits mean nothing, which must be said.
REFUSED = {
    "mllama": (OutOfOrderError, "never computes it"),  # layers of cross-attention that do not run without an image
}


def bend(tensor):
    """Another direction of the same size, whatever the shape."""
    return tensor.roll(1, -1) * 1.5


def whole(logits, cells):
    return {"logits": logits}


def hook(positions, streams=1):
    def function(tensor):
        flat = tensor.dim() == 2  # OPT's feed-forward
        sequence_first = not flat and tensor.shape[1] == 1 < tensor.shape[0]  # XLNet; prompts run one at a time here
        tensor = tensor.clone()
        view = tensor if flat else tensor[:, 0] if sequence_first else tensor[0]
        view = view.transpose(0, 1) if sequence_first and tensor.dim() == 4 else view  # Gemma 3n's streams come first
        view = view.unflatten(0, (streams, -1)).transpose(0, 1) if streams > 1 else view  # ProphetNet
        for position in positions:
            view[position] = bend(view[position])
        return tensor

    return function


def available(model, name, layer):
    try:
        site_of(get_value(name), model.anatomy, layer)
    except RenamingError:
        return False
    return True


def some_cells(model):
    """Edits of several kinds at several depths and positions, some with two places, each in half of the prompts."""
    last = model.num_layers - 1
    wanted = [
        [("layers_output", 0, (1,))],
        [("layers_output", last, (-1,))],
        [("layers_output", last - 1, (0,))],
        [("mixers_output", 1, (-1,)), ("mlps_output", last, (0, -1))],
        [("layers_input", last // 2 + 1, (-2,))],
    ]
    cells = []
    for prompt, ids in enumerate(PROMPTS):
        for kind, edits in enumerate(wanted):
            if (kind + prompt // 2) % 2:
                continue
            own = [(n, layer, tuple(p % len(ids) for p in at)) for n, layer, at in edits if available(model, n, layer)]
            if own:
                cells.append((prompt, own))
    return cells


def slow(model, prompt, edits, position=-1):
    layout = model.readout.layout  # a hook sees CPM-Ant's soft prompt in front of the tokens
    hooks = [(n, layer, hook(tuple(p + layout.extra for p in at), layout.streams)) for n, layer, at in edits]
    return logits_with(model, PROMPTS[prompt], hooks)[position]


def close(found, expected):
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in LOOPED])
def test_equals_one_forward_per_cell(tiny, model_type):
    try:
        model = tiny(model_type)
    except RenamingError as error:
        pytest.skip(f"refused at load: {str(error)[:80]}")
    specs = some_cells(model)
    cells = [Cell(prompt, tuple(Edit(n, layer, at, bend) for n, layer, at in edits)) for prompt, edits in specs]
    rows = encode(model, PROMPTS)
    if model_type in REFUSED:
        with pytest.raises(REFUSED[model_type][0], match=REFUSED[model_type][1]):
            sweep(model, rows, cells, whole, proven_shortcuts(model), batch_size=7)
        return
    found = sweep(model, rows, cells, whole, proven_shortcuts(model), batch_size=7)["logits"]
    for (prompt, edits), own in zip(specs, found, strict=True):
        close(own, slow(model, prompt, edits))


def test_shortcuts_are_taken_where_they_should_be(tiny):
    for model_type in (
        "gpt2",
        "llama",
        "gemma2",
        "qwen3",
        "bloom",
        "mistral",
        "opt",
        "mixtral",
        "deepseek_v3",
        "falcon",
    ):
        taken = proven_shortcuts(tiny(model_type))
        assert (taken.prefix, taken.skip, taken.readout, taken.ragged) == (True,) * 4, (model_type, taken.reasons)
        assert taken.join == (model_type != "bloom"), "its position bias is made for each row"
        assert taken.tail == (model_type not in ("opt", "falcon")), "they do not broadcast"
    assert proven_shortcuts(tiny("gemma2")).window == 8
    assert not proven_shortcuts(tiny("gemma2")).within(8).prefix
    for model_type in ("mamba", "jamba", "lfm2", "qwen3_next"):
        taken = proven_shortcuts(tiny(model_type))
        assert (taken.prefix, taken.skip) == (False, False)
        assert taken.reasons


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("others", [(), ("ragged",), ("join", "tail"), ("join", "tail", "ragged")])
def test_every_combination_of_shortcuts_is_exact(tiny, prefix, skip, readout, others):
    model = tiny("llama")
    specs = some_cells(model)
    cells = [Cell(prompt, tuple(Edit(n, layer, at, bend) for n, layer, at in edits)) for prompt, edits in specs]
    more = {"ragged": "ragged" in others, "join": "join" in others and skip, "tail": "tail" in others and readout}
    shortcuts = Shortcuts(prefix, skip, readout, **more)
    found = sweep(model, encode(model, PROMPTS), cells, whole, shortcuts, fall_back=False)["logits"]
    for (prompt, edits), own in zip(specs, found, strict=True):
        close(own, slow(model, prompt, edits))


def test_a_shortcut_that_is_wrong_is_not_taken(tiny):
    """A forward pass whose layers do not forget what came before must fail the probe."""
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model, tiny_tokenizer

    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    kept = {}
    first, third = model._module.model.layers[0], model._module.model.layers[2]
    first.register_forward_pre_hook(lambda m, args: kept.__setitem__("embeddings", args[0]))
    third.register_forward_hook(lambda m, args, out: out + kept["embeddings"][:, -out.shape[1] :].mean())
    taken = proven_shortcuts(model)
    assert not taken.skip
    assert any("off by" in reason for reason in taken.reasons), taken.reasons


def test_reading_other_positions(tiny):
    model = tiny("llama")
    rows = encode(model, PROMPTS[:2])
    cells = [Cell(p, (Edit("layers_output", layer, (2,), bend),)) for p in range(2) for layer in range(4)]
    found = sweep(model, rows, cells, whole, proven_shortcuts(model), read_at=[4, 2])["logits"]
    for cell, own in zip(cells, found, strict=True):
        edit = cell.edits[0]
        close(own, slow(model, cell.prompt, [(edit.value, edit.layer, edit.positions)], [4, 2][cell.prompt]))


def test_an_edit_after_what_is_read_changes_nothing(tiny):
    model = tiny("llama")
    cells = [Cell(0, (Edit("layers_output", 1, (5,), bend),))]
    found = sweep(model, encode(model, PROMPTS[:1]), cells, whole, proven_shortcuts(model), read_at=[3])["logits"]
    close(found[0], logits_with(model, PROMPTS[0])[3])


def test_memory_running_out_halves_the_batch(tiny):
    model = tiny("llama")
    proven_shortcuts(model)
    specs = some_cells(model)
    cells = [Cell(prompt, tuple(Edit(n, layer, at, bend) for n, layer, at in edits)) for prompt, edits in specs]
    rows = encode(model, PROMPTS)
    expected = sweep(model, rows, cells, whole, proven_shortcuts(model))["logits"]
    sizes = []

    def short_of_memory(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model._module.register_forward_pre_hook(short_of_memory, with_kwargs=True)
    try:
        found = sweep(model, rows, cells, whole, Shortcuts(), fall_back=False)["logits"]
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert max(sizes) > 2
    assert sizes[-1] <= 2


def test_an_edit_of_the_wrong_shape_says_both_shapes(tiny):
    model = tiny("llama")
    cells = [Cell(0, (Edit("layers_output", 1, (2,), torch.zeros(3)),))]
    with pytest.raises(ShapeError, match=r"layers_output\[1\].*shape \[3\]"):
        sweep(model, encode(model, PROMPTS[:1]), cells, whole, proven_shortcuts(model))


@pytest.mark.parametrize("join", [False, True])
def test_plan_covers_every_cell_once_and_keeps_its_bounds(join):
    spans = [Span(p, layer, end) for end in (16, 11) for p in range(end) for layer in range(1, 13)]
    tiles = plan(spans, 12, most_rows=20, most_tokens=64, join=join)
    assert sorted(i for tile in tiles for i in tile.cells) == list(range(len(spans)))
    for tile in tiles:
        assert len(tile.cells) <= 20
        assert len(tile.cells) * (tile.end - tile.position) <= 64 or len(tile.cells) == 1 or tile.layers[0] == 12
        assert list(tile.layers) == sorted(tile.layers)
        for i, layer in zip(tile.cells, tile.layers, strict=True):
            assert spans[i].position >= tile.position
            assert spans[i].end <= tile.end
            assert spans[i].layer == layer if join else spans[i].layer >= layer == tile.layers[0]
    assert plan([], 12, 4, 64) == []


def test_prompts_of_different_lengths_share_a_batch(tiny):
    """Edits at the same place of prompts of four lengths: one batch, and the unedited runs they share."""
    model = tiny("llama")
    prompts = [list(range(40, 40 + length)) for length in (4, 9, 6, 7)]
    rows = encode(model, prompts)
    cells = [Cell(p, (Edit("layers_output", layer, (1,), bend),)) for p in range(4) for layer in range(3)]
    ran = []
    handle = model._module.register_forward_pre_hook(
        lambda m, args, kwargs: ran.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        proven_shortcuts(model)
        ran.clear()
        found = sweep(model, rows, cells, whole, proven_shortcuts(model))["logits"]
        assert ran == [(4, 9), (1, 8)], "the unedited runs; then what follows the shared first token"
        ran.clear()
        apart = sweep(model, rows, cells, whole, Shortcuts(True, True, True), fall_back=False)["logits"]
        assert len(ran) >= 8
    finally:
        handle.remove()
    for cell, own, alone in zip(cells, found, apart, strict=True):
        edit = cell.edits[0]
        expected = logits_with(model, prompts[cell.prompt], [(edit.value, edit.layer, hook((1,)))])[-1]
        close(own, expected)
        close(alone, expected)


@pytest.mark.parametrize("model_type", ["llama4", "rwkv", "bart"])
def test_lengths_are_not_mixed_where_padding_is_not_exact(tiny, model_type):
    model = tiny(model_type)
    assert not model.padding_is_exact
    assert not proven_shortcuts(model).ragged


def test_a_value_that_does_not_fit_a_shortcut_is_run_without_it(tiny, monkeypatch):
    """Whatever goes wrong in a batch with joined rows, what is left is run plainly, and what is done is kept."""
    from nnterp.interventions._engine._batch import CellBatchRun

    model = tiny("llama")
    specs = some_cells(model)
    cells = [Cell(prompt, tuple(Edit(n, layer, at, bend) for n, layer, at in edits)) for prompt, edits in specs]
    proven_shortcuts(model)
    run, failed = CellBatchRun.run, []

    def failing(self, *args):
        if self.taken.join and self.batch.offset:
            failed.append(True)
            raise RuntimeError("the shape of this does not fit")
        return run(self, *args)

    monkeypatch.setattr(CellBatchRun, "run", failing)
    found = sweep(model, encode(model, PROMPTS), cells, whole, proven_shortcuts(model))["logits"]
    assert len(failed) == 1
    for (prompt, edits), own in zip(specs, found, strict=True):
        close(own, slow(model, prompt, edits))


WARNINGS = """
import nnterp
from nnterp.interventions import activation_patching, logit_difference

model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
metric = logit_difference(" Paris", " Tokyo")
activation_patching(model, "The capital of France is", "The capital of Japan is", metric, progress=False)
"""


def test_no_warning_is_shown_that_a_user_cannot_act_on(processes):
    _, said, failed = processes.run(WARNINGS)
    assert not failed, said
    assert "Warning" not in said
