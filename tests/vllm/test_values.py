"""Every value that is read and written in vLLM, against HuggingFace's own model in another process."""

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.errors import OutsideTraceError, ShapeError, Unavailable
from nnterp.table import VALUES

from .reference import PROMPTS, WRITTEN, edited

PER_LAYER = (
    "layers_input attentions_input attention_queries attention_keys attention_values attention_head_outputs "
    "attentions_output layers_mid mlps_input mlp_neurons mlps_output layers_output"
).split()
WHOLE = ("token_embeddings", "ln_final_output")


def close(mine, theirs, scale=None):
    """Equal to a thousandth of the value's size."""
    mine, theirs = mine.double(), theirs.double()
    assert (mine - theirs).abs().max() <= 1e-3 * (theirs.abs().max() if scale is None else scale)


def as_read(model, name, tensor):
    """A recorded tensor in the shape in which a value is shown."""
    heads = {"attention_head_outputs": model.parts.blocks[0].heads}.get(name)
    return tensor if heads is None else tensor.unflatten(-1, (heads, -1))


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_value_of_a_layer_is_that_of_huggingface(model, reference, name):
    there = [layer for value, layer in reference["read"][0] if value == name]
    assert list(model.support()[name]) == there
    if not there:
        with pytest.raises(Unavailable, match="mixture"):
            model.place(name, 0)
        return
    for ids, read in zip(PROMPTS, reference["read"], strict=True):
        with model.trace(list(ids)):
            found = {}
            found.save()
            for layer in there:
                found[layer] = getattr(model, name)[layer]
        for layer in there:
            theirs = as_read(model, name, read[name, layer])
            assert found[layer].shape == theirs.shape
            close(found[layer], theirs)


@pytest.mark.parametrize("name", WHOLE)
def test_a_value_of_the_model_is_that_of_huggingface(model, reference, name):
    for ids, read in zip(PROMPTS, reference["read"], strict=True):
        with model.trace(list(ids)):
            found = getattr(model, name).save()
        close(found, read[name, None])


def test_logits_of_all_positions_and_next_token_probs(model, reference):
    for ids, logits in zip(PROMPTS, reference["logits"], strict=True):
        with model.trace(list(ids)):
            given = model.input_ids.save()
            every = model.logits.save()
            after = model.next_token_probs.save()
        assert given.tolist() == [list(ids)]
        close(every[0], logits)
        close(after[0], logits[-1].softmax(-1))


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_write_of_a_layer_has_the_effect_it_has_in_huggingface(model, reference, name):
    if (name, WRITTEN) not in reference["written"]:
        pytest.skip("this model does not have it")
    with model.trace(list(PROMPTS[0])):
        getattr(model, name)[WRITTEN] = edited(getattr(model, name)[WRITTEN])
        logits = model.logits.save()
    theirs = reference["written"][name, WRITTEN]
    assert (theirs - reference["logits"][0]).abs().max() > 1e-2 * theirs.abs().max()  # it has one
    close(logits[0], theirs)


@pytest.mark.parametrize("name", WHOLE)
def test_a_write_of_the_model_has_the_effect_it_has_in_huggingface(model, reference, name):
    with model.trace(list(PROMPTS[0])):
        setattr(model, name, edited(getattr(model, name)))
        logits = model.logits.save()
    close(logits[0], reference["written"][name, None])


def test_several_invokes_each_have_their_own_prompt(model, reference):
    with model.trace() as tracer:
        with tracer.invoke(list(PROMPTS[0])):
            first = model.logits.save()
        with tracer.invoke(list(PROMPTS[1])):
            model.layers_output[1] = model.layers_output[1] * 3
            model.logits.save()
        with tracer.invoke(list(PROMPTS[2])):
            third = model.logits.save()
    close(first[0], reference["logits"][0])
    close(third[0], reference["logits"][2])


def test_what_is_read_stays_as_it_was(model, reference):
    """vLLM writes over what modules return."""
    with model.trace(list(PROMPTS[0])):
        kept = model.layers_output[0].save()
        kept *= 2  # a copy: the run does not change
        logits = model.logits.save()
    close(kept, 2 * reference["read"][0]["layers_output", 0])
    close(logits[0], reference["logits"][0])


def test_writing_logits_changes_what_is_sampled(model):
    with model.trace(list(PROMPTS[0])) as tracer:
        new = torch.zeros_like(model.next_token_logits)
        new[0, 123] = 50.0
        model.next_token_logits = new
        result = tracer.result.save()
    assert list(result.outputs[0].token_ids) == [123]


def test_what_vllm_cannot_do_is_refused_at_once_and_the_engine_goes_on(model, reference):
    for name in ("attention_probabilities", "attention_scores"):
        with pytest.raises(Unavailable, match="fused kernel"):
            model.place(name, 0)
    with pytest.raises(OutsideTraceError):
        model.layers_output[0]
    with pytest.raises(OutOfOrderError), model.trace(list(PROMPTS[0])):
        late = model.layers_output[2]
        early = model.layers_output[1].save()
        late + early
    with pytest.raises(ShapeError, match="cannot replace"), model.trace(list(PROMPTS[0])):
        model.layers_output[1] = torch.zeros(1, 2, 3)
    with pytest.raises(Unavailable, match="fused kernel"), model.trace(list(PROMPTS[0])):
        model.attention_probabilities[0].save()
    with pytest.raises(NotImplementedError, match="barrier"), model.trace() as tracer:
        tracer.barrier(2)
        with tracer.invoke(list(PROMPTS[0])):
            model.logits.save()
    with model.trace(list(PROMPTS[0])):
        logits = model.logits.save()
    close(logits[0], reference["logits"][0])


def test_support_names_every_value(model):
    assert set(model.support()) == set(VALUES)
