"""Which model a vector belongs to, and whether it fits another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

MODEL_FIELDS = ("model", "revision", "num_layers", "model_type")


class Belonging(Protocol):
    """What is asked of a `SteeringVector` here."""

    directions: Mapping[int, torch.Tensor]
    model: str | None
    method: str

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the directions."""
        ...

    def check(self, model: StandardizedTransformer) -> None:
        """Raise if the vector is of another model."""
        ...


def identity_of(model: StandardizedTransformer) -> dict[str, Any]:
    """What a vector remembers of the model it was made for."""
    return {
        "model": str(model.repo_id or model.model_class),
        "revision": model.revision,
        "num_layers": model.num_layers,
        "model_type": getattr(model._module.config, "model_type", None),
    }


def model_of(vector: Belonging) -> dict[str, Any]:
    """What a vector remembers of its model."""
    return {name: getattr(vector, name) for name in MODEL_FIELDS}


def require_fit(vector: Belonging, model: StandardizedTransformer) -> None:
    """Raise if a model has another width, or lacks a layer of the vector.

    Raises:
        ValueError: It does; names both models.
    """
    name, own = identity_of(model)["model"], vector.model or "an unknown model"
    width = model.hidden_size or model.readout.layout.width
    if width and vector.hidden_size != width:
        raise ValueError(
            f"The vector of {own} has width {vector.hidden_size}; the residual stream of {name} has width {width}."
        )
    if vector.layers[-1] >= model.num_layers:
        raise ValueError(
            f"The vector of {own} has a direction for layer {vector.layers[-1]}; {name} has {model.num_layers} layers."
        )


def require_same(mine: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise if what is remembered of two models says that they are different ones.

    Raises:
        ValueError: Their names, numbers of layers or (where a name is unknown) types differ.

    Warns:
        UserWarning: Their revisions differ.
    """
    name, other = mine["model"], others["model"]
    hint = "If it is the same model under another name, say so: vector.for_model(model)."
    if name is not None and other is not None:
        if short_name(name) != short_name(other):
            raise ValueError(f"The vector is of {name}, not of {other}. {hint}")
        if (mine["revision"] or "main") != (others["revision"] or "main"):
            warn(
                f"The vector was made with revision {mine['revision'] or 'main'} of {name}; this is revision "
                f"{others['revision'] or 'main'}."
            )
    elif None not in (mine["model_type"], others["model_type"]) and mine["model_type"] != others["model_type"]:
        mine_is, other_is = (of["model"] or f"a model of type {of['model_type']}" for of in (mine, others))
        raise ValueError(f"The vector is of {mine_is}, not of {other_is}. {hint}")
    if None not in (mine["num_layers"], others["num_layers"]) and mine["num_layers"] != others["num_layers"]:
        raise ValueError(
            f"The vector is of {name or 'a model'} with {mine['num_layers']} layers, not of {other or 'one'} with "
            f"{others['num_layers']}."
        )


def short_name(name: str) -> str:
    """The last part of a hub id or path."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
