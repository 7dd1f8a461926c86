"""The plain HuggingFace side of the comparisons: torch hooks and HuggingFace's own outputs."""

import inspect
from contextlib import contextmanager
from functools import cache

import torch

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer

LENGTH = 12


def ids(rows=2, length=LENGTH, seed=5):
    return torch.randint(8, 480, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def wrapped(model_type, eager=True, check=False):
    return StandardizedTransformer(
        tiny_model(model_type), tokenizer=tiny_tokenizer(), enable_attention_probs=eager, check_renaming=check
    )


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
