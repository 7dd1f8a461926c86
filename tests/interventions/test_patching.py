"""Activation patching against one plain forward pass with a torch hook per cell."""

import pytest
import torch

from nnterp.errors import InsideTraceError, Unavailable
from nnterp.interventions import (
    PatchingResult,
    Result,
    activation_patching,
    attribution_patching,
    kl_divergence,
    logit_difference,
    probability_difference,
    target_probability,
)
from nnterp.positions import at, last_of
from nnterp.values import get_value, read_value, write_value

from .reference import ARCHITECTURES, ids_of, logits_with, overwrite, states

CLEAN = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15, 180, 222], [33, 70, 91]]
CORRUPTED = [[11, 42, 99, 93, 130, 201], [61, 77, 101, 15, 181, 222], [34, 70, 92]]
PAIR = ("Mary and John went to the store, John gave a drink to", "Tom and John went to the store, John gave a drink to")


def difference(logits, good=5, bad=9):
    return logits[good] - logits[bad]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_residual_stream_by_layer_and_position(tiny, model_type):
    model = tiny(model_type)
    found = activation_patching(model, CLEAN[1:], CORRUPTED[1:], logit_difference(5, 9))
    assert found.axes["scores"] == ("prompts", "layers", "positions")
    assert found["scores"].shape == (2, model.num_layers, 6)
    for i, (clean, corrupted) in enumerate(zip(CLEAN[1:], CORRUPTED[1:], strict=True)):
        source = states(model, clean)
        assert found["clean"][i].item() == pytest.approx(difference(logits_with(model, clean)[-1]).item(), abs=1e-4)
        for layer in range(model.num_layers):
            for p in range(len(clean)):
                edit = ("layers_output", layer, overwrite(p, source[layer][p]))
                expected = difference(logits_with(model, corrupted, [edit])[-1])
                assert found["scores"][i, layer, p].item() == pytest.approx(expected.item(), abs=2e-4), (layer, p)
    assert found["scores"][1, :, 3:].isnan().all()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("value", ["attentions_output", "mlps_output", "layers_input"])
def test_both_directions_and_several_values(tiny, direction, value):
    model = tiny("gemma2")
    found = activation_patching(
        model,
        CLEAN[0],
        CORRUPTED[0],
        target_probability(5),
        ["layers_output", value],
        direction=direction,
        batch_size=5,
    )
    assert found.axes["scores"] == ("prompts", "values", "layers", "positions")
    into, source = (CORRUPTED[0], CLEAN[0]) if direction == "denoising" else (CLEAN[0], CORRUPTED[0])
    given = states(model, source, value)
    for layer in range(model.num_layers):
        for p in range(6):
            logits = logits_with(model, into, [(value, layer, overwrite(p, given[layer][p]))])[-1]
            assert found["scores"][0, 1, layer, p].item() == pytest.approx(logits.softmax(-1)[5].item(), abs=1e-5)
    scale = found.normalized()["scores"]
    low, high = (found["corrupted"], found["clean"])[:: 1 if direction == "denoising" else -1]
    torch.testing.assert_close(scale, (found["scores"] - low) / (high - low))
    assert scale[0, 0, -1, -1].item() == pytest.approx(1, abs=1e-4), "the last state of the last layer is everything"


def by_trace(model, name, layer, into, source, index):
    """One cell by hand: read in one trace, written in another, both plain."""
    value = get_value(name)
    with torch.no_grad(), model.trace(torch.tensor([source])):
        given = read_value(model, value, layer).clone().save()
    with torch.no_grad(), model.trace(torch.tensor([into])):
        new = read_value(model, value, layer).clone()
        new[index] = given[index]
        write_value(model, value, new, layer)
        logits = model.logits[0, -1].float().save()
    return logits


def test_heads_at_positions_and_neurons(tiny):
    model = tiny("llama")
    both = activation_patching(
        model, CLEAN[0], CORRUPTED[0], logit_difference(5, 9), "attention_head_outputs", [1], [2, -1], [0, 3]
    )
    assert both.axes["scores"] == ("prompts", "layers", "heads", "positions")
    for h, head in enumerate((0, 3)):
        for k, p in enumerate((2, 5)):
            logits = by_trace(model, "attention_head_outputs", 1, CORRUPTED[0], CLEAN[0], (slice(None), p, head))
            assert both["scores"][0, 0, h, k].item() == pytest.approx(difference(logits).item(), abs=2e-4)
    neurons = activation_patching(
        model, CLEAN[0], CORRUPTED[0], logit_difference(5, 9), "mlp_neurons", [2], heads=[0, 7, 50]
    )
    for k, neuron in enumerate((0, 7, 50)):
        logits = by_trace(model, "mlp_neurons", 2, CORRUPTED[0], CLEAN[0], (slice(None), slice(None), neuron))
        assert neurons["scores"][0, 0, k].item() == pytest.approx(difference(logits).item(), abs=2e-4)


INSIDE = ["attention_queries", "attention_keys", "attention_values", "attention_head_contributions"]
ADDED = ["attention_contributions", "mlp_contributions", "layers_mid", "mlp_neurons"]


CASES = [(m, n) for n in INSIDE for m in ("gpt2", "gemma2", "qwen3", "bloom", "falcon", "gpt_neox")]
CASES += [(m, n) for n in ADDED for m in ("gpt2", "gemma2", "granite", "falcon")]


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_other_values(tiny, model_type, name):
    model = tiny(model_type)
    if name == "layers_mid" and model_type == "falcon":  # a parallel block
        with pytest.raises(Unavailable):
            activation_patching(model, CLEAN[0], CORRUPTED[0], logit_difference(5, 9), name)
        return
    found = activation_patching(model, CLEAN[0], CORRUPTED[0], logit_difference(5, 9), name, [0, -1], [2, 5])
    for a, layer in enumerate((0, model.num_layers - 1)):
        for k, p in enumerate((2, 5)):
            logits = by_trace(model, name, layer, CORRUPTED[0], CLEAN[0], (slice(None), p))
            assert found["scores"][0, a, k].item() == pytest.approx(difference(logits).item(), abs=2e-4)


def test_text_positions_in_prompts_of_different_lengths(tiny, tmp_path):
    model = tiny("llama")
    clean, corrupted = "The tower of Pisa is in", "The great tower of Oslo is in"
    columns = [last_of("tower"), at("is in"), -1]
    found = activation_patching(model, clean, corrupted, logit_difference(5, 9), positions=columns)
    assert found.labels["positions"] == ("last_of('tower')", "at('is in')", -1)
    source = states(model, clean)
    clean_ids, ids = (ids_of(model, text)[0].tolist() for text in (clean, corrupted))
    text = model.tokenizer(corrupted, return_offsets_mapping=True)["offset_mapping"]
    begin = corrupted.index("tower")
    p = max(i for i, (a, b) in enumerate(text) if a < begin + 5 and b > begin)
    q = p - (len(ids) - len(clean_ids))
    edit = ("layers_output", 1, overwrite(p, source[1][q]))
    assert found["scores"][0, 1, 0].item() == pytest.approx(
        difference(logits_with(model, ids, [edit])[-1]).item(), abs=2e-4
    )
    found.save(tmp_path / "patching")
    again = Result.load(tmp_path / "patching")
    assert isinstance(again, PatchingResult)
    assert torch.equal(again["scores"], found["scores"])
    frame = found.to_dataframe()
    assert len(frame) == model.num_layers * 3
    assert {"prompt", "layer", "position", "token", "scores"} <= set(frame.columns)


def test_own_metric_and_divergence(tiny):
    model = tiny("llama")
    own = activation_patching(model, CLEAN[:2], CORRUPTED[:2], lambda logits: logits[:, 5] - logits[:, 9])
    named = activation_patching(model, CLEAN[:2], CORRUPTED[:2], logit_difference([5, 5], [[9], [9]]))
    torch.testing.assert_close(own["scores"], named["scores"])
    divergence = activation_patching(model, CLEAN[:2], CORRUPTED[:2], kl_divergence())
    assert divergence["clean"].abs().max() < 1e-5
    for i in range(2):
        a, b = (logits_with(model, p)[-1].log_softmax(-1) for p in (CLEAN[i], CORRUPTED[i]))
        assert divergence["corrupted"][i].item() == pytest.approx((a.exp() * (a - b)).sum().item(), rel=1e-3)
        assert divergence["scores"][i, -1, -1].abs() < 1e-4


def test_a_token_named_twice_has_its_probability_once(tiny):
    model = tiny("llama")
    logits = torch.randn(2, model.vocab_size, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    bound = target_probability([[5, 9, 5]]).bind(model, 1, logits)
    torch.testing.assert_close(bound(logits, 0), probs[:, 5] + probs[:, 9])
    bound = probability_difference([[5, 5]], [[9, 9, 7]]).bind(model, 1, logits)
    torch.testing.assert_close(bound(logits, 0), probs[:, 5] - probs[:, 9] - probs[:, 7])


def test_many_pairs_are_held_a_few_at_a_time(tiny, monkeypatch):
    from nnterp.interventions import _patching

    model = tiny("llama")
    whole = activation_patching(model, CLEAN, CORRUPTED, logit_difference([5, 6, 7], [8, 9, 10]))
    monkeypatch.setattr(_patching, "PAIRS", 1)
    single = activation_patching(model, CLEAN, CORRUPTED, logit_difference([5, 6, 7], [8, 9, 10]))
    torch.testing.assert_close(single["scores"], whole["scores"], equal_nan=True, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(single["clean"], whole["clean"], atol=1e-4, rtol=1e-4)


def test_pairs_of_equal_prompts_are_named(tiny):
    model, metric = tiny("gpt2"), logit_difference(5, 9)
    with pytest.warns(UserWarning, match=r"the same in 1 of 3 pairs \(index 1\): patching between them"):
        found = activation_patching(model, CLEAN, [CORRUPTED[0], CLEAN[1], CORRUPTED[2]], metric, positions=-1)
    assert found["scores"][1].allclose(found["clean"][1])
    assert found.normalized()["scores"][1].isnan().all()
    with pytest.warns(UserWarning, match="the same in 1 of 1 pairs"):
        attribution_patching(model, CLEAN[:1], CLEAN[:1], metric, audit=0)


def test_bad_input(tiny):
    model = tiny("llama")
    metric = logit_difference(5, 9)
    for match, arguments in {
        "they go in pairs": {"clean": CLEAN, "corrupted": CORRUPTED[:2]},
        "their positions do not correspond": {"clean": CLEAN[0], "corrupted": CORRUPTED[2]},
        "direction is": {"direction": "sideways"},
        "no value called": {"values": "layer_outputs"},
        "none for heads": {"heads": [0]},
        "not a value of layers": {"values": "token_embeddings"},
        "positions are indices": {"positions": "some"},
        "heads are indices": {"heads": "every", "values": "attention_head_outputs"},
        "returned": {"metric": lambda logits: logits.sum()},
        "tokens": {"metric": logit_difference("certainly several tokens", 3)},
        "batch_size": {"batch_size": 0},
    }.items():
        given = {"clean": CLEAN[0], "corrupted": CORRUPTED[0], "metric": metric} | arguments
        with pytest.raises(ValueError, match=match):
            activation_patching(model, **given)
    with pytest.raises(TypeError, match="A metric is"):
        activation_patching(model, CLEAN[0], CORRUPTED[0], "kl")
    with pytest.raises(IndexError, match="heads=9"):
        activation_patching(model, CLEAN[0], CORRUPTED[0], metric, "attention_head_outputs", heads=[9])
    with pytest.raises(IndexError, match="no position 6"):
        activation_patching(model, CLEAN[0], CORRUPTED[0], metric, positions=[6])
    with pytest.raises(InsideTraceError), model.trace("Hi"):
        activation_patching(model, CLEAN[0], CORRUPTED[0], metric)


def test_units_are_counted_not_believed(tiny):
    """LFM2's feed-forward is wider than its config says."""
    model = tiny("lfm2")
    width = model._module.model.layers[0].feed_forward.w2.in_features
    assert width != model.intermediate_size
    found = activation_patching(model, CLEAN[0], CORRUPTED[0], lambda x: x[:, 5], "mlp_neurons", [0], heads=[-1])
    assert found.labels["heads"] == (width - 1,)
    with pytest.raises(IndexError, match=f"has {width} neurons"):
        activation_patching(model, CLEAN[0], CORRUPTED[0], lambda x: x[:, 5], "mlp_neurons", heads=[width])
