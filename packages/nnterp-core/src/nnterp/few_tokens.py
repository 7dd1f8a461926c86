"""Logits of a few tokens: of a head that is a plain linear layer, only their rows are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules import module as hooks_everywhere

from nnterp.traced import project_on_vocab

if TYPE_CHECKING:
    from nnterp.traced import Head, TracedTransformer


def logits_of(
    model: TracedTransformer, hidden: torch.Tensor, tokens: Sequence[int] | torch.Tensor | None = None
) -> torch.Tensor:
    """`[..., vocab]` of hidden states `[..., hidden]`; or `[..., tokens]`, the logits of these alone.

    Raises:
        ValueError: `tokens` are no ids of tokens.
    """
    readout = model.readout
    if tokens is None:
        return project_on_vocab(model, readout, hidden)
    ids = _ids(tokens, model.vocab_size)
    head = _rows(model._module, readout.lm_head, ids) if readout.way == "chain" else None
    if head is not None:
        return project_on_vocab(model, readout, hidden, head)
    logits = project_on_vocab(model, readout, hidden)
    return logits[..., ids.to(logits.device)]


def _rows(module: nn.Module, path: str | None, ids: torch.Tensor) -> Head | None:
    """What the head does, for these tokens; None if it is no plain linear layer, or was changed."""
    head = None if path is None else module.get_submodule(path)
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return None
    forward = head.__dict__.get("forward")
    state = getattr(forward, "state", None)  # nnsight's forward keeps the one that it found
    own = forward is None if state is None else state.original is nn.Linear.forward
    everywhere = hooks_everywhere._global_forward_hooks or hooks_everywhere._global_forward_pre_hooks
    if not own or everywhere or head._forward_hooks or head._forward_pre_hooks or "_hf_hook" in head.__dict__:
        return None
    at = ids.to(head.weight.device)
    weight, bias = head.weight, head.bias
    return lambda hidden: nn.functional.linear(hidden, weight[at], None if bias is None else bias[at])


def _ids(tokens: Sequence[int] | torch.Tensor, size: int | None) -> torch.Tensor:
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    whole = ids.dim() == 1 and len(ids) > 0 and not ids.is_floating_point() and ids.dtype != torch.bool
    ids = ids.long() if whole else ids
    if not whole or bool((ids < 0).any()) or bool((ids >= (size or 1 << 62)).any()):
        most = "" if size is None else f" to {size - 1}"
        raise ValueError(f"tokens is a list of ids from 0{most}, not {tokens!r:.80}.")
    return ids
