"""Functions that 1.x had, called as 1.x allowed: with `nn_model=`, and with any renamed nnsight model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from nnsight import TransformersModel

from nnterp.anatomy import RenameConfig, get_rename_dict
from nnterp.standardized_transformer import StandardizedTransformer
from nnterp.traced import TracedTransformer

__all__ = ["standardized", "takes_nnsight_models"]

_MADE: WeakKeyDictionary[TransformersModel, dict[bool, StandardizedTransformer]] = WeakKeyDictionary()

P = ParamSpec("P")
T = TypeVar("T")

_FIELD_OF = {
    "model": "model_name",
    "layers": "layers_name",
    "self_attn": "attn_name",
    "mlp": "mlp_name",
    "ln_final": "ln_final_name",
    "lm_head": "lm_head_name",
}


def takes_nnsight_models(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function's first argument, the model, be called `nn_model`, and be a plain nnsight model.

    A plain nnsight model is replaced by `standardized(model)`.

    Returns:
        The function, with the same parameters.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> T:
        if "nn_model" in kwargs and not args and "model" not in kwargs:
            kwargs["model"] = kwargs.pop("nn_model")
        if args:
            args = (standardized(args[0], bool(kwargs.get("remote"))), *args[1:])
        elif "model" in kwargs:
            kwargs["model"] = standardized(kwargs["model"], bool(kwargs.get("remote")))
        return function(*args, **kwargs)

    return called


def standardized(model: Any, remote: bool = False) -> Any:
    """Make a `StandardizedTransformer` over the module of a plain nnsight model, once, and prove it.

    Args:
        model: A model. An `nnsight.TransformersModel` (or `LanguageModel`) is renamed as its `rename=` says.
        remote: Do not load its weights.

    Returns:
        The `StandardizedTransformer`; a model that is no plain nnsight model comes back as it is.

    Raises:
        AnatomyError: A part of the model was not found.
        CertificateError: The parts found do not behave as their names say.
        ValueError: The model has edits (`model.edit()`), which would be lost.
    """
    if isinstance(model, TracedTransformer) or not isinstance(model, TransformersModel):
        return model
    if model._edits:
        raise ValueError(
            f"This {type(model).__name__} has edits, which a StandardizedTransformer over its module would not have. "
            "Load it with StandardizedTransformer(...) and edit that."
        )
    made = _MADE.setdefault(model, {})
    kind = remote and not model.dispatched
    if kind not in made:
        if not remote:
            model.dispatch()
        source = model.repo_id if kind else model._module
        made[kind] = StandardizedTransformer(
            source, remote=kind, tokenizer=model.tokenizer, rename_config=_config_of(model._rename)
        )
    return made[kind]


def _config_of(rename: dict[Any, Any] | None) -> RenameConfig | None:
    """The names in a `rename=` that are the user's own, and not nnterp's guesses, as candidates."""
    usual = get_rename_dict()
    given: dict[str, list[str]] = {}
    for native, names in (rename or {}).items():
        for name in [names] if isinstance(names, str) else names:
            if isinstance(native, str) and usual.get(native) != name and name in _FIELD_OF:
                given.setdefault(_FIELD_OF[name], []).append(native)
    return RenameConfig(**given) if given else None  # type: ignore[arg-type]
