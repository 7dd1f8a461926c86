"""Token ids that a user gives as targets."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def token_ids(tokens: Any, what: str, vocab_size: int | None = None) -> list[int]:
    """Return token ids as a list of plain ints, in the order given.

    This is the only place where targets are checked: everything in this package that takes token ids of targets calls
    it.

    Args:
        tokens: A list, tuple, set, 1-d tensor or 1-d array of integers. It may be empty.
        what: How messages name the target, such as "The target 'other'".
        vocab_size: Size of the vocabulary, if it is known.

    Raises:
        TypeError: It is something else, such as a text, bytes, floats or booleans.
        ValueError: An id is negative or outside the vocabulary.
    """
    if isinstance(tokens, torch.Tensor):
        if tokens.dim() != 1:
            raise TypeError(
                f"{what} is a tensor of shape {list(tokens.shape)}; give a 1-d tensor or a list of token ids."
            )
        tokens = list(tokens)
    if isinstance(tokens, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(tokens, Iterable):
        raise TypeError(
            f"{what} is {_shown(tokens)}; give a list of token ids, such as [1234]. Prompt.from_strings takes words."
        )
    ids = [_token_id(token, what) for token in tokens]
    if ids and min(ids) < 0:
        raise ValueError(f"{what}: {min(ids)} is no token id; ids begin at 0.")
    if ids and vocab_size is not None and max(ids) >= vocab_size:
        raise ValueError(
            f"{what}: tokens {ids} are not all in a vocabulary of {vocab_size}. Were they made with another model's "
            f"tokenizer?"
        )
    return ids


def distinct_ids(tokens: Any, what: str, vocab_size: int | None = None) -> tuple[int, ...]:
    """Return `token_ids` with every id once, so that a probability is never added twice."""
    return tuple(dict.fromkeys(token_ids(tokens, what, vocab_size)))


def ids_of_categories(
    target_tokens: Mapping[str, Any], vocab_size: int | None = None, where: str = ""
) -> dict[str, tuple[int, ...]]:
    """Return the `distinct_ids` of each category; messages begin with `where`."""
    begin = f"{where}: the" if where else "The"
    return {
        name: distinct_ids(tokens, f"{begin} target {name!r}", vocab_size) for name, tokens in target_tokens.items()
    }


def _token_id(token: Any, what: str) -> int:
    """Return one token id as a plain int.

    Raises:
        TypeError: It is not an integer.
    """
    boolean = isinstance(token, bool) or (isinstance(token, torch.Tensor) and token.dtype == torch.bool)
    if not boolean and getattr(token, "ndim", 0) == 0:
        try:
            return operator.index(token)
        except TypeError:
            pass
    raise TypeError(f"{what} holds {_shown(token)}; token ids are integers.")


def _shown(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
