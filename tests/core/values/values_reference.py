"""The plain HuggingFace side of the comparisons: torch hooks and HuggingFace's own outputs."""

import inspect
from contextlib import contextmanager
from functools import cache

import torch

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.values import reads, when

from ... import models

LENGTH = 12


def ids(rows=2, length=LENGTH, seed=5):
    return torch.randint(8, 480, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def unproven(model_type, eager):
    return StandardizedTransformer(
        tiny_model(model_type), tokenizer=tiny_tokenizer(), enable_attention_probs=eager, check_renaming=False
    )


def wrapped(model_type, eager=True, check=False):
    """A tiny model, shared by the tests of one process: proven, or not even looked at."""
    if not check:
        return unproven(model_type, eager)
    return models.eager(model_type) if eager else models.tiny(model_type)


def in_order(model, asked):
    """Lists of what is asked for, (name, layer); a forward pass comes to those of one list one after the other."""
    spans = {}
    for name, layer in asked:
        times = [when(model, place) for place in reads(model, model.place(name, layer))[0]]
        spans[name, layer] = min(times), max(times)
    left, passes = sorted(spans, key=lambda one: spans[one][::-1]), []
    while left:
        taken, now = [], -1
        for one in left:
            if spans[one][0] >= now:
                taken.append(one)
                now = spans[one][1]
        passes.append(taken)
        left = [one for one in left if one not in taken]
    return passes


def read(model, asked, tokens):
    """(name, layer) → its value, for all that is asked for, in as few forward passes as their order allows."""
    found = {}
    for taken in in_order(model, asked):
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            values = {}
            values.save()
            for name, layer in taken:
                values[name, layer] = getattr(model, name)[layer].clone()
        found |= values
    return found


def arguments(module, tokens, **kwargs):
    accepts = inspect.signature(module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepts.values())
    cache_off = {"use_cache": False} if "use_cache" in accepts or open_ended else {}
    return {"input_ids": tokens, **cache_off, **kwargs}


def attentions(module, tokens):
    """HuggingFace's own attention probabilities, one per attention layer; None if the model returns none."""
    with torch.no_grad():
        try:
            found = module(**arguments(module, tokens, output_attentions=True)).attentions
        except Exception:
            return None
    if found is None:
        return None
    found = [a for a in found if isinstance(a, torch.Tensor)]
    return found or None


@contextmanager
def hooked(module, **kept):
    """`hooked(module, z=("path", "input"))` → dict filled by plain torch hooks while the block runs."""
    values, handles = {}, []

    def tensor(x):
        x = x[0] if isinstance(x, (tuple, list)) else x
        return x.detach().clone()

    for name, (path, side) in kept.items():
        target = module.get_submodule(path)
        if side == "input":

            def before(_, args, kwargs, name=name):
                values[name] = tensor(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))

            handles.append(target.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_, args, out, name=name):
                values[name] = tensor(out)

            handles.append(target.register_forward_hook(after))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
