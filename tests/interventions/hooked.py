"""Values of every kind, read and replaced by plain torch hooks on one prompt alone: no trace, no engine, no batch."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnterp.values import Sum

from .reference import put, stream

# What the projections that end attention and feed-forward are called in HuggingFace's code.
ATTENTION_ENDS = {"o_proj", "out_proj", "c_proj", "dense"}
FEED_FORWARD_ENDS = {"down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "proj_out", "w2"}

# `model` everywhere is a StandardizedTransformer, of which only `anatomy`, sizes and the HuggingFace module are used.


def ending(model, role, layer):
    """The projection that ends the attention or the feed-forward of a layer."""
    part = model.anatomy.part(role, layer)
    path = part.exit if part.path is None else part.path  # OPT's feed-forward is no module of its own, but two
    if part.path is None:
        return model._module.get_submodule(path)
    names = ATTENTION_ENDS if role == "self_attn" else FEED_FORWARD_ENDS
    found = [m for name, m in model._module.get_submodule(path).named_modules() if name.split(".")[-1] in names]
    assert len(found) == 1, f"{path} has {len(found)} modules called {sorted(names)}"
    return found[0]


def queries_projection(model, layer):
    """The module that makes the queries alone, None where they are made together with others."""
    attention = model._module.get_submodule(model.anatomy.part("self_attn", layer).path)
    named = {name.split(".")[-1]: module for name, module in attention.named_modules()}
    if "q_norm" in named and named["q_norm"].weight.numel() == getattr(named.get("q_proj"), "out_features", 0):
        return named["q_norm"]  # one norm over all heads together, after which they are apart
    return named.get("q_proj")


class Patterns(TorchDispatchMode):
    """Replaces what the softmax of an attention module returns, while that module runs."""

    def __init__(self, function):
        super().__init__()
        self.function, self.inside, self.calls = function, False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.inside and func is torch.ops.aten._softmax.default and result.dim() >= 3:
            self.calls += 1
            seq = result.shape[-2]  # a sink has a column of its own, after the keys
            shown = result[..., :seq] if result.dim() == 4 else result[None, ..., :seq]
            new = self.function(shown)
            return result if new is None else torch.cat([new.view_as(result[..., :seq]), result[..., seq:]], -1)
        return result


@contextlib.contextmanager
def patterns(model, layer, function):
    module = model._module.get_submodule(model.anatomy.part("self_attn", layer).path)
    mode = Patterns(function)
    handles = [
        module.register_forward_pre_hook(lambda *_: setattr(mode, "inside", True)),
        module.register_forward_hook(lambda *_: setattr(mode, "inside", False)),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
    assert mode.calls == 1, f"{mode.calls} softmaxes ran in the attention of layer {layer}"


@contextlib.contextmanager
def before(module, function):
    """`function` of the tensor that a module is given, `[1, seq, ...]`."""

    def hook(_, args, kwargs):
        found = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if found:
            new = function(found[0])
            return None if new is None else (tuple(new if a is found[0] else a for a in args), kwargs)
        key = next(k for k in ("hidden_states", *kwargs) if isinstance(kwargs.get(k), torch.Tensor))
        old = kwargs[key]
        new = function(old)
        return None if new is None else (args, {k: new if v is old else v for k, v in kwargs.items()})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def after(module, function):
    """`function` of the tensor that a module returns when it first runs (Phi's dropout runs twice in a layer)."""
    ran = []

    def hook(_, args, output):
        ran.append(True)
        if len(ran) > 1:
            return None
        new = function(stream(output))
        return None if new is None else put(output, new)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def added(model, terms, constant, function):
    """`function` of a sum of multiples of what modules return; what changes is put into the last of them."""
    seen = []
    with contextlib.ExitStack() as stack:
        for path, factor in terms[:-1]:
            stack.enter_context(
                after(model._module.get_submodule(path), lambda x, factor=factor: seen.append(x * factor))
            )

        def last(x):
            total = sum(seen, x * terms[-1][1])
            if constant is not None:
                total = total + constant
            new = function(total)
            return None if new is None else x + (new - total) / terms[-1][1]

        stack.enter_context(after(model._module.get_submodule(terms[-1][0]), last))
        yield


def heads_of(model, function):
    """A function of heads `[1, seq, heads, head_dim]` as one of `[1, seq, heads * head_dim]`."""

    def flat(x):
        new = function(x.reshape(1, -1, model.num_heads, x.shape[-1] // model.num_heads))
        return None if new is None else new.reshape(x.shape)

    return flat


def batched(function):
    """A function of `[1, seq, ...]` that may be handed `[seq, ...]`: OPT's feed-forward has no axis for the batch."""

    def shaped(x):
        if x.dim() > 2:
            return function(x)
        new = function(x[None])
        return None if new is None else new[0]

    return shaped


def hooked(model, name, layer, function):
    """A context in which `function` is called on a value `[1, ...]`; what it returns, unless None, replaces it."""
    if name == "attention_probabilities":
        return patterns(model, layer, function)
    if name == "attention_head_outputs":
        return before(ending(model, "self_attn", layer), heads_of(model, function))
    if name == "mlp_neurons":
        return before(ending(model, "mlp", layer), batched(function))
    if name == "attention_queries":
        return after(queries_projection(model, layer), heads_of(model, function))
    place = model.place(name, layer)
    if isinstance(place, Sum):
        return added(model, place.terms, place.constant, batched(function))
    module = model._module.get_submodule(place.path)
    return (after if place.side == "output" else before)(module, batched(function))


@torch.no_grad()
def run(model, prompt, edits=()):
    """Next-token logits `[vocab]` of one prompt of token ids, under (value, layer, function)s."""
    with contextlib.ExitStack() as stack:
        for name, layer, function in edits:
            stack.enter_context(hooked(model, name, layer, function))
        return model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()


def value(model, prompt, name, layer):
    """A value of one prompt, without the batch."""
    kept = []
    run(model, prompt, [(name, layer, lambda x: kept.append(x[0].clone()))])
    return kept[-1]


def values_of(model, prompt, name, layers):
    """layer → a value of one prompt, without the batch, all of them from one run."""
    kept = {}
    run(model, prompt, [(name, layer, lambda x, at=layer: kept.__setitem__(at, x[0].clone())) for layer in layers])
    return kept


def setting(index, new):
    """A function that puts `new` at an index of a value without its batch."""

    def function(x):
        x = x.clone()
        x[0][index] = new
        return x

    return function


def gradients_of_weights(module):
    """What a call leaves as it was: whether each weight takes part in gradients, and the gradient that it holds."""
    return [(p.requires_grad, None if p.grad is None else (id(p.grad), p.grad._version)) for p in module.parameters()]
