"""Logits of a few tokens: of a head that is a plain linear layer, only their rows are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as hooks_everywhere

from nnterp.traced import Readout, project_on_vocab

if TYPE_CHECKING:
    from nnterp.traced import TracedTransformer


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
    head = None if readout.lm_head is None else model._module.get_submodule(readout.lm_head)
    if readout.way == "chain" and _is_plain(head):
        return project_on_vocab(model, _OfTokens(readout, ids), hidden)
    logits = project_on_vocab(model, readout, hidden)
    return logits[..., ids.to(logits.device)]


class _OfTokens(Readout):
    """A readout by the chain whose head is a plain linear layer, for some tokens."""

    def __init__(self, readout: Readout, ids: torch.Tensor) -> None:
        self.__dict__.update(vars(readout))
        self.ids = ids

    def by_chain(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., tokens]`."""
        assert self.lm_head is not None
        head: Any = module.get_submodule(self.lm_head)
        if self.ln_final is not None:
            hidden = module.get_submodule(self.ln_final)(hidden)
        at = self.ids.to(head.weight.device)
        bias = None if head.bias is None else head.bias[at]
        return self.chain.finish(nn.functional.linear(hidden, head.weight[at], bias))


def _is_plain(head: nn.Module | None) -> bool:
    """Whether a head is a linear layer that nobody has changed."""
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    forward = head.__dict__.get("forward")
    state = getattr(forward, "state", None)  # nnsight's forward keeps the one that it found
    own = forward is None if state is None else state.original is nn.Linear.forward
    everywhere = hooks_everywhere._global_forward_hooks or hooks_everywhere._global_forward_pre_hooks
    hooked = everywhere or head._forward_hooks or head._forward_pre_hooks
    return own and not hooked and "_hf_hook" not in head.__dict__


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
