"""A model that changed since it was proven: notice it at the next use, and prove it anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nnterp.anatomy import find_anatomy
from nnterp.errors import ChangedModelError, ChangedModelWarning
from nnterp.facts import Facts, unproven_facts
from nnterp.fingerprint import Fingerprint, Weightless
from nnterp.named_transformer import NamedTransformer
from nnterp.warn import warn


def _reads_factors(facts: Facts) -> bool:
    """Whether a value of a learned factor stands in the facts: a factor per channel, a constant, or a zero."""
    parts = [part for layer in facts.residual for part in (layer.mixer, layer.mlp, layer.other) if part is not None]
    scales = [term.scale for part in parts for term in part.terms]
    return any(part.constant is not None for part in parts) or any(
        isinstance(scale, torch.Tensor) or scale == 0 for scale in scales
    )


def require_not_compiled(module: nn.Module) -> None:
    """Raise for a model that `torch.compile` has wrapped or compiled in place: nothing in it can be read.

    Raises:
        TypeError: It is compiled.
    """
    if "_orig_mod" in module._modules:
        raise TypeError(
            "This model was compiled by torch.compile, which fuses the modules that nnterp reads. Pass the model as it "
            "was before: compiled._orig_mod."
        )
    for path, inner in module.named_modules():
        if inner.__dict__.get("_compiled_call_impl") is not None or "_orig_mod" in inner._modules:
            raise TypeError(
                f"{path or 'This model'} was compiled by torch.compile, which fuses the modules that nnterp reads. "
                "Load the model again without compiling it."
            )


class Renewal:
    """Notices that a model changed since it was proven, and that it was edited before its weights were loaded.

    Attributes:
        proven: The fingerprint of the model as it was proven; None before.
        weightless: The parameters while the weights are absent; None where they are here.
    """

    def __init__(self, model: NamedTransformer) -> None:
        self.proven: Fingerprint | None = None
        self.weightless = None if model.dispatched else Weightless(model._module)

    def proved(self, module: nn.Module, facts: Facts) -> None:
        """Take the fingerprint of a model that was just proven."""
        self.proven = Fingerprint.of(module, factors=_reads_factors(facts))

    def follow_tree(self, model: NamedTransformer) -> None:
        """Make nnsight's tree and the names follow the module, where it changed.

        Raises:
            AnatomyError: A part is not found any more.
            TypeError: The model was compiled.
        """
        if self.proven is None or not self.proven.difference(model._module):
            return
        require_not_compiled(model._module)
        model._update(model._module)
        model._envoys_by_path.clear()
        anatomy = find_anatomy(model._module, model.rename_config)
        model.adopt(unproven_facts(model._module, anatomy, model.facts.declared_probabilities))

    def notice(self, model: NamedTransformer, prove: Callable[[], None]) -> None:
        """Prove a model again if it changed, and warn of what did. `prove` raises if the model cannot be proven.

        Raises:
            ChangedModelError: What the model is now cannot be proven.
        """
        what = "" if self.proven is None else self.proven.difference(model._module)
        if not what:
            return
        try:
            prove()
        except Exception as error:
            raise ChangedModelError(
                f"{model.model_class} changed since it was proven: {what}. What it is now cannot be proven: {error}\n"
                "Undo the change, or make another model of the changed module: StandardizedTransformer(module, ...)."
            ) from error
        message = f"{model.model_class} changed since it was proven: {what}. It was proven anew."
        warn(message, ChangedModelWarning)

    def ran_without_weights(self, module: nn.Module) -> None:
        """After a run on fake tensors: what a model edits in its own forward (RWKV's scales) is no user's edit."""
        if self.weightless is not None:
            self.weightless = Weightless(module)

    def require_unedited(self, model: NamedTransformer) -> None:
        """Raise if a model without weights was edited, because loading the weights would lose the edit. Says it once.

        Raises:
            ChangedModelError: It was edited; says where.
        """
        weightless, self.weightless = self.weightless, None
        what = "" if weightless is None else weightless.difference(model._module)
        if what:
            raise ChangedModelError(
                f"{model.model_class} was edited before its weights were loaded: {what}. Loading them would lose the "
                "edit, so they were not loaded. Call model.dispatch() now, and edit the model after it."
            )
