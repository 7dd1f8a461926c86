"""Values of images: where they are served, and which layers run only with an image."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nnterp.errors import Unavailable, Unproven
from nnterp.facts import Facts
from nnterp.huggingface import takes_images
from nnterp.table import Value
from nnterp.traced import Place, Site
from nnterp.warn import warn
from nnterp.wording import ranges


def missing(message: str, reason: str) -> Unavailable:
    """The error of a value that is not there; its `reason` says why, without naming the layer."""
    error = Unavailable(message)
    error.reason = reason
    return error


def require_images_proven(facts: Facts, module: nn.Module, value: Value) -> None:
    """Raise unless a run with an image has proven where a value of images is.

    Raises:
        Unproven: There was no such run.
        Unavailable: The model takes no images, or does not have the value.
    """
    vision, owner = facts.vision, facts.anatomy.model_class
    if vision is None and takes_images(module):
        raise Unproven(
            f"{owner}: {value.name} is found in a run with an image, and there was none: run one, or call "
            "model.validate_images(prompt) with a processor's output."
        )
    reason = "it takes no images" if vision is None else vision.reasons.get(value.name)
    if reason is not None:
        raise missing(f"{owner} has no {value.name}: {reason}.", reason)


def of_images(facts: Facts, value: Value, layer: int | tuple[int, int] | None) -> Place:
    """A value of the vision tower, or what the projector returns."""
    vision = facts.vision
    assert vision is not None
    if value.role == "projector":
        assert vision.projector is not None
        return Site(vision.projector, "output")
    assert isinstance(layer, int)
    return Site((vision.attentions if value.role == "self_attn" else vision.layers)[layer], value.side or "output")


def layers_that_run(facts: Facts, asked: Iterable[int] | None, images: bool) -> list[int]:
    """See `NamedTransformer.layers_of_texts`.

    Returns:
        Indices of layers, from 0.

    Raises:
        Unavailable: A layer that was asked for runs only with an image.
    """
    idle = () if images else facts.only_with_image
    if asked is None:
        if idle:
            warn(f"Layers {ranges(idle)} of {facts.anatomy.model_class} run only with an image: they are left out.")
        return [layer for layer in range(facts.anatomy.num_layers) if layer not in idle]
    layers = list(asked)
    if missing := [layer for layer in layers if layer in idle]:
        raise Unavailable(
            f"Layers {ranges(missing)} of {facts.anatomy.model_class} run only with an image, and this function "
            f"runs texts. Layers {ranges([i for i in range(facts.anatomy.num_layers) if i not in idle])} run on texts."
        )
    return layers
