"""Tokens given by the user, as ids or as texts that are one token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Token = int | str


def token_id(model: StandardizedTransformer, token: Token) -> int:
    """The id of one token.

    Args:
        model: The model, whose tokenizer is used.
        token: An id, or a text that is exactly one token, with the space before it if it continues a sentence.

    Raises:
        ValueError: The text is not exactly one token, or there is no such id.
        TypeError: It is neither a text nor an integer: a float, a boolean, bytes.
    """
    if not isinstance(token, str):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"A token is an id or a text, not {token!r}.")
        index = token.__index__()
        size = model.vocab_size
        if index < 0 or (size is not None and index >= size):
            raise ValueError(f"There is no token {index}: ids go from 0 to {(size or 0) - 1}.")
        return index
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    bare = model.tokenizer(token.lstrip(" "), add_special_tokens=False)["input_ids"]
    if len(bare) == 1 and len(ids) == 2 and ids[1] == bare[0]:
        return int(bare[0])  # SentencePiece puts a space before a word itself, so a second one is a token of its own
    pieces = model.tokenizer.convert_ids_to_tokens(ids)
    raise ValueError(
        f"{token!r} is {len(ids)} tokens ({' '.join(map(repr, pieces))}), not one; give the id of the one you mean."
    )


def groups_per_prompt(model: StandardizedTransformer, tokens: Any, prompts: int, name: str) -> torch.Tensor:
    """Groups of token ids for each prompt: int64 `[prompts, groups, members]` on the CPU, padded with -1.

    Args:
        model: The model, whose tokenizer is used.
        tokens: One token for all prompts, or a list with one entry per prompt. An entry is a token, or a list of
            groups; a group is a token, or a list of tokens that count together.
        prompts: Number of prompts.
        name: Name of the argument, for errors.

    Raises:
        ValueError: The list does not have one entry per prompt, an entry is empty, or a text is not one token.
    """
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.tolist()  # a float in it is refused below
    if isinstance(tokens, (int, str)):
        tokens = [tokens] * prompts
    if not isinstance(tokens, Sequence) or len(tokens) != prompts:
        count = f"{len(tokens)} entries" if isinstance(tokens, Sequence) else f"the type {type(tokens).__name__}"
        raise ValueError(
            f"{name} has {count} for {prompts} prompts; give one token, or a list with one entry per prompt."
        )
    lists = [
        [list(dict.fromkeys(token_id(model, t) for t in _listed(group))) for group in _listed(entry)]
        for entry in tokens
    ]  # a token that is named twice in a group counts once
    for i, entry in enumerate(lists):
        if not entry or not all(entry):
            raise ValueError(f"{name} of prompt {i} is empty; give at least one token.")
    groups = max(len(entry) for entry in lists)
    members = max(len(group) for entry in lists for group in entry)
    ids = torch.full((prompts, groups, members), -1)
    for i, entry in enumerate(lists):
        for k, group in enumerate(entry):
            ids[i, k, : len(group)] = torch.tensor(group)
    return ids


def ids_per_prompt(model: StandardizedTransformer, tokens: Any, prompts: int, name: str) -> torch.Tensor:
    """Token ids for each prompt: int64 `[prompts, most]` on the CPU, padded with -1.

    The arguments are those of `groups_per_prompt`, but an entry of `tokens` is a token or a list of tokens.

    Raises:
        ValueError: As `groups_per_prompt`; or tokens are grouped.
    """
    ids = groups_per_prompt(model, tokens, prompts, name)
    if ids.shape[2] != 1:
        raise ValueError(f"{name} groups tokens; give a token or a list of tokens for each prompt.")
    return ids[:, :, 0]


def _listed(entry: Any) -> Sequence[Any]:
    if isinstance(entry, torch.Tensor):
        return entry.tolist() if entry.dim() else [entry.item()]
    return list(entry) if isinstance(entry, Iterable) and not isinstance(entry, (str, bytes, Mapping)) else [entry]
