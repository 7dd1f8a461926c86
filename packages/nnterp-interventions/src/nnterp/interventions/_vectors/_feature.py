"""A steering vector that is the direction of one feature of an attached dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnterp.errors import Unavailable
from nnterp.indices import read_index
from nnterp.interventions._vectors._belonging import identity_of
from nnterp.interventions._vectors._vector import SteeringVector
from nnterp.values import canonical

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def feature_vector(model: StandardizedTransformer, layer: int | tuple[int, int] | str, feature: int) -> SteeringVector:
    """The direction that a feature is decoded to, as a steering vector of the stream.

    `factor * vector` is what raising the feature by `factor` adds to the stream at every position that is steered. To
    set a feature to a value instead, write it: `model.features[layer] = ...`.

    Args:
        model: The model, with the dictionary attached.
        layer: Which dictionary, as `model.features` is indexed: its layer, its layer and number, or the name of the
            value that it reads or writes.
        feature: The feature's index; negative counts from the last.

    Returns:
        A `SteeringVector` with a direction at one layer, `[hidden]`, float32 on the CPU: the feature's decoder row, not
        normalised. The layer is the one that the dictionary writes, or the one before if it writes `layers_input`.

    Raises:
        IndexError: There is no such layer, dictionary or feature.
        ValueError: Several dictionaries are meant, or the dictionary writes something else than the stream that leaves
            a layer, or what is added to it as it is.
        Unavailable: No dictionary is attached there; the dictionary scales what it decodes by each activation, so that
            raising a feature adds another length at every position; or (`Unproven`) it writes what an MLP adds, and the
            weights are not loaded: call `model.dispatch()`.

    Example:
        layer, _ = attach(model, nnterp.toy_dictionary("residual_4"))
        vector = feature_vector(model, layer, 3)
        with torch.no_grad(), model.steering(vector, factor=8):
            ids = model.generate("The weather is", max_new_tokens=3)
    """
    features = model.place("features", layer)
    dictionary, writes = features.dictionary, features.writes  # type: ignore[attr-defined]
    value, at = canonical(writes)
    assert at is not None
    if dictionary.scaling is not None and dictionary.scaling.restores:
        raise Unavailable(
            f"The dictionary that writes {writes} scales what it decodes by each activation "
            f"({type(dictionary.scaling).__name__}): raising a feature adds another length at every position, and no "
            f"one vector does the same. Write its features instead: model.features[{layer!r}] = ..."
        )
    index = read_index(feature, dictionary.num_features, "feature", "features")
    if value.name == "layers_input" and at > 0:
        at -= 1
    elif value.name != "layers_output" and not _is_added(model, value.name, at):
        raise ValueError(
            f"The dictionary writes {writes}, which is not added as it is to the stream that leaves a layer, so its "
            f"directions are no steering vectors. Write its features instead: model.features[{layer!r}] = ..."
        )
    direction = dictionary.decoder[index].detach()
    return SteeringVector(
        {at: direction},
        **identity_of(model),
        method=f"feature {index} of {features.reads}",  # type: ignore[attr-defined]
    )


def _is_added(model: StandardizedTransformer, name: str, layer: int) -> bool:
    """Whether a value is what the feed-forward adds to the stream, after which the layer does nothing more to it."""
    if name not in ("mlps_output", "mlp_contributions"):
        return False
    structure = model.facts.residual_of(layer)
    scale = structure.stream_scale
    plain = structure.kind in ("sequential", "parallel", "single") and isinstance(scale, (int, float)) and scale == 1
    return plain and model.place(name, layer) == model.place("mlp_contributions", layer)
