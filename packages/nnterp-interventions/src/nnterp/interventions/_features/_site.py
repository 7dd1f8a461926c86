"""Where a dictionary reads and writes in one model, and what it makes of a batch there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp import Dictionary
from nnterp.inputs import Batch, Row, forward_flags
from nnterp.values import canonical, get_label, get_value, layer_index, read_value
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_AT_ONCE = 2**25  # features of positions that are held at once


class DictionaryMismatch(UserWarning):
    """A dictionary does not seem to belong to the activations or to the texts that it is given.

    Example:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DictionaryMismatch)
            dictionary_fit(model, nnterp.toy_dictionary("residual_4"), prompts, at="layers_output[1]")
        print(caught[0].category is DictionaryMismatch)  # → True
    """


class Places:
    """Where a dictionary encodes, and where what it decodes belongs.

    Attributes:
        reads, writes: Names of values with their layer, None for a value that a model has once.
    """

    def __init__(self, model: StandardizedTransformer, dictionary: Dictionary, at: str | None) -> None:
        if not isinstance(dictionary, Dictionary):
            raise TypeError(
                f"A Dictionary is asked for, as load_dictionary() returns one, not a {type(dictionary).__name__}."
            )
        if at is not None and dictionary.is_transcoder and dictionary.writes is None:
            raise ValueError("Of a transcoder the value that it writes has to be known: load_dictionary(writes=...).")
        reads = at if at is not None else dictionary.reads
        writes = dictionary.writes if dictionary.is_transcoder else reads
        if reads is None or writes is None:
            raise ValueError(
                f"{dictionary.source or 'The dictionary'} does not say which value it "
                f"{'encodes: give at=' if reads is None else 'writes: give load_dictionary(writes='}"
                f"{'' if reads is None else ')'}, such as 'layers_output[12]'."
            )
        self.dictionary = dictionary
        self.reads, self.writes = _place(model, reads), _place(model, writes)
        for place in (self.reads, self.writes):
            if place[1] is not None and get_value(place[0]).stack == "layers":
                model.layers_of_texts([place[1]])
        if _rank(self.reads) > _rank(self.writes):
            raise ValueError(f"{reads} is computed after {writes}, so it cannot be read before that is written.")

    def read(self, model: StandardizedTransformer, place: tuple[str, int | None]) -> torch.Tensor:
        """A value of the running forward pass."""
        return read_value(model, get_label(place[0]), place[1])

    def check(self, model: StandardizedTransformer, row: Row) -> None:
        """Raise unless the values have the dictionary's widths.

        Raises:
            ValueError: One has another width.
        """
        dictionary = self.dictionary
        wanted = {self.reads: dictionary.width, self.writes: dictionary.output_width}
        with torch.no_grad(), model.trace({"input_ids": torch.tensor([row.ids[:2]])}, **forward_flags(model)) as tracer:
            found = []
            for place in wanted:
                found.append(read_value(model, get_label(place[0]), place[1]))
            nnsight.save(found)
            tracer.stop()
        for (place, width), value in zip(wanted.items(), found, strict=True):
            own = value[0, 0].numel()
            if own != width:
                raise ValueError(
                    f"{shown(place)} of {model.repo_id or model.model_class} has width {own}, and the dictionary "
                    f"{dictionary.source} has width {width}: it is of another model, or of another value."
                )

    def encoded(self, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Some positions at a time of `x`, `[positions, width]`: which, what is encoded, and its features."""
        size = max(1, _AT_ONCE // self.dictionary.num_features)
        for start in range(0, len(x), size):
            some = slice(start, start + size)
            yield some, x[some], self.dictionary.encode(x[some])


def shown(place: tuple[str, int | None]) -> str:
    """A place in words: "layers_output[12]"."""
    return place[0] if place[1] is None else f"{place[0]}[{place[1]}]"


def own_positions(batch: Batch, skip_first: int) -> torch.Tensor:
    """`[batch, seq]`: which positions are a row's own, its first `skip_first` left out."""
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for i, (start, row) in enumerate(zip(batch.starts, batch.rows, strict=True)):
        mask[i, start + skip_first : start + len(row)] = True
    return mask


def warn_of_beginnings(model: StandardizedTransformer, dictionary: Dictionary, rows: Sequence[Row]) -> None:
    """Warn if texts begin otherwise than those that the dictionary was trained on.

    Warns:
        DictionaryMismatch: They do.
    """
    begin = getattr(model.tokenizer, "bos_token_id", None)
    if dictionary.prepend_bos is None or begin is None:
        return
    others = sum((row.ids[0] == begin) != dictionary.prepend_bos for row in rows)
    if others:
        said = "with" if dictionary.prepend_bos else "without"
        warn(
            f"{dictionary.source} was trained on texts {said} a beginning-of-sequence token, and {others} of "
            f"{len(rows)} texts are {'without' if dictionary.prepend_bos else 'with'} one.",
            DictionaryMismatch,
        )


def _place(model: StandardizedTransformer, name: Any) -> tuple[str, int | None]:
    value, layer = canonical(name)
    if value.per_layer and layer is None:
        raise ValueError(f"{value.name} is a value of each layer: name one, such as '{value.name}[0]'.")
    return value.name, None if layer is None else layer_index(layer, model.num_layers, value.name)


def _rank(place: tuple[str, int | None]) -> tuple[float, float]:
    value = get_value(place[0])
    layer = place[1] if place[1] is not None else (-1 if value.name == "token_embeddings" else float("inf"))
    return float(layer), value.rank
