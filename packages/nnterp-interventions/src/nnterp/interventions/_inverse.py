"""Inverse logits: what the head returns for the negative of its input, as in nnterp 1.x."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import Unavailable

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

INVERSE = "inverse_"  # begins the names of tensors that are reduced from inverse logits


def inverse_logits(model: StandardizedTransformer, project: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Logits `[spots, vocab]` for which the head is given the negative of its input; `project` computes them.

    Raises:
        Unavailable: The model's readout calls no head.
    """
    path, called = model.readout.lm_head, []

    def negate(head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        called.append(True)
        if args:
            return (-args[0], *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: -kwargs[name]}

    if path is not None:
        hook = model._module.get_submodule(path).register_forward_pre_hook(negate, with_kwargs=True)
        try:
            logits = project()
        finally:
            hook.remove()
    if not called:
        raise Unavailable(
            f"{model.readout.model_class} calls no head module after its last layer, so there is no input of the head "
            f"to negate: return_inv_logits is not available."
        )
    return logits


def split_inverse(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Two dicts with the same names: the tensors of the logits, and those of the inverse logits."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(INVERSE)}
    return [plain, {name: tensors[INVERSE + name] for name in plain}]
