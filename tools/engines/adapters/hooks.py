"""Plain PyTorch hooks, as written for the module names of Llama, which most model types of transformers share."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM

PACKAGES = ("transformers", "torch")
NAME = "transformers"


def load(folder, pattern=False):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@contextmanager
def hooked(module, hook, before=False):
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def first(output):
    return output[0] if isinstance(output, tuple) else output


def output_of(model, module, **inputs):
    kept = []
    with hooked(module, lambda _, args, output: kept.append(first(output))):
        model(**inputs)
    return kept[0]


def stream(model, ids, layer):
    return output_of(model, model.model.layers[layer], input_ids=ids)


def readout(model, ids, last):
    return model.lm_head(model.model.norm(stream(model, ids, last)))


def padded(model, rows, ids, mask, layer):
    return output_of(model, model.model.layers[layer], input_ids=ids, attention_mask=mask)


def padded_logits(model, rows, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits


def pattern(model, ids, layer):
    return model(input_ids=ids, output_attentions=True).attentions[layer]


def attention(model, ids, layer):
    return output_of(model, model.model.layers[layer].self_attn, input_ids=ids)


def mlp(model, ids, layer):
    return output_of(model, model.model.layers[layer].mlp, input_ids=ids)


def write(model, ids, layer, vector):
    def add(_, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    with hooked(model.model.layers[layer], add):
        return model(input_ids=ids).logits


def head(model, ids, layer, index):
    def silence(_, args):
        z = args[0].clone()
        z.unflatten(-1, (model.config.num_attention_heads, -1))[..., index, :] = 0
        return (z, *args[1:])

    with hooked(model.model.layers[layer].self_attn.o_proj, silence, before=True):
        return model(input_ids=ids).logits
