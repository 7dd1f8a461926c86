"""What a model's numbers depend on: its class, config, dtype, edits and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnterp.identity._code import names_read, plain_values
from nnterp.identity._digests import digest
from nnterp.identity._weights import checksum

_FORGOTTEN = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"})


def settings_of_model(model: Any) -> dict[str, Any]:
    """Return everything that distinguishes a `StandardizedTransformer` from others, as JSON can hold it.

    Its weights are read once, if they are loaded. A model whose class has `run_settings()`, because its weights are in
    an engine, says itself what distinguishes it.
    """
    if hasattr(type(model), "run_settings"):
        return model.run_settings()
    module = model._module
    return {
        "model_class": model.anatomy.model_class,
        "model": model.repo_id or "",
        "revision": getattr(module.config, "_commit_hash", None) or getattr(model, "revision", None),
        "dtype": str(getattr(module, "dtype", None)),
        "config": config_digest(module.config),
        "edits": [_edit(edit) for edit in getattr(model, "_edits", ())],
        **({"steering": [digest(vars(steering)) for steering in model.standing]} if model.standing else {}),
        **({"attached": _attached(model.attachments)} if getattr(model, "attachments", None) else {}),
        "weights": checksum(module),
    }


def _attached(attachments: Mapping[tuple[int, int], Any]) -> list[str]:
    """Return a digest of each dictionary that is attached, with where it is."""
    return [f"{at} {one.reads} {one.writes} #{digest(one.dictionary)}" for at, one in sorted(attachments.items())]


def config_digest(config: Any) -> str:
    """Return a digest of the parts of a config that a model's numbers may depend on."""
    return digest(_config(config))


def _config(config: Any) -> dict[str, Any]:
    """Return the parts of a model's config that its numbers may depend on."""

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if not str(key).startswith("_") and key not in _FORGOTTEN
        }

    return kept(config.to_dict()) if hasattr(config, "to_dict") else {}


def _edit(edit: Any) -> str:
    """Return a digest of an edit made by nnsight's `model.edit()`: its code and the plain values it reads."""
    names = names_read(edit.code)
    variables = [*plain_values(names, edit.glbls), *plain_values(names, edit.lcls)]
    return digest((edit.code, variables))
