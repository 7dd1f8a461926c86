"""A model that changed since it was proven: notice it at the next use, and prove it anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from nnterp.anatomy import find_anatomy
from nnterp.errors import ChangedModelError, ChangedModelWarning, RenamingError
from nnterp.facts import Facts, unproven_facts
from nnterp.fingerprint import Fingerprint, Weightless
from nnterp.named_transformer import NamedTransformer


def fingerprint_of(module: nn.Module, facts: Facts) -> Fingerprint:
    """What the facts of a model rest on, to be compared with `Fingerprint.difference` when they are used."""
    return Fingerprint.of(module, factors=_reads_factors(facts))


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


def follow_tree(model: NamedTransformer, before: Fingerprint | None) -> None:
    """Make nnsight's tree and the names follow the module, where modules were put in, taken out or replaced.

    Raises:
        AnatomyError: A part is not found any more.
        TypeError: The model was compiled.
    """
    if before is None or not before.difference(model._module):
        return
    require_not_compiled(model._module)
    model._update(model._module)
    model._envoys_by_path.clear()
    anatomy = find_anatomy(model._module, model.rename_config)
    model.adopt(unproven_facts(model._module, anatomy, model.facts.declared_probabilities))


def prove_anew(model: NamedTransformer, before: Fingerprint, prove: Callable[[], None]) -> None:
    """Prove a model again if it changed, and warn of what did.

    Args:
        model: The model.
        before: Its fingerprint when it was proven.
        prove: Proves the model as it is now, and raises if it cannot.

    Raises:
        ChangedModelError: What the model is now cannot be proven.
    """
    what = before.difference(model._module)
    if not what:
        return
    try:
        prove()
    except (RenamingError, TypeError) as error:
        raise ChangedModelError(
            f"{model.model_class} changed since it was proven: {what}. What it is now cannot be proven: {error}\n"
            "Undo the change, or make another model of the changed module: StandardizedTransformer(module, ...)."
        ) from error
    warnings.warn(
        f"{model.model_class} changed since it was proven: {what}. It was proven anew.", ChangedModelWarning, stacklevel=4
    )


def require_unedited(model: NamedTransformer, before: Weightless) -> None:
    """Raise if a model without weights was edited: loading the weights would lose the edit.

    Raises:
        ChangedModelError: It was edited; says where.
    """
    what = before.difference(model._module)
    if what:
        raise ChangedModelError(
            f"{model.model_class} was edited before its weights were loaded: {what}. Loading them would lose the edit, "
            "so they were not loaded. Call model.dispatch() now, and edit the model after it."
        )
