"""Find out whether a looped model runs some of its passes without gradients."""

from __future__ import annotations

import torch
from torch import nn

from nnterp.anatomy import Anatomy
from nnterp.discovery._probe import model_inputs, probe_ids
from nnterp.errors import Unavailable
from nnterp.huggingface import uncached


def require_passes_with_gradients(root: nn.Module, anatomy: Anatomy) -> None:
    """Raise if a looped model's code runs layers without gradients in some passes, as HRM does in its early cycles.

    A gradient would leave out what goes through these passes, and would not be the derivative.

    Raises:
        Unavailable: Names the first such layer.
    """
    if not anatomy.runs:
        return
    without: list[str] = []

    def note(path: str) -> None:
        if not torch.is_grad_enabled():
            without.append(path)

    paths = dict.fromkeys(layer.path for layer in anatomy.blocks)
    handles = [root.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: note(path)) for path in paths]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            root(**model_inputs(root, probe_ids(root, anatomy.sizes.vocab_size, 1, 2)), **uncached(root))
    finally:
        for handle in handles:
            handle.remove()
    if without:
        raise Unavailable(
            f"Gradients cannot be taken: {anatomy.model_class} runs {without[0]} under torch.no_grad() in some of its "
            "passes, so what would come out is not the derivative. Patching and steering need no gradients."
        )
