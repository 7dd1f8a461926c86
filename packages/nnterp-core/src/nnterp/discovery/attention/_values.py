"""Find the values: what the probabilities are multiplied with to give a tensor that is recorded after them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nnterp.discovery._probe import ROWS
from nnterp.discovery.attention._evidence import Evidence, best
from nnterp.discovery.attention._head_vectors import HeadVectors, averaged, head_vectors
from nnterp.discovery.attention._pattern import Pattern
from nnterp.tensors import same
from nnterp.traced import PARTS, Inside, Layout, Place, over


@dataclass(frozen=True)
class Values:
    """The values of one attention.

    Attributes:
        place: Where they are served, or why they are not.
        heads: Key and value heads, where the values are served.
        dim: Width of one head's values.
        product: The probabilities times the values, `[batch, query, heads, dim]`, float64; None where several softmaxes
            average a part of the values each.
        exact: Whether the product is what W_O is given.
    """

    place: Place | str
    heads: int | None
    dim: int
    product: torch.Tensor | None
    exact: bool


def find_values(
    evidence: Evidence, pattern: Pattern, given_to_out: torch.Tensor | None, keys: Inside | None
) -> Values | None:
    """Find the tensor whose average under the probabilities is recorded after them; None if there is none.

    One that is there however attention is computed is preferred.

    Args:
        evidence: What was recorded.
        pattern: The attention pattern.
        given_to_out: What W_O was given.
        keys: Where the keys are; this place is not taken. Where keys serve as values, the model hands on the same
            tensor twice.
    """
    operations = [o for o in evidence.operations if o.began > pattern.holders[0].began]
    after = [o.output for o in operations if isinstance(o.output, torch.Tensor)]
    if given_to_out is not None:
        after.append(given_to_out)

    def fits(one: HeadVectors) -> bool:
        made = averaged(pattern.probs, one.vectors)
        return any(_is_product(made, recorded, evidence.tolerance) for recorded in after)

    found = best(_options(evidence, pattern, keys), fits)
    if found is None:
        return None
    if len(pattern.softmaxes) > 1:
        return _in_parts(evidence, pattern, found)
    product = averaged(pattern.probs, found.vectors)
    exact = given_to_out is not None and same(
        product.flatten(2), given_to_out.double(), max(evidence.tolerance * 10, 1e-4)
    )
    _, _, heads, dim = found.vectors.shape
    return Values(found.place, heads, dim, product, exact)


def _options(evidence: Evidence, pattern: Pattern, keys: Inside | None) -> Iterator[HeadVectors]:
    for candidate in evidence.around(pattern.softmax):
        if candidate.place != keys:
            yield from head_vectors(candidate, pattern.probs.shape[-1], pattern.heads)


def _is_product(made: torch.Tensor, recorded: torch.Tensor, tolerance: float) -> bool:
    """Whether a recorded tensor holds the averaged values, `[batch, query, heads, dim]`, in one of the usual shapes."""
    if recorded.numel() != made.numel():
        return False
    tolerance = max(tolerance * 10, 1e-4)
    shapes = (
        made,
        made.transpose(1, 2),
        made.transpose(0, 1),
        made.flatten(2),
        made.transpose(1, 2).flatten(0, 1),
    )
    return any(recorded.shape == one.shape and same(one, recorded.double(), tolerance) for one in shapes)


def _in_parts(evidence: Evidence, pattern: Pattern, first: HeadVectors) -> Values:
    """Values of which every softmax averages a part: where the parts are still one tensor.

    DiffLlama's heads are as wide as two (Ye et al. 2024, "Differential Transformer", section 2.1): its calls are
    given one half of the value heads each, and what they return is put side by side.
    """
    count = len(pattern.softmaxes)
    dim = first.vectors.shape[-1] * count
    parts = [
        first.layout.show(tensor)
        for place in pattern.in_every_call(first.candidate.place)
        for operation in evidence.operations
        if (operation.path, operation.labels) == (place.path, place.labels)
        for key, tensor in operation.tensors_in()
        if key == place.key
    ]
    for operation in sorted(evidence.operations, key=lambda o: -o.began):
        if operation.began > pattern.softmax.began or operation.times > 1 or len(parts) != count:
            continue
        for whole in evidence.given(operation):
            if whole.both and whole.tensor.dim() == 4 and _is_whole(whole.tensor, parts, evidence.tolerance):
                place = over(whole.place, Layout(PARTS, count))
                return Values(place, whole.tensor.shape[1] // count, dim, None, False)
    return Values(f"the values are averaged in {count} parts, by as many calls", None, dim, None, False)


def _is_whole(tensor: torch.Tensor, parts: list[torch.Tensor], tolerance: float) -> bool:
    """Whether the parts are the pieces of a tensor that is cut along its heads, each piece's heads repeated."""
    heads, count = tensor.shape[1], len(parts)
    if heads % count or tensor.shape[0] != ROWS or tensor.shape[2] != parts[0].shape[1]:
        return False
    return all(
        part.shape[2] % mine.shape[2] == 0
        and same(mine.repeat(1, 1, part.shape[2] // mine.shape[2], 1), part, tolerance)
        for mine, part in zip(tensor.transpose(1, 2).chunk(count, dim=2), parts, strict=True)
    )
