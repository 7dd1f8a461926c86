"""Slow and plain references: one prompt, one forward pass, one torch hook per intervention."""

from __future__ import annotations

import contextlib

import torch

from nnterp.values import get_value, site_of

from .. import models

# Architectures of different build: sequential, parallel, post-norm, scaled, capped, mixtures of experts, windows,
# latent attention, state spaces, hybrids, no final norm, layers that return tuples.
ARCHITECTURES = """
gpt2 llama gemma gemma2 gemma3_text mistral mixtral qwen2 qwen3 qwen3_moe phi phi3 gpt_neox gptj gpt_neo opt bloom
falcon mpt codegen cohere cohere2 granite granitemoe olmo olmo2 stablelm starcoder2 mamba mamba2 jamba lfm2
deepseek_v3 glm4 nemotron xglm gpt_bigcode smollm3 biogpt openai-gpt ministral bamba
""".split()


WITHOUT_ATTENTION = {"mamba", "mamba2"}


def eager(kind):
    """A tiny model with attention probabilities, where it has attention; the tests of one process share it."""
    return models.tiny(kind) if kind in WITHOUT_ATTENTION else models.eager(kind)


def stream(output):
    """The tensor a module hands on."""
    return output if isinstance(output, torch.Tensor) else output[0]


def put(output, tensor):
    """A module's output with its tensor replaced."""
    return tensor if isinstance(output, torch.Tensor) else type(output)((tensor, *output[1:]))


@contextlib.contextmanager
def hooks(model, edits):
    """`edits`: (value name, layer, function of the `[1, seq, ...]` tensor that returns its replacement or None)."""
    handles = []
    for name, layer, function in edits:
        site = site_of(get_value(name), model.anatomy, layer)
        module = model._module.get_submodule(site.path)
        if site.side == "output":

            def after(_, args, output, function=function):
                new = function(stream(output))
                return None if new is None else put(output, new)

            handles.append(module.register_forward_hook(after))
        else:

            def before(_, args, kwargs, function=function):
                found = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
                if found:
                    new = function(found[0])
                    return None if new is None else (tuple(new if a is found[0] else a for a in args), kwargs)
                key = next(k for k in ("hidden_states", *kwargs) if isinstance(kwargs.get(k), torch.Tensor))
                new = function(kwargs[key])
                return None if new is None else (args, {**kwargs, key: new})

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ids_of(model, prompt):
    """Token ids of one prompt, `[1, seq]`."""
    return model.tokenizer(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else torch.tensor([prompt])


@torch.no_grad()
def logits_with(model, prompt, edits=()):
    """`[seq, vocab]` logits of one prompt alone under some hooks, in float32."""
    with hooks(model, edits):
        return model._module(input_ids=ids_of(model, prompt), use_cache=False).logits[0].float()


def probs_with(model, prompt, edits=(), position=-1):
    """Next-token probabilities of one prompt alone under some hooks, `[vocab]`."""
    return logits_with(model, prompt, edits)[position].softmax(-1)


def states(model, prompt, name="layers_output"):
    """A value at every layer for one prompt alone, a list of `[seq, ...]`."""
    kept = {}
    edits = [
        (name, layer, lambda x, layer=layer: kept.__setitem__(layer, x[0].clone())) for layer in range(model.num_layers)
    ]
    logits_with(model, prompt, edits)
    return [kept[layer] for layer in range(model.num_layers)]


def overwrite(position, new):
    """A hook function that puts `new` at one position."""

    def function(tensor):
        tensor = tensor.clone()
        view = tensor if tensor.dim() == 2 else tensor[0]  # OPT's feed-forward has batch and positions in one axis
        view[position] = new
        return tensor

    return function
