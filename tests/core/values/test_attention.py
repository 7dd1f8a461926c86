"""Attention's inside on every architecture: served, and equal to HuggingFace's own (see also test_plain_attention)."""

import pytest
import torch

from nnterp.errors import Unavailable
from nnterp.testing import model_types

from ...looped_modeling import LOOPED
from .values_reference import LENGTH, arguments, attentions, hooked, ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

NO_RESIDUAL_STREAM = {"xlm"}  # models whose layers nnterp refuses to name
NO_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm", "longcat_flash"}
TYPES = [t for t in model_types() if t not in NO_RESIDUAL_STREAM | LOOPED | NO_ATTENTION]

# What no place serves, with the reason in words of the model's own code.
UNSERVED = {
    "reformer": {
        "attention_probabilities",
        "attention_queries",
        "attention_keys",
        "attention_values",
        "attention_head_outputs",
    },
}
# HuggingFace returns other tensors, or none, as this model's attentions.
NOT_RETURNED = set()
# A norm over all heads stands between them and W_O.
NORMED_ACROSS_HEADS = {"bitnet"}


def have(model, name):
    layers = []
    for layer in model.attention_layers:
        try:
            model.place(name, layer)
            layers.append(layer)
        except Unavailable:
            continue
    return layers


def read(model, name, layer, tokens):
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        value = getattr(model, name)[layer].clone().save()
    return value


@pytest.mark.parametrize("model_type", TYPES)
def test_every_value_is_served(model_type):
    model = wrapped(model_type)
    for name in (
        "attention_probabilities",
        "attention_queries",
        "attention_keys",
        "attention_values",
        "attention_head_outputs",
    ):
        if name in UNSERVED.get(model_type, ()):
            assert not have(model, name)
        else:
            assert have(model, name) == list(model.attention_layers), name


@pytest.mark.parametrize("model_type", [t for t in TYPES if t != "reformer"])
def test_probabilities_equal_huggingface(model_type):
    model, tokens = wrapped(model_type), ids()
    own = attentions(model._module, tokens)
    layers = have(model, "attention_probabilities")
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        probs = [model.attention_probabilities[i].clone() for i in layers]
        probs.save()
    for p in probs:
        assert (p >= 0).all()
        assert (p.double().sum(-1) < 1 + 1e-5).all()
    if own is None or model_type in NOT_RETURNED:
        return
    assert len(own) >= len(probs)
    if model.anatomy.other_stacks:  # HuggingFace returns those of several stacks, in the order in which they run
        own = own[-len(layers) :]
    for layer, p in zip(layers, probs, strict=True):
        index = layers.index(layer) if len(own) == len(layers) else layer
        theirs = own[index]
        theirs = theirs.reshape(p.shape) if theirs.dim() == 3 else theirs
        if model_type == "cpmant":  # HuggingFace cuts off the prompt of trained positions that it puts in front
            p = p[..., -LENGTH:, -LENGTH:]
        torch.testing.assert_close(p, theirs[..., : p.shape[-1]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", [t for t in TYPES if "attention_head_outputs" not in UNSERVED.get(t, ())])
def test_head_outputs_are_probabilities_times_values(model_type):
    """z, from a plain hook on W_O, is what the probabilities make of the values, up to a gate on the heads."""
    model, tokens = wrapped(model_type), ids()
    module = model._module
    layer = have(model, "attention_head_outputs")[-1]
    inside = model.facts.inside.attention[layer]
    z = read(model, "attention_head_outputs", layer, tokens)
    if inside.out is not None:
        out = inside.out if inside.before_out is None else inside.before_out[0]
        with hooked(module, z=(out, "input")) as plain, torch.no_grad():
            module(**arguments(module, tokens))
        assert torch.equal(z.flatten(2), plain["z"].reshape(z.shape).flatten(2))
    else:
        # Experts, an einsum with a parameter, or a projection that runs once a stream follows the heads.
        assert model_type in ("jetmoe", "xlnet", "prophetnet")

    with torch.no_grad(), model.trace(tokens, use_cache=False):
        first = model.attention_probabilities[layer]
        model.attention_probabilities[layer] = torch.cat([torch.zeros_like(first[:, :1]), first[:, 1:]], dim=1)
        changed = model.attention_head_outputs[layer].clone().save()
    assert (changed - z)[:, :, 0].abs().max() > 1e-4
    others, were = changed[:, :, 1:].double(), z[:, :, 1:].double()
    if model_type in NORMED_ACROSS_HEADS:  # the other heads are rescaled together, and keep their directions
        others = others / others.flatten(2).norm(dim=-1)[..., None, None]
        were = were / were.flatten(2).norm(dim=-1)[..., None, None]
    assert (others - were).abs().max() < 1e-5, "writing one head's probabilities moved another head's output"


@pytest.mark.parametrize("name", ["attention_queries", "attention_keys", "attention_values", "attention_head_outputs"])
def test_writes_of_xlnet(name):
    """Its attention is made of einsums, sequence first, which test_plain_attention does not follow."""
    model, tokens = wrapped("xlnet", eager=False, check=True), ids()
    layer, position = have(model, name)[0], 6
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        new = getattr(model, name)[layer].clone().save()
        new[:, position] = new[:, position].roll(1, -1) * 1.5
        getattr(model, name)[layer] = new
        changed = model.attentions_output[layer].clone().save()
    moved = (changed - read(model, "attentions_output", layer, tokens)).abs().amax(dim=(0, 2))
    assert new.shape[:2] == (2, LENGTH)
    assert moved[position] > 1e-5
    if name in ("attention_queries", "attention_head_outputs"):
        assert moved[position + 1 :].max() < 1e-5
        assert moved[:position].max() < 1e-5
