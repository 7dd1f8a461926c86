"""nnterp 2, this repository."""

from __future__ import annotations

import torch

from nnterp import StandardizedTransformer

PACKAGES = ("nnterp-core", "nnsight", "transformers", "torch")
NAME = "nnterp"
PATTERN_IS_LOADED = True


def load(folder, pattern=False):
    kwargs = {"device_map": "cpu", "dtype": torch.float32, "keep_proofs": False}
    if pattern:
        return StandardizedTransformer(str(folder), enable_attention_probs=True, **kwargs)
    return StandardizedTransformer(str(folder), attn_implementation="eager", **kwargs)


def stream(model, ids, layer):
    with torch.no_grad(), model.trace(ids):
        value = model.layers_output[layer].save()
    return value


def readout(model, ids, last):
    with torch.no_grad(), model.trace(ids):
        value = model.project_on_vocab(model.layers_output[last]).save()
    return value


def padded(model, rows, ids, mask, layer):
    with torch.no_grad(), model.trace(rows):
        value = model.layers_output[layer].save()
    return value


def padded_logits(model, rows, ids, mask):
    with torch.no_grad(), model.trace(rows):
        value = model.logits.save()
    return value


def pattern(model, ids, layer):
    with torch.no_grad(), model.trace(ids):
        value = model.attention_probabilities[layer].save()
    return value


def attention(model, ids, layer):
    with torch.no_grad(), model.trace(ids):
        value = model.attentions_output[layer].save()
    return value


def mlp(model, ids, layer):
    with torch.no_grad(), model.trace(ids):
        value = model.mlps_output[layer].save()
    return value


def write(model, ids, layer, vector):
    with torch.no_grad(), model.trace(ids):
        model.steer(layers=layer, steering_vector=vector)
        value = model.logits.save()
    return value


def head(model, ids, layer, index):
    with torch.no_grad(), model.trace(ids):
        model.attention_head_outputs[layer][:, :, index] = 0
        value = model.logits.save()
    return value
