"""Layers, heads and positions are read in one way: every spelling gives what a plain list gives, or a clear error."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from nnterp import nnsight_utils
from nnterp.interventions import (
    Component,
    Result,
    TargetPrompt,
    TargetPromptBatch,
    ablate,
    activation_patching,
    components,
    logit_difference,
    logit_lens,
    logit_lens_table,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
    path_patching,
)
from nnterp.positions import at, last_of
from nnterp.prompts import IncompleteRunError, Prompt, run_prompts

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
PARIS = logit_difference(" Paris", " Rome")

# Spellings of the indices 0, 2, 2, 1: a list, and what has to mean the same.
SEVERAL = {
    "tuple": lambda: (0, 2, 2, 1),
    "of NumPy": lambda: [np.int64(0), np.int32(2), np.uint8(2), 1],
    "array": lambda: np.array([0, 2, 2, 1]),
    "tensor": lambda: torch.tensor([0, 2, 2, 1]),
    "int32 tensor": lambda: torch.tensor([0, 2, 2, 1], dtype=torch.int32),
    "of tensors": lambda: [torch.tensor(0), torch.tensor(2), torch.tensor(2), torch.tensor(1)],
    "generator": lambda: (i for i in (0, 2, 2, 1)),
    "iterator": lambda: iter([0, 2, 2, 1]),
}
# Spellings of a list that has neither duplicates nor another order.
RANGES = {
    "range": lambda: range(1, 3),
    "slice": lambda: slice(1, 3),
    "set": lambda: {2, 1},
    "frozenset": lambda: frozenset((1, 2)),
}
ONE = {
    "NumPy": lambda: np.int64(1),
    "array without axes": lambda: np.array(1),
    "tensor without axes": lambda: torch.tensor(1),
    "list": lambda: [1],
    "tensor": lambda: torch.tensor([1]),
    "array": lambda: np.array([1]),
}
BAD = [
    (True, TypeError),
    (np.True_, TypeError),
    (torch.tensor(True), TypeError),
    ([True, False], TypeError),
    (torch.tensor([True, False]), TypeError),
    (np.array([True]), TypeError),
    (1.0, TypeError),
    ([0, 1.5], TypeError),
    (float("nan"), TypeError),
    (torch.tensor([1.0]), TypeError),
    (torch.tensor(1.0), TypeError),
    (np.array([1.0]), TypeError),
    ("France", ValueError),
    ("0", ValueError),
    (["0"], (TypeError, ValueError)),
    (b"ab", TypeError),
    ({0: 1}, TypeError),
    (object(), TypeError),
    ([None], TypeError),
    ([], ValueError),
    ((), ValueError),
    (set(), ValueError),
    (np.array([]), ValueError),
    (torch.tensor([], dtype=torch.long), ValueError),
    (range(0), ValueError),
    (slice(90, 99), ValueError),
    (slice(None, None, 0), ValueError),
    (slice(0.5, 2), TypeError),
    (99, IndexError),
    (-99, IndexError),
    ([0, 99], IndexError),
    (np.int64(99), IndexError),
    (torch.tensor([0, -99]), IndexError),
]
# What would come from inside torch or Python.
FOREIGN = re.compile(
    "only integer|truth value|index out of range|recursion|has no attribute|not iterable|not subscriptable|"
    "selected index|can't convert|cannot be interpreted|expected sequence|unhashable|not supported between"
)


def numbers(made):
    """A result as a list of tensors; labels of layers included, so that they are compared too."""
    if isinstance(made, torch.Tensor):
        return [made]
    if isinstance(made, Result):
        return [*made.tensors.values(), torch.tensor(made.labels.get("layers", ()))]
    if isinstance(made, dict):
        return [torch.tensor(list(made)), *made.values()]
    return [torch.as_tensor(made)]


def collected(m, **options):
    return m.collect([FRANCE, "The"], ["layers_output", "mlps_output"], **options)


LAYERS = {
    "collect": lambda m, x: collected(m, layers=x, positions=-1)["layers_output"],
    "collect, the second value": lambda m, x: collected(m, layers=x, positions=-1)["mlps_output"],
    "collect over a generation": lambda m, x: m.collect(FRANCE, "layers_output", layers=x, max_new_tokens=2)[
        "layers_output"
    ],
    "gradients": lambda m, x: m.gradients(FRANCE, lambda logits: logits[:, -1, 3].sum(), "layers_output", layers=x)[
        "layers_output"
    ],
    "logit_lens": lambda m, x: logit_lens(m, [FRANCE, ITALY], layers=x),
    "logit_lens_table": lambda m, x: logit_lens_table(m, FRANCE, layers=x),
    "patchscope_lens": lambda m, x: patchscope_lens(m, FRANCE, layers=x),
    "patchscope_lens(layer_to_patch)": lambda m, x: patchscope_lens(m, FRANCE, layer_to_patch=x),
    "patchscope_table": lambda m, x: patchscope_table(m, FRANCE, layers=x),
    "patchscope_generate": lambda m, x: patchscope_generate(m, FRANCE, TargetPrompt("a a\nb b\n?", -1), 2, layers=x),
    "activation_patching": lambda m, x: activation_patching(
        m, FRANCE, ITALY, PARIS, ["layers_output", "mlps_output"], layers=x, positions=[-1]
    ),
    "components": lambda m, x: [c.layer for c in components(m, "mlps_output", x)],
    "run_prompts": lambda m, x: run_prompts(
        m,
        [Prompt.from_strings(p, "Paris", m) for p in (FRANCE, ITALY)],
        batch_size=1,
        get_probs_func=logit_lens,
        func_kwargs={"layers": x},
        progress=False,
    )["target"],
    "get_token_activations": lambda m, x: nnsight_utils.get_token_activations(m, [FRANCE], x),
    "collect_token_activations_batched": lambda m, x: nnsight_utils.collect_token_activations_batched(
        m, [FRANCE, ITALY], 1, x
    ),
    "batched, another value": lambda m, x: nnsight_utils.collect_token_activations_batched(
        m, [FRANCE, ITALY], 1, x, nnsight_utils.get_mlp_output
    ),
    "session": lambda m, x: nnsight_utils.collect_last_token_activations_session(m, [FRANCE, ITALY], 1, x),
}
HEADS = {
    "activation_patching": lambda m, x: activation_patching(
        m, FRANCE, ITALY, PARIS, "attention_head_outputs", layers=[1], heads=x
    ),
    "neurons": lambda m, x: activation_patching(m, FRANCE, ITALY, PARIS, "mlp_neurons", layers=[1], heads=x),
    "components": lambda m, x: [c.heads for c in components(m, "attention_head_outputs", 1, x)],
    "ablate": lambda m, x: ablate(m, FRANCE, Component("attention_head_outputs", 1, x)),
    "path_patching": lambda m, x: path_patching(
        m, FRANCE, ITALY, Component("attention_head_outputs", 1, x), "logits", PARIS
    ),
}
POSITIONS = {
    "collect": lambda m, x: collected(m, layers=[0], positions=x)["layers_output"],
    "logit_lens": lambda m, x: logit_lens(m, [FRANCE, ITALY], layers=[3], positions=x),
    "logit_lens_table": lambda m, x: logit_lens_table(m, [FRANCE, ITALY], layers=[3], positions=x),
    "activation_patching": lambda m, x: activation_patching(m, FRANCE, ITALY, PARIS, layers=[3], positions=x),
    "ablate": lambda m, x: ablate(m, FRANCE, Component("mlps_output", 3, positions=x)),
    "components": lambda m, x: ablate(m, FRANCE, components(m, "mlps_output", [3, 4], positions=x)),
    "path_patching": lambda m, x: path_patching(
        m, FRANCE, ITALY, Component("mlps_output", 1, positions=x), "logits", PARIS
    ),
}


@pytest.fixture
def model(toy, monkeypatch):
    """The toy model; "The" of `collected` is long enough for every position that is tried."""
    monkeypatch.setitem(globals(), "collected", lambda m, **o: m.collect([FRANCE, "The Eiffel Tower"], VALUES, **o))
    return toy


VALUES = ["layers_output", "mlps_output"]
CALLS = [
    pytest.param(call, id=f"{kind}: {name}")
    for kind, calls in (("layers", LAYERS), ("heads", HEADS), ("positions", POSITIONS))
    for name, call in calls.items()
]


@pytest.mark.parametrize("call", CALLS)
def test_every_spelling_is_the_plain_list(model, call):
    expected = numbers(call(model, [0, 2, 2, 1]))
    for name, spelled in SEVERAL.items():
        found = numbers(call(model, spelled()))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name


@pytest.mark.parametrize("call", CALLS)
def test_ranges_slices_and_sets_are_ascending_lists(model, call):
    """A slice of positions is patched at once, so it has one column; everywhere else it is the list."""
    expected = numbers(call(model, [1, 2]))
    for name, spelled in RANGES.items():
        found = numbers(call(model, spelled()))
        if name == "slice" and call is POSITIONS["activation_patching"]:
            expected_here = numbers(call(model, [[1, 2]]))
        else:
            expected_here = expected
        assert all(torch.equal(a, b) for a, b in zip(expected_here, found, strict=True)), name


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_one_index(model, call):
    """One index in every spelling; whether it has an axis depends on whether it was in a list, and on nothing else."""
    alone, listed = numbers(call(model, 1)), numbers(call(model, [1]))
    for name, spelled in ONE.items():
        found = numbers(call(model, spelled()))
        expected = alone if name in ("NumPy", "array without axes", "tensor without axes") else listed
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape, name
            assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_negative_indices_count_from_the_end(model, call):
    last = numbers(call(model, [-1]))
    if call in LAYERS.values():
        end = model.num_layers - 1
    elif call in HEADS.values():
        end = (model.intermediate_size if call is HEADS["neurons"] else model.num_heads) - 1
    else:
        return  # the prompts end at different positions
    assert all(torch.equal(a, b) for a, b in zip(last, numbers(call(model, [end])), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("call", [*LAYERS.values(), HEADS["activation_patching"]])
def test_all_is_everything(model, call):
    every = range(model.num_layers if call in LAYERS.values() else model.num_heads)
    assert all(
        torch.equal(a, b) for a, b in zip(numbers(call(model, "all")), numbers(call(model, list(every))), strict=True)
    )


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_index_is_refused_in_words(model, call):
    for given, error in BAD:
        if call is HEADS["neurons"] and (error is IndexError or isinstance(given, slice)):
            continue  # there is a neuron 99
        with pytest.raises((TypeError, ValueError, IndexError, IncompleteRunError)) as caught:
            call(model, given)
        cause = caught.value.__cause__ if isinstance(caught.value, IncompleteRunError) else caught.value
        assert isinstance(cause, error), (given, cause)
        assert not FOREIGN.search(str(cause)), (given, cause)
        where = "position|layer|head|neuron|tokens"
        assert re.search(where, str(cause)), (given, cause)
        if error is IndexError:
            assert re.search("-?99", str(cause)), (given, cause)
            assert re.search(r"go from -\d+ to \d+|has \d+ tokens", str(cause)), (given, cause)


def test_positions_of_each_prompt_are_the_same_in_every_function(model):
    both = [[0, 1], [-1]]
    for spelled in (both, (range(2), (-1,)), [slice(0, 2), np.array([-1])], iter(both)):
        spelled = list(spelled)
        own = model.collect([FRANCE, ITALY], "layers_output", [3], positions=spelled)
        assert own.positions == ((0, 1), (4,))
        lens = logit_lens(model, [FRANCE, ITALY], layers=[3], positions=spelled)
        for i, prompt in enumerate((FRANCE, ITALY)):
            alone = logit_lens(model, prompt, layers=[3], positions=both[i])
            assert torch.allclose(lens[i, :, : len(both[i])], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match="3 lists for 2 prompts"):
        logit_lens(model, [FRANCE, ITALY], positions=[[0], [1], [2]])


def test_a_text_is_no_position_and_selectors_say_what_they_need(model):
    with pytest.raises(ValueError, match=r"last_of\('France'\)"):
        model.collect(FRANCE, "layers_output", positions="France")
    for make in (at, last_of):
        for bad in (None, 3, b"France", ["France"]):
            with pytest.raises(TypeError, match="give the text to look for"):
                make(bad)
        with pytest.raises(ValueError, match="empty"):
            make("")
        with pytest.raises(TypeError, match="occurrence"):
            make("France", 1.5)


def test_results_count_layers_from_the_end_of_the_model(model):
    found = model.collect(FRANCE, "layers_output", layers=[1, -1, 1])
    slopes = model.gradients(FRANCE, lambda logits: logits[:, -1, 3].sum(), "layers_output", layers=[1, -1, 1])
    last = model.num_layers - 1
    for result, missing in ((found, "collected"), (slopes, "asked for")):
        assert result.layers["layers_output"] == (1, last, 1)
        whole = result["layers_output"]
        assert torch.equal(whole[0], whole[2])
        for spelled in (-1, last, np.int64(-1), torch.tensor(last)):
            assert torch.equal(result["layers_output", spelled], whole[1])
        for bad in (True, 1.0, "1", [1], slice(0, 2), torch.tensor([1, 2])):
            with pytest.raises(TypeError, match="layer of layers_output"):
                result["layers_output", bad]
        with pytest.raises(KeyError, match=f"Layer -2 of layers_output was not {missing}"):
            result["layers_output", -2]
        for bad in (5, None, ("layers_output", 1, 2), ()):
            with pytest.raises(KeyError, match="no key"):
                result[bad]
            assert bad not in result
        assert "layers_output" in result
        assert "layers_output[1]" in result
        assert "mlps_output" not in result
    with pytest.raises(KeyError, match="not per layer"):
        _ = model.collect(FRANCE, "token_embeddings")["token_embeddings", 0]


def test_accessors_refuse_what_is_no_layer(model):
    bad = [True, 1.0, "1", [1], slice(0, 2), torch.tensor([1, 2]), torch.tensor(1.0), np.array([1]), np.True_, None]
    for given in bad:
        with pytest.raises(TypeError, match="a layer is an integer from -8 to 7"), model.trace(FRANCE):
            _ = model.layers_output[given]
        with pytest.raises(TypeError, match="a layer is an integer from -8 to 7"):
            _ = model.mlps[given]
        if given is not None:
            with pytest.raises(TypeError, match="layer of layers_output"):
                model.place("layers_output", given)
    assert model.mlps[np.int64(-1)] is model.mlps[torch.tensor(7)]
    probabilities = model.attention_probabilities
    for function in (
        lambda i: model.place("layers_output", i),
        lambda i: model.explain("layers_output", i),
        lambda i: model.anatomy.part("mlp", i),
        probabilities.print_source,
        probabilities.check_source,
    ):
        with pytest.raises(IndexError, match="go from -8 to 7"):
            function(8)
    support = model.support()
    assert support.available("layers_output", -1)
    assert support.available("layers_output", np.int64(7))
    assert not support.available("layers_output", 8)
    assert not support.available("layers_output", -9)
    assert model.place("layers_output", -1) == model.place("layers_output", np.int64(7))


def test_components_hold_what_they_were_given():
    made = Component("attention_head_outputs", np.int64(1), (h for h in [0, 1]), positions=iter([0, -1]))
    assert made == Component("attention_head_outputs", 1, (0, 1), (0, -1))
    assert hash(made) == hash(Component("attention_head_outputs", 1, [0, 1], [0, -1]))
    for bad in (True, 1.5, "1", None):
        with pytest.raises(TypeError, match=r"Component\(layer\)"):
            Component("mlps_output", bad)


def test_positions_of_target_prompts():
    for given in ([-1, 2], (-1, 2), np.array([-1, 2]), torch.tensor([-1, 2]), iter([-1, 2])):
        assert TargetPromptBatch.from_prompts(["a", "b"], given).index_to_patch.tolist() == [-1, 2]
    assert TargetPromptBatch.from_prompts(["a", "b"], np.int64(-1)).index_to_patch.tolist() == [-1, -1]
    for bad in ([1.7, 2], torch.tensor([1.7, 2.0]), [True, False], None, slice(0, 2)):
        with pytest.raises(TypeError, match="index_to_patch"):
            TargetPromptBatch.from_prompts(["a", "b"], bad)
