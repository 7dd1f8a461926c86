"""Find where the inside of one layer's attention is served.

A short prompt is run twice with every operation of the attention modules recorded: once as the model computes
attention, once with eager attention. The softmax is recognised by its name and by the shape of what it returns.
Everything else is recognised by its numbers, so a new model needs no rule of its own:

- probabilities: the last operation that returns the softmax's numbers before they meet the values,
- queries and keys: two tensors whose product is recorded among the scores,
- values: the tensor whose average under the probabilities is recorded after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from nnterp.anatomy import Part
from nnterp.discovery._recording import Recording
from nnterp.discovery.attention._evidence import Evidence
from nnterp.discovery.attention._heads import find_heads
from nnterp.discovery.attention._pattern import Pattern, find_pattern, find_scores
from nnterp.discovery.attention._queries_and_keys import find_queries_and_keys
from nnterp.discovery.attention._values import Values, find_values
from nnterp.traced import Place

_NEED_A_SOFTMAX = (
    "attention_probabilities",
    "attention_scores",
    "attention_queries",
    "attention_keys",
    "attention_values",
)
_NO_SOFTMAX = "no softmax over key positions runs in its attention"
_NO_SCORES = "no operation holds what the softmax is given, as one tensor over the keys"
_NO_QUERIES_AND_KEYS = "no two tensors were seen whose product gives the scores, alone or with a bias by distance"
_NO_VALUES = "no tensor was seen whose average under the probabilities is what attention goes on with"


@dataclass
class Attention:
    """One layer's attention: where each of its values is served, or why it is not.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads, where they were found.
        value_dim: Width of one head's values, where they were found.
        out: Path of the projection that ends attention (W_O), if one does.
        before_out: (path, shape of one position's input) of a projection that stands between the heads and W_O.
        out_heads: Heads in the input of W_O, or of the projection before it.
        exact: Whether the input of W_O is the probabilities times the values, which proves its heads.
        places: Value name → place.
        reasons: Value name → why it has none.
    """

    heads: int | None = None
    kv_heads: int | None = None
    value_dim: int | None = None
    out: str | None = None
    before_out: tuple[str, tuple[int, ...]] | None = None
    out_heads: int | None = None
    exact: bool = False
    places: dict[str, Place] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, found: Place | str) -> None:
        """Keep the place of a value, or the reason why it has none."""
        if isinstance(found, str):
            self.reasons[name] = found
        else:
            self.places[name] = found


def with_code(root: nn.Module, part: Part) -> list[str]:
    """Paths of the modules of an attention whose code is the model's own, not torch's, norms left out."""
    top = part.path or part.entry
    paths = []
    for name, module in root.get_submodule(top).named_modules():
        leaf_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        if not leaf_norm and not type(module).__module__.startswith("torch."):
            paths.append(f"{top}.{name}" if name else top)
    return paths


def find_attention(
    paths: list[str],
    current: Recording,
    eager: Recording,
    out: tuple[str, torch.Tensor] | None,
    heads: int | None,
    tolerance: float,
) -> Attention:
    """Find one layer's attention in what was recorded.

    Args:
        paths: The modules of its attention that have code of their own.
        current: A recording in which attention was computed as the model does it.
        eager: The same with eager attention; `current` again for a model that has none.
        out: Path of the projection that ends attention and what it was given, if one does.
        heads: The config's number of heads.
        tolerance: The largest relative error that counts as equal.
    """
    evidence = Evidence(paths, current, eager, tolerance)
    found = Attention(heads=heads, out=out[0] if out else None)
    pattern = find_pattern(evidence)
    values = None
    if pattern is None:
        for name in _NEED_A_SOFTMAX:
            found.keep(name, _NO_SOFTMAX)
    else:
        values = _look_around(evidence, pattern, None if out is None else out[1], found)
    in_heads = find_heads(evidence, out, found.heads, None if values is None else values.product)
    found.keep("attention_head_outputs", in_heads.outputs)
    found.keep("attention_head_contributions", in_heads.contributions)
    found.out_heads = in_heads.in_out
    return found


def _look_around(
    evidence: Evidence, pattern: Pattern, given_to_out: torch.Tensor | None, found: Attention
) -> Values | None:
    """Fill in what is found around a softmax; returns the values."""
    found.heads = pattern.heads
    found.keep("attention_probabilities", pattern.place)
    scores = find_scores(evidence, pattern)
    found.keep("attention_scores", _NO_SCORES if scores is None else scores)
    pair = find_queries_and_keys(evidence, pattern)
    queries, keys = (_NO_QUERIES_AND_KEYS,) * 2 if pair is None else pair.places(pattern)
    found.keep("attention_queries", queries)
    found.keep("attention_keys", keys)
    values = find_values(evidence, pattern, given_to_out, None if pair is None else pair.keys.candidate.place)
    if values is None:
        found.keep("attention_values", _NO_VALUES)
        return None
    found.keep("attention_values", values.place)
    found.kv_heads, found.value_dim, found.exact = values.heads, values.dim, values.exact
    return values
