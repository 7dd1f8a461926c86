"""Files of lenses that are damaged, foreign or made to harm, and what users hand over by mistake: refused, by name."""

import gc
import json
import pickle
import random
import zipfile

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import ShapeError
from nnterp.files import read_tensors, write_tensors
from nnterp.interventions import Lens, evaluate_lens, fit_jacobian_lens, fit_tuned_lens, logit_lens
from nnterp.testing import tiny_model, tiny_tokenizer

TEXTS = [[11, 42, 57, 93, 130, 7], [60, 77, 101, 15], [9, 12, 31, 40, 8], [60, 78, 101, 15, 33, 2, 90]]
QUIET = {"skip_first": 1, "held_out": 0, "progress": False}


@pytest.fixture(scope="module")
def small():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def lens(small):
    return fit_jacobian_lens(small, TEXTS, offset=True, **QUIET)


def published(lens, **changes):
    """What a published file holds."""
    own = {layer: weight.half() for layer, weight in lens.weights.items()}
    whole = {"J": own, "n_prompts": 4, "source_layers": sorted(own), "d_model": lens.hidden_size}
    return {**whole, **changes}


# -- published Jacobian lenses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"J": {0.7: torch.eye(w)}}, "needs J, d_model and n_prompts"),
        (lambda w: {"J": {"0": torch.eye(w)}}, "needs J, d_model and n_prompts"),
        (lambda w: {"J": {True: torch.eye(w)}}, "needs J, d_model and n_prompts"),
        (lambda w: {"J": torch.eye(w)}, "needs J, d_model and n_prompts"),
        (lambda w: {"J": [torch.eye(w)]}, "needs J, d_model and n_prompts"),
        (lambda w: {"d_model": str(w)}, "needs J, d_model and n_prompts"),
        (lambda w: {"n_prompts": float("nan")}, "needs J, d_model and n_prompts"),
        (lambda w: {"J": {}, "source_layers": []}, "at least one layer"),
        (lambda w: {"J": {99: torch.eye(w)}, "source_layers": [99]}, r"maps for layers \[99\]"),
        (lambda w: {"J": {-1: torch.eye(w)}, "source_layers": [-1]}, r"maps for layers \[-1\]"),
        (lambda w: {"source_layers": [0]}, "is damaged: it has maps for layers"),
        (lambda w: {"target_layer": 1}, "leads to layer 1"),
        (lambda w: {"J": {0: 5}, "source_layers": [0]}, "is no tensor but int"),
        (lambda w: {"J": {0: torch.eye(w).int()}, "source_layers": [0]}, "no dense tensor of floating point numbers"),
        (
            lambda w: {"J": {0: torch.eye(w).cfloat()}, "source_layers": [0]},
            "no dense tensor of floating point numbers",
        ),
        (lambda w: {"J": {0: torch.eye(w).to_sparse()}, "source_layers": [0]}, "no dense tensor"),
        (lambda w: {"J": {0: torch.eye(w, device="meta")}, "source_layers": [0]}, "no dense tensor|damaged"),
        (lambda w: {"J": {0: torch.full((w, w), torch.nan)}, "source_layers": [0]}, "not finite"),
        (lambda w: {"J": {0: torch.full((w, w), torch.inf)}, "source_layers": [0]}, "not finite"),
        (lambda w: {"J": {0: torch.eye(w)[None]}, "source_layers": [0]}, "has shape"),
        (lambda w: {"J": {0: torch.zeros(1).expand(10**6, 10**6)}, "source_layers": [0]}, "has shape"),
        (lambda w: {"J": {0: torch.zeros(1).expand(10**6, 10**6)}, "d_model": 10**6}, "width 1000000"),
    ],
)
def test_jacobian_files_with_other_contents(small, lens, tmp_path, change, words):
    torch.save(published(lens), tmp_path / "lens.pt")
    assert Lens.from_jacobian_lens(tmp_path / "lens.pt", small).layers == lens.layers
    torch.save(published(lens, **change(small.hidden_size)), tmp_path / "lens.pt")
    with pytest.raises(ValueError, match=words):
        Lens.from_jacobian_lens(tmp_path / "lens.pt", small)


@pytest.mark.parametrize("content", [5, None, [1, 2], {"J": None}, "J d_model n_prompts"])
def test_other_files_of_torch(small, tmp_path, content):
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(ValueError, match="needs J, d_model and n_prompts"):
        Lens.from_jacobian_lens(tmp_path / "lens.pt", small)


def test_files_cut_or_changed_anywhere(small, lens, tmp_path):
    torch.save(published(lens), tmp_path / "lens.pt")
    whole, path, draw = (tmp_path / "lens.pt").read_bytes(), tmp_path / "changed.pt", random.Random(0)
    for _ in range(40):
        path.write_bytes(whole[: draw.randrange(len(whole) - 30)])
        with pytest.raises(ValueError, match=r"changed\.pt"):
            Lens.from_jacobian_lens(path, small)
    for _ in range(60):
        changed = bytearray(whole)
        for at in draw.sample(range(len(whole)), 8):
            changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = Lens.from_jacobian_lens(path, small)
        except ValueError:
            continue
        assert all(torch.isfinite(weight).all() for weight in found.weights.values())


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickles_that_run_code_or_fill_the_memory(small, lens, tmp_path, capsys):
    path = tmp_path / "lens.pt"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(published(lens, n_prompts=Hostile()), protocol))
        with pytest.raises(ValueError, match=r"lens\.pt"):
            Lens.from_jacobian_lens(path, small)
    path.write_bytes(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x40\x85R.")
    with pytest.raises(ValueError, match=r"lens\.pt"):
        Lens.from_jacobian_lens(path, small)
    assert "code ran" not in capsys.readouterr().out
    torch.save(published(lens), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
        bomb.writestr("archive/data/99", bytes(1 << 20))
    with pytest.raises(ValueError, match=r"it is compressed"):
        Lens.from_jacobian_lens(path, small)


# -- folders of the tuned-lens package -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": "4"}, "layers of width"),
        ({"num_hidden_layers": 10**9}, "layers of width"),
        ({"d_model": None}, "layers of width"),
        ({"base_model_name_or_path": 5}, "is no config of a tuned lens"),
        ({"base_model_name_or_path": None}, "is no config of a tuned lens"),
        ({"base_model_revision": ["main"]}, "is no config of a tuned lens"),
        ({"base_model_revision": "other"}, "fitted on revision other"),
    ],
)
def test_configs_with_other_contents(small, lens, tmp_path, change, words):
    lens.to_tuned_lens(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        Lens.from_tuned_lens(tmp_path, small)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, '{"d_model": 3}', "\x00"])
def test_configs_that_are_none(small, lens, tmp_path, text):
    lens.to_tuned_lens(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is no config of a tuned lens"):
        Lens.from_tuned_lens(tmp_path, small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"1.weight": None}, r"1\.weight is no tensor"),
        (lambda w: {"1.weight": torch.zeros(w)}, r"1\.weight has shape"),
        (lambda w: {"1.weight": torch.full((w, w), torch.nan)}, "not finite"),
        (lambda w: {"1.bias": 3}, r"1\.bias is no tensor"),
        (lambda w: {"1.bias": torch.zeros(1)}, r"1\.bias has shape"),
        (lambda w: {"1.bias": torch.full((w,), torch.inf)}, "not finite"),
        (lambda w: {"1.bias": torch.zeros(w).long()}, "no dense tensor"),
    ],
)
def test_params_with_other_contents(small, lens, tmp_path, change, words):
    lens.to_tuned_lens(tmp_path)
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    torch.save({**state, **change(small.hidden_size)}, tmp_path / "params.pt")
    with pytest.raises(ValueError, match=words):
        Lens.from_tuned_lens(tmp_path, small)
    torch.save([*state.values()], tmp_path / "params.pt")
    with pytest.raises(ValueError, match="holds no maps by name but list"):
        Lens.from_tuned_lens(tmp_path, small)


# -- nnterp's own files, whose checksum anybody can compute ------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 3},
        {"kind": "other"},
        {"details": None},
        {"details": {"maps_to": "2"}},
        {"details": {"maps_to": 99}},
        {"details": {"skip_first": [1]}},
        {"details": {"report": {"layers": {"0": {"lens": "0.1", "logit_lens": 1.0}}}}},
        {"details": {"report": [1]}},
        {"origin": None},
        {"origin": {}},
    ],
)
def test_records_with_other_contents(small, lens, tmp_path, change):
    lens.save(tmp_path / "lens")
    tensors, record = read_tensors(tmp_path / "lens", "lens")
    write_tensors(tmp_path / "lens", tensors, {**record, **change}, "lens")
    with pytest.raises(ValueError, match="holds no sound lens"):
        Lens.load(tmp_path / "lens")
    for gone in change:
        write_tensors(tmp_path / "lens", tensors, {k: v for k, v in record.items() if k != gone}, "lens")
        with pytest.raises(ValueError, match="holds no sound lens"):
            Lens.load(tmp_path / "lens")


@pytest.mark.parametrize(
    "change",
    [{"num_layers": "4"}, {"num_layers": None}, {"settings": {"dtype": 1}}, {"model": 5}, {"versions": 3}, {"more": 1}],
)
def test_origins_with_other_contents(lens, tmp_path, change):
    lens.save(tmp_path / "lens")
    tensors, record = read_tensors(tmp_path / "lens", "lens")
    record["origin"] = {**record["origin"], **change}
    write_tensors(tmp_path / "lens", tensors, record, "lens")
    with pytest.raises(ValueError, match="holds no sound lens"):
        Lens.load(tmp_path / "lens")


@pytest.mark.parametrize(
    "change",
    [
        {"weight.x": torch.eye(2)},
        {"weight.0": torch.eye(3)},
        {"weight.0": torch.eye(3).int()},
        {"bias.77": torch.zeros(3)},
        {"weight.-1": torch.eye(3)},
        {"probe": torch.zeros(3, 3)},
    ],
)
def test_tensors_with_other_contents(lens, tmp_path, change):
    lens.save(tmp_path / "lens")
    tensors, record = read_tensors(tmp_path / "lens", "lens")
    write_tensors(tmp_path / "lens", {**tensors, **change}, record, "lens")
    with pytest.raises(ValueError, match="holds no sound lens"):
        Lens.load(tmp_path / "lens")


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_states_that_are_none(small, lens):
    width = small.hidden_size
    for wrong in (torch.zeros(width - 1), torch.zeros(2, width + 1), torch.tensor(1.0), torch.zeros(width, 0)):
        for read in (lens.apply, lens.to_last_layer, lambda h, layer: lens.to_vocab(small, h, layer)):
            for layer in (0, -1):
                with pytest.raises(ShapeError, match=rf"must be \[\.\.\., {width}\]"):
                    read(wrong, layer)
    for wrong in (torch.zeros(width, dtype=torch.long), [0.0] * width, None):
        with pytest.raises(TypeError, match="floating point numbers"):
            lens.apply(wrong, 0)
    for dtype in (torch.bfloat16, torch.float64):
        state = torch.randn(2, 3, width).to(dtype)
        assert (lens.apply(state, 0).dtype, lens.apply(state, 0).shape) == (dtype, state.shape)
        assert lens.to_vocab(small, state, 0).shape == (2, 3, small.vocab_size)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kind": "logit"}, ValueError, "of kind 'tuned' or 'jacobian', not 'logit'"),
        ({"weights": {}}, ValueError, "at least one layer"),
        ({"weights": {0.5: torch.eye(4)}}, TypeError, "a layer of a lens is 0.5"),
        ({"weights": {"0": torch.eye(4)}}, TypeError, "a layer of a lens is '0'"),
        ({"weights": {0: torch.eye(4), 1: torch.eye(5)}}, ValueError, "map of layer 1 has shape"),
        ({"weights": {0: torch.eye(4).int()}}, ValueError, "no dense tensor of floating point"),
        ({"weights": {0: [[1.0]]}}, ValueError, "no tensor but list"),
        ({"weights": {0: torch.zeros(0, 0)}}, ValueError, "has shape"),
        ({"weights": {0: torch.tensor(1.0)}}, ValueError, "has shape"),
        ({"biases": {1: torch.zeros(4)}}, ValueError, "bias of layer 1"),
        ({"biases": {0: torch.zeros(5)}}, ValueError, "bias of layer 0 has shape"),
        ({"biases": {0: torch.full((4,), torch.nan)}}, ValueError, "not finite"),
    ],
)
def test_lenses_made_by_hand(lens, change, error, words):
    whole = {"kind": "tuned", "weights": {0: torch.eye(4)}, "biases": {}, "origin": lens.origin}
    Lens(**whole)
    with pytest.raises(error, match=words):
        Lens(**{**whole, **change})


@pytest.mark.parametrize(
    ("texts", "words"),
    [([], "no prompts|empty|at least"), ([""], "token"), ([[5]], "fewer than"), ([[5, 6], [7]], "fewer than")],
)
def test_texts_without_a_position_that_counts(small, lens, texts, words):
    for run in (
        lambda: fit_jacobian_lens(small, texts, **{**QUIET, "skip_first": 0}),
        lambda: fit_tuned_lens(small, texts, held_out=TEXTS[:1], progress=False),
        lambda: evaluate_lens(small, lens, texts, skip_first=0, progress=False),
    ):
        with pytest.raises(ValueError, match=words):
            run()


def test_the_order_of_layers_and_texts_twice(small):
    whole = fit_jacobian_lens(small, TEXTS, **QUIET)
    for layers in ([2, 0], [0, 2, 0], [-2, 0], torch.tensor([2, 0])):
        found = fit_jacobian_lens(small, TEXTS, layers, **QUIET)
        wanted = sorted({int(layer) % small.num_layers for layer in layers})
        assert found.layers == tuple(wanted)
        for layer in wanted:
            torch.testing.assert_close(found.weights[layer], whole.weights[layer], atol=1e-6, rtol=1e-5)
    twice = fit_jacobian_lens(small, [*TEXTS, *TEXTS], 0, **QUIET)
    torch.testing.assert_close(twice.weights[0], whole.weights[0], atol=1e-5, rtol=1e-4)


def test_a_model_in_the_place_of_another_is_not_taken_for_it(small, lens):
    """The new model may stand at the old one's address in memory."""
    for seed in range(1, 4):
        model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
        lens.check(model)
        del model
        gc.collect()
        other = StandardizedTransformer(tiny_model("llama", seed=seed), tokenizer=tiny_tokenizer())
        with pytest.raises(ValueError, match="fixed row of tokens"):
            lens.check(other)
    assert len(lens._fits._known) <= 4  # of seven models: those that are gone are forgotten
    with torch.no_grad():
        other._module.lm_head.weight.data = other._module.lm_head.weight.data * 2
    with pytest.raises(ValueError, match="fixed row of tokens"):
        logit_lens(other, TEXTS, lens=lens)
