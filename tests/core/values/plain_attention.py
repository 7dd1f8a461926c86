"""Attention as a plain HuggingFace forward computes it: the torch functions it calls, recorded or edited on the way.

Nothing of nnterp or nnsight takes part. A model computes softmax attention by calling either
`scaled_dot_product_attention(q, k, v)`, or a matrix product of q and k, a softmax, and a matrix product with v. Torch
hands every call of its functions to a `TorchFunctionMode`, so that q, k, v, the scores, the probabilities and what they
average are the arguments and results of these calls, whatever the model's own code looks like.
"""

from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

SOFTMAX = {"softmax", "_softmax"}
PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm"}


@dataclass
class Call:
    """One attention of one layer: tensors as `[batch, heads, positions, ...]`."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    z: torch.Tensor | None = None


class PlainAttention(TorchFunctionMode):
    """Records the attentions of each layer while a plain model runs, and edits them.

    Args:
        layers: The modules of the layers.
        rows, length: The batch.
        edits: "q", "k", "v", "scores", "probs" or "z" → a function of the tensor as `[batch, heads, positions, ...]`,
            for the attentions of layer `where`.
        number: Which of its attentions alone, if it has several.
    """

    def __init__(self, layers, rows, length, edits=None, where=0, number=None):
        super().__init__()
        self.layers, self.rows, self.length = layers, rows, length
        self.edits, self.where, self.number = edits or {}, where, number
        self.calls = {i: [] for i in range(len(layers))}
        self.products = []
        self.layer = None

    def __enter__(self):
        def enter(index):
            def hook(*_):
                self.layer, self.products = index, []

            return hook

        def leave(*_):
            self.layer = None

        self.handles = [m.register_forward_pre_hook(enter(i)) for i, m in enumerate(self.layers)]
        self.handles += [m.register_forward_hook(leave) for m in self.layers]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if self.layer is None:
            return function(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self.fused(function, args, kwargs)
        if name in SOFTMAX:
            return self.softmax(function, args, kwargs)
        if name in PRODUCTS:
            return self.product(function, name, args, kwargs)
        return function(*args, **kwargs)

    def edited(self, what, tensor):
        done = len(self.calls[self.layer]) - (what in ("v", "z") and self.unfinished())
        here = self.layer == self.where and self.number in (None, done)
        edit = self.edits.get(what) if here else None
        return tensor if edit is None else edit(self.by_head(tensor)).reshape(tensor.shape)

    def unfinished(self):
        """Whether a softmax has run whose product with the values is still to come."""
        calls = self.calls[self.layer]
        return bool(calls) and calls[-1].z is None

    def by_head(self, tensor):
        return tensor if tensor.dim() == 4 else tensor.reshape(self.rows, -1, *tensor.shape[1:])

    def fused(self, function, args, kwargs):
        kwargs = dict(kwargs)
        q, k, v, *rest = args if len(args) >= 3 else [kwargs.pop(n) for n in ("query", "key", "value")]
        if q.shape[-2] < self.length:  # attention over something else than positions
            return function(q, k, v, *rest, **kwargs)
        q, k, v = self.edited("q", q), self.edited("k", k), self.edited("v", v)
        out = self.edited("z", function(q, k, v, *rest, **kwargs))
        self.calls[self.layer].append(Call(q=q.clone(), k=k.clone(), v=v.clone(), z=out.clone()))
        return out

    def is_pattern(self, tensor):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() not in (3, 4):
            return False
        lead = tensor.shape[0] == self.rows if tensor.dim() == 4 else tensor.shape[0] > self.rows
        return lead and tensor.shape[-2] >= self.length and tensor.shape[-1] >= tensor.shape[-2]

    def softmax(self, function, args, kwargs):
        given, *rest = args
        if not self.is_pattern(given):
            return function(*args, **kwargs)
        given = self.edited("scores", given)
        out = self.edited("probs", function(given, *rest, **kwargs))
        call = Call(scores=self.by_head(given).clone(), probs=self.by_head(out).clone())
        for a, b in reversed(self.products):
            if a.shape[1] == call.probs.shape[1] and a.shape[-2] == call.probs.shape[-2]:
                call.q, call.k = a, b.transpose(-1, -2)
                break
        self.calls[self.layer].append(call)
        return out

    def product(self, function, name, args, kwargs):
        args, kwargs = list(args), dict(kwargs)
        first, second = (1, 2) if name == "baddbmm" else (0, 1)
        for i, key in ((first, "batch1"), (second, "batch2")):
            if i >= len(args):
                args.append(kwargs.pop(key))
        a, b = args[first], args[second]
        last = self.calls[self.layer][-1] if self.calls[self.layer] else None
        if last is not None and last.z is None and self.averages(a, last):
            b = args[second] = self.edited("v", b)
            out = self.edited("z", function(*args, **kwargs))
            last.v, last.z = self.by_head(b).clone(), self.by_head(out).clone()
            return out
        if self.could_be_scores(a, b):
            a = args[first] = self.edited("q", a)
            b = args[second] = self.edited("k", b.transpose(-1, -2)).transpose(-1, -2)
            self.products.append((self.by_head(a).clone(), self.by_head(b).clone()))
        return function(*args, **kwargs)

    def averages(self, a, call):
        if not isinstance(a, torch.Tensor) or a.dim() not in (3, 4) or a.shape[-2] != call.probs.shape[-2]:
            return False
        mine = self.by_head(a)
        return mine.shape[:2] == call.probs.shape[:2] and mine.shape[-1] <= call.probs.shape[-1]

    def could_be_scores(self, a, b):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or a.dim() != b.dim():
            return False
        if a.dim() not in (3, 4) or a.shape[0] != b.shape[0] or (a.dim() == 4 and a.shape[1] % b.shape[1]):
            return False
        lead = a.shape[0] == self.rows if a.dim() == 4 else a.shape[0] > self.rows
        return lead and a.shape[-2] >= self.length and b.shape[-1] >= a.shape[-2]
