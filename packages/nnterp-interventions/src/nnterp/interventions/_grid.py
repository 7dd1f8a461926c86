"""The grid of activation patching: pairs × values × layers × heads × positions, and the cell at each point."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from nnterp.inputs import all_images
from nnterp.interventions._engine import At, Cell, Edit, Shortcuts, index_of
from nnterp.interventions._layers import places_with
from nnterp.interventions._pairs import Pairs
from nnterp.interventions._results import exact_texts, joined, prompt_labels
from nnterp.interventions._states import States
from nnterp.interventions._units import units_of
from nnterp.positions import plain_positions, resolve
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Column: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # positions in the run patched into, and in the source


class Grid:
    """The axes of a call of `activation_patching`.

    Attributes:
        names, layers, units: The values, layers and heads (`[None]` if heads are not told apart).
        together: All positions are patched at once.
        columns: The positions asked for; None for every position.
        where: For each pair its columns.
        width: Columns of the pair that has most.
        shape: `(values, layers, heads, positions)`.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        pairs: Pairs,
        names: list[str],
        layers: Any,
        positions: Any,
        heads: Any,
    ) -> None:
        self.model, self.pairs, self.names = model, pairs, names
        images = all_images(model, [*pairs.clean, *pairs.corrupted])
        self.layers = places_with(model, names, layers, images)
        self.units = units_of(model, names, heads, self.layers)
        self.by_head = heads is not None
        _check_patterns(pairs, names)
        heard = {get_value(name).of_encoder for name in names}
        if len(heard) > 1:
            raise ValueError(
                f"{', '.join(names)} have positions of both the encoder's and the decoder's input: patch them apart."
            )
        self.seen = _heard(pairs) if heard == {True} else pairs
        plain = plain_positions(positions)
        self.together = plain is None and (positions == "all" or self.by_head)
        self.columns: list[Any] | None = None
        if plain is not None:
            self.columns = list(plain) if isinstance(plain, tuple) else [plain]
        self.where = [
            self._every_position(i) if self.columns is None else [self._column(i, column) for column in self.columns]
            for i in range(len(pairs))
        ]
        self.width = max(len(columns) for columns in self.where)
        self.shape = (len(names), len(self.layers), len(self.units), self.width)

    def _every_position(self, pair: int) -> list[Column]:
        clean, corrupted = len(self.seen.clean[pair]), len(self.seen.corrupted[pair])
        if clean != corrupted:
            raise ValueError(
                f"Pair {pair}: the clean prompt has {clean} tokens and the corrupted one {corrupted}, so their "
                f"positions do not correspond; make them equally long, or give positions that are found in both, such "
                f"as nnterp.positions.last_of(...)."
            )
        every = tuple(range(clean))
        return [(every, every)] if self.together else [((p,), (p,)) for p in every]

    def _column(self, pair: int, column: Any) -> Column:
        kinds = ("corrupted", "clean") if self.pairs.denoising else ("clean", "corrupted")
        prompts = self.seen.into[pair], self.seen.source[pair]
        into, source = (
            resolve(self.model, prompt, column, f"the {kind} prompt {pair}")
            for prompt, kind in zip(prompts, kinds, strict=True)
        )
        if len(into) != len(source):
            raise ValueError(
                f"Pair {pair}: {column!r} is {len(into)} tokens of the {kinds[0]} prompt and {len(source)} of the "
                f"{kinds[1]} one; give positions that are equally many in both."
            )
        if not into:
            raise ValueError(f"Pair {pair}: {column!r} is no token of the prompt.")
        return into, source

    def cells(
        self, pair: int, prompt: int, name: str, states: States, shortcuts: Shortcuts
    ) -> Iterator[tuple[tuple[int, ...], Cell]]:
        """Each cell of one pair and one value, with its indices of layer, head and position.

        Args:
            pair: Index of the pair.
            prompt: Index of its prompt in the sweep.
            name: The value.
            states: The value's states in the run patched from.
            shortcuts: Those proven for the model.
        """
        columns = self.differing(pair, shortcuts)
        for (a, layer), (b, unit), (c, column) in product(
            enumerate(self.layers), enumerate(self.units), enumerate(columns)
        ):
            yield (a, b, c), self.cell(prompt, (name, layer), unit, column, states)

    def differing(self, pair: int, shortcuts: Shortcuts) -> list[Column]:
        """A pair's columns without the positions up to which both runs are equal, of which some are then empty."""
        same = self._same_prefix(pair, shortcuts)
        kept = []
        for at, at_source in self.where[pair]:
            own = [k for k, position in enumerate(at) if position >= same or at != at_source]
            kept.append((tuple(at[k] for k in own), tuple(at_source[k] for k in own)))
        return kept

    def cell(self, prompt: int, key: tuple[str, At], unit: int | None, column: Column, states: States) -> Cell:
        """The cell of one value and layer, one head (or all) and one column; arguments as for `cells`."""
        at, at_source = column
        if not at:  # both runs are equal up to here
            return Cell(prompt, ())
        heads = None if unit is None else (unit,)
        there, source = Edit(*key, at_source, lambda x: x, heads), states[key]
        return Cell(prompt, (Edit(*key, at, source[index_of(there, 0, source.device)], heads),))

    def _same_prefix(self, pair: int, shortcuts: Shortcuts) -> int:
        """Number of first positions at which both runs are equal, in a model proven not to look ahead; else 0."""
        into, source = self.pairs.into[pair].ids, self.pairs.source[pair].ids
        pictured = self.pairs.into[pair].images or self.pairs.source[pair].images  # equal ids may hold other images
        if pictured or not shortcuts.within(len(into)).prefix:
            return 0
        return next(
            (i for i, (a, b) in enumerate(zip(into, source, strict=False)) if a != b), min(len(into), len(source))
        )

    def labelled(
        self, scores: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[str, ...], dict[str, tuple[Any, ...]], tuple[tuple[str | None, ...], ...]]:
        """Scores `[pairs, *shape]` without the axes that were not asked for; their axes, labels and tokens."""
        axes = ["prompts", "values", "layers", "heads", "positions"]
        positions: tuple[Any, ...] = tuple(range(self.width))
        if self.columns is not None:
            positions = tuple(c if isinstance(c, int) else repr(c) for c in self.columns)
        labels: dict[str, tuple[Any, ...]] = {
            "prompts": prompt_labels(self.pairs.clean, self.model),
            "values": tuple(self.names),
            "layers": tuple(at if isinstance(at, int) else ", ".join(map(str, at)) for at in self.layers),
            "heads": tuple(self.units),
            "positions": positions,
        }
        left_out = {"values": len(self.names) == 1, "heads": not self.by_head, "positions": self.together}
        for axis in [axis for axis in axes if left_out.get(axis)]:
            scores = scores.squeeze(axes.index(axis))
            axes.remove(axis)
            labels.pop(axis)
        tokens = () if self.together else tuple(self._tokens(i) for i in range(len(self.pairs)))
        return scores, tuple(axes), labels, tokens

    def _tokens(self, pair: int) -> tuple[str | None, ...]:
        """The clean prompt's tokens in each column."""
        side = 1 if self.pairs.denoising else 0
        ids = self.seen.clean[pair].ids
        own = [joined(exact_texts(self.model, [ids[p] for p in column[side]])) for column in self.where[pair]]
        return (*own, *(None,) * (self.width - len(own)))


def _heard(pairs: Pairs) -> Pairs:
    """Pairs of what the encoder reads of the prompts."""
    clean, corrupted = (
        [row.encoder for row in rows if row.encoder is not None] for rows in (pairs.clean, pairs.corrupted)
    )
    return Pairs(clean, corrupted, pairs.direction)


def _check_patterns(pairs: Pairs, names: list[str]) -> None:
    """Raise if attention patterns would be patched between prompts of different lengths.

    Raises:
        ValueError: They would, and their keys do not correspond.
    """
    patterns = [name for name in names if get_value(name).is_pattern]
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        if patterns and len(clean) != len(corrupted):
            raise ValueError(
                f"Pair {i}: {patterns[0]} has an axis of keys, as long as the prompt, and the clean prompt has "
                f"{len(clean)} tokens and the corrupted one {len(corrupted)}. Make them equally long."
            )
