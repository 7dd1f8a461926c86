"""Which rows may share a batch, where a forward pass decides something for all rows by the longest of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import PaddingError
from nnterp.record import Record

if TYPE_CHECKING:
    from nnterp.traced._running import Running


class Sharing(Record):
    """Rows whose lengths have one `side` may be padded to one batch; a row then gives what it gives alone.

    Attributes:
        limit: Longest batch in which rows are padded; None if there is no such limit, 0 if rows never are.
        switches: Lengths after which the longest row makes the model compute every row differently.
    """

    def __init__(self, limit: int | None = None, switches: tuple[int, ...] = ()) -> None:
        self.limit, self.switches = limit, switches

    def side(self, length: int, growth: int = 0) -> tuple[int, ...]:
        """What rows that share a batch agree in, while each grows by `growth` tokens; the last entry is the length
        where only equal lengths may share."""
        last = length + growth
        sides = tuple(int(length > switch) for switch in self.switches)
        split = sides != tuple(int(last > switch) for switch in self.switches)
        alone = split or (self.limit is not None and last > self.limit)
        return (*sides, length if alone else 0)

    def begin(self, model: Running, mask: torch.Tensor | None, settings: dict[str, Any], counted: bool) -> None:
        """Prepare a run, and raise unless its rows may share a batch; see `require_sharing`.

        Args:
            model: The model that runs.
            mask: Of a padded batch.
            settings: Of a generation.
            counted: Whether positions are counted from the mask.
        """
        if self.limit is not None:
            fresh_rotations(model._module)
        if mask is not None:
            growth = growth_of(model._module, settings, mask.shape[-1]) if model.interleaver.stepping else 0
            require_sharing(self, mask, growth, counted, model.model_class)

    def __str__(self) -> str:
        if self.limit == 0:
            return "rows of equal length"
        told = [f"rows on one side of {switch} tokens" for switch in self.switches]
        if self.limit is not None:
            told.append(f"rows of any length up to {self.limit} tokens, longer ones only with rows of equal length")
        return " and ".join(told) or "rows of any length"


def require_sharing(sharing: Sharing, mask: torch.Tensor, growth: int, counted: bool, name: str) -> None:
    """Raise unless the rows of a padded batch may share it.

    Args:
        sharing: Which rows may.
        mask: `[batch, seq]`, 0 at padding.
        growth: How many tokens will be generated.
        counted: Whether positions are counted from the mask, so that padding does not lengthen a row.
        name: The model's class.
    """
    width, lengths = mask.shape[-1], [int(n) for n in mask.sum(-1)]
    if not counted:
        lengths.append(width)
    within = sharing.limit is None or width + growth <= sharing.limit
    if not within or len({sharing.side(n, growth) for n in lengths}) > 1:
        made = f", and {growth} to generate" if growth else ""
        raise PaddingError(
            f"These inputs have different lengths ({min(lengths)} to {width} tokens{made}), and {name} is proven to "
            f"give a padded row the numbers of the row alone only for {sharing} (without a certificate, call "
            "model.validate()). Run them one at a "
            "time, or use a function that takes prompts (collect, run_prompts, ...): those batch accordingly."
        )


def growth_of(module: Any, generation: dict[str, Any], width: int) -> int:
    """How many tokens a generation with these settings adds at most to rows of `width` tokens."""
    config = generation.get("generation_config") or getattr(module, "generation_config", None)
    new = generation.get("max_new_tokens")
    if new is None and "max_length" not in generation:
        new = getattr(config, "max_new_tokens", None)
    if new is None:
        longest = generation.get("max_length") or getattr(config, "max_length", None)
        new = 20 if longest is None else longest - width
    return max(0, new)


def fresh_rotations(module: Any) -> None:
    """Put rotary embeddings that stretch with the input back to how they begin, so that no earlier input is left."""
    for inner in module.modules():
        held = inner.__dict__
        for name in [name for name in held if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            first = getattr(inner, f"{prefix}original_inv_freq", None)
            if first is not None and held[name] != held.get("original_max_seq_len"):
                inner.register_buffer(f"{prefix}inv_freq", first.to(getattr(inner, f"{prefix}inv_freq").device), False)
                setattr(inner, name, inner.original_max_seq_len)


def require_single(settings: dict[str, Any], module: Any) -> None:
    """Raise for beams and several returned sequences, whose rows cannot be told apart in several invokes."""
    configs = settings.get("generation_config"), getattr(module, "generation_config", None)
    for name in ("num_beams", "num_return_sequences"):
        given = next((v for v in (settings.get(name), *(getattr(c, name, None) for c in configs)) if v is not None), 1)
        if given > 1:
            raise ValueError(
                f"{name}={given} makes several rows of each prompt, and nnsight would show all of them to every "
                "invoke. Put the prompts into one invoke, as a list, or generate from one at a time."
            )
