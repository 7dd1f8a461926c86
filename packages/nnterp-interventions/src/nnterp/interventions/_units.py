"""The heads or neurons that a call asks for, and how many of them each layer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.discovery import model_inputs
from nnterp.indices import integers, read_indices
from nnterp.inputs import EncoderDecoderPrompt, Row, encode
from nnterp.interventions._engine import At, Shortcuts, axes_of, units_axis
from nnterp.interventions._states import states_of
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def units_of(model: StandardizedTransformer, names: list[str], heads: Any, layers: Sequence[At]) -> list[int | None]:
    """The heads (or neurons) asked for, as indices from 0; [None] if none are, which means all of them together.

    Args:
        model: The model.
        names: The values whose heads are meant.
        heads: An index, several, "all", or None; see `nnterp.indices`.
        layers: The layers, counted from 0; of features, (layer, number) where a layer has several dictionaries.

    Raises:
        TypeError: `heads` is something else than indices.
        ValueError: The values have no axis of heads or neurons, or not the same; `heads` is empty; or the layers have
            different numbers of them, and "all" or a negative index was asked for.
        IndexError: A layer has no such head.
    """
    if heads is None:
        return [None]
    axes = {axes_of(get_value(name))[1 + units_axis(name)] for name in names}
    if len(axes) > 1:
        raise ValueError(f"{', '.join(names)} do not have the same kind of units ({', '.join(sorted(axes))}).")
    axis = axes.pop()
    plain = integers(heads, "heads")
    sizes = _sizes(model, names, axis, layers)
    if sizes is None:
        listed: list[Any] = plain if isinstance(plain, list) else [plain]
        if any(not isinstance(head, int) or head < 0 for head in listed):
            raise ValueError(f"This model's config does not say how many {axis} it has; give indices from 0.")
        return listed
    size = min(sizes.values())
    wanted = read_indices(plain, size, "heads", axis) if isinstance(plain, slice) else [] if plain is None else plain
    wanted = [wanted] if isinstance(wanted, int) else wanted
    return _counted(wanted, sizes, axis)


def _counted(wanted: list[int], sizes: dict[At, int], axis: str) -> list[int | None]:
    """Indices from 0 of the heads wanted (all if none are), of as many as each layer has."""
    size = min(sizes.values())
    if len(set(sizes.values())) > 1 and (not wanted or min(wanted) < 0):
        counts = ", ".join(f"layer {layer} has {count}" for layer, count in sizes.items())
        raise ValueError(f"These layers do not have equally many {axis} ({counts}); give indices from 0.")
    for head in wanted:
        if not -size <= head < size:
            where = "the model has" if len(set(sizes.values())) == 1 else "one of the layers has"
            raise IndexError(f"heads={head}: {where} {size} {axis}, so indices go from {-size} to {size - 1}.")
    return [head % size for head in wanted] if wanted else list(range(size))


def _sizes(
    model: StandardizedTransformer, names: Sequence[str], axis: str, layers: Sequence[At]
) -> dict[At, int] | None:
    """How many heads (or neurons) each layer has; None if that is unknown.

    Counted in a short run, once for each value and layer; read from the config if the model cannot run now.
    """
    if not model.dispatched or model.interleaver.interleaving:
        declared = {"heads": model.num_heads, "kv_heads": model.num_kv_heads, "neurons": model.intermediate_size}
        size = declared.get(axis)
        return None if size is None else dict.fromkeys(layers, size)
    missing = [(name, layer) for name in names for layer in layers if ("units", name, layer) not in model.proofs]
    if missing:
        ((states,), _) = states_of(model, [_probe(model)], missing, Shortcuts())
        counts = {("units", *key): tensor.shape[units_axis(key[0])] for key, tensor in states.items()}
        model.proofs.update(counts)
    return {layer: min(model.proofs["units", name, layer] for name in names) for layer in layers}


def _probe(model: StandardizedTransformer) -> Row:
    """A prompt of two tokens; in an encoder-decoder model, of two for the decoder and some for the encoder."""
    if not model.num_encoder_layers:
        return Row((1, 1))
    given = model_inputs(model._module, torch.tensor([[1, 1]]))
    (heard,) = (tensor[0] for name, tensor in given.items() if name != "decoder_input_ids")
    heard = heard if heard.is_floating_point() else heard.tolist()
    return encode(model, EncoderDecoderPrompt(heard, [1, 1]))[0]
