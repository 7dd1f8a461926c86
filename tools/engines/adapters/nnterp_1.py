"""nnterp 1.3, the original, with nnsight 0.7 (it does not import with nnsight 0.8)."""

from __future__ import annotations

from nnterp import StandardizedTransformer

PACKAGES = ("nnterp", "nnsight", "transformers", "torch")
NAME = "nnterp"
PATTERN_IS_LOADED = True


def load(folder, pattern=False):
    if pattern:
        return StandardizedTransformer(str(folder), device_map="cpu", enable_attention_probs=True)
    return StandardizedTransformer(str(folder), device_map="cpu", attn_implementation="eager")


def inputs(ids, mask):
    return {"input_ids": ids, "attention_mask": mask}


def stream(model, ids, layer):
    with model.trace(ids):
        value = model.layers_output[layer].save()
    return value


def readout(model, ids, last):
    with model.trace(ids):
        value = model.project_on_vocab(model.layers_output[last]).save()
    return value


def padded(model, rows, ids, mask, layer):
    with model.trace(inputs(ids, mask)):
        value = model.layers_output[layer].save()
    return value


def padded_logits(model, rows, ids, mask):
    with model.trace(inputs(ids, mask)):
        value = model.logits.save()
    return value


def pattern(model, ids, layer):
    with model.trace(ids):
        value = model.attention_probabilities[layer].save()
    return value


def attention(model, ids, layer):
    with model.trace(ids):
        value = model.attentions_output[layer].save()
    return value


def mlp(model, ids, layer):
    with model.trace(ids):
        value = model.mlps_output[layer].save()
    return value


def write(model, ids, layer, vector):
    with model.trace(ids):
        model.steer(layers=layer, steering_vector=vector)
        value = model.logits.save()
    return value
