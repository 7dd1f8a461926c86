"""Arguments of 1.x that say how a model is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from torch import nn

from nnterp.anatomy import RenameConfig

_NNSIGHT_ALONE = ("task", "dispatch", "rename", "envoys", "interleaver", "path", "parent", "processor", "peft")
_RENAME_ARGUMENTS = {
    "attn_rename": "attn_name",
    "mlp_rename": "mlp_name",
    "ln_final_rename": "ln_final_name",
    "lm_head_rename": "lm_head_name",
    "model_rename": "model_name",
    "layers_rename": "layers_name",
}


def with_older_names(rename_config: RenameConfig | None, options: dict[str, Any]) -> RenameConfig | None:
    """A `RenameConfig` with the names given as `attn_rename=`, `mlp_rename=`, ...; they are taken out of `options`.

    As in 1.x, a name that matches nothing is passed over.
    """
    given = {field: options.pop(name) for name, field in _RENAME_ARGUMENTS.items() if name in options}
    names: dict[str, Any] = {f: [name] if isinstance(name, str) else name for f, name in given.items() if name}
    return dataclasses.replace(rename_config or RenameConfig(), **names) if names else rename_config


def module_of_class(model: str | nn.Module, automodel: Any, options: dict[str, Any], remote: bool) -> str | nn.Module:
    """What to wrap for `automodel=`: the model as `automodel` loads it, with its weights.

    Args:
        model: A hub id or folder, or a module, which stays as it is.
        automodel: A class with `from_pretrained`, or the name of one in transformers; None for nnsight's choice.
        options: The arguments of `from_pretrained`. Those used are taken out.
        remote: The model will run on a remote service, which chooses the class itself.

    Raises:
        ValueError: transformers has no such class, or the model is remote.
    """
    if automodel is None or isinstance(model, nn.Module):
        return model
    loader: Any = getattr(transformers, automodel, None) if isinstance(automodel, str) else automodel
    if not hasattr(loader, "from_pretrained"):
        raise ValueError(
            f"automodel={automodel!r} is no class with from_pretrained; give a class such as "
            "transformers.AutoModelForCausalLM, or its name."
        )
    if loader is transformers.AutoModelForCausalLM:
        return model
    if remote:
        raise ValueError(
            f"automodel={automodel!r} says how weights are loaded here, and with remote=True none are. "
            "Drop one of the two."
        )
    taken = {name: options.pop(name) for name in list(options) if name not in _NNSIGHT_ALONE}
    return loader.from_pretrained(model, **taken)
