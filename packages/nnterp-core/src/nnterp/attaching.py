"""Attach dictionaries to a model: their features become values like any other."""

from __future__ import annotations

from typing import Any

from nnterp.errors import ShapeError, Unavailable
from nnterp.named_transformer import NamedTransformer
from nnterp.table import Value
from nnterp.traced import Dictionary
from nnterp.values import Attachment, canonical, features_of, spelled

_NOT_ACTIVATIONS = ("features", "router_choices")


def attach(
    model: NamedTransformer, dictionary: Dictionary, at: str | None = None, writes: str | None = None
) -> tuple[int, int]:
    """Make the features of a dictionary a value of a model: `model.features[layer]`.

    Reading the features encodes the value that the dictionary reads: `[batch, seq, features]`, a new tensor in the
    dictionary's dtype and on its device. Writing them decodes the change and adds it to the value that the dictionary
    writes, in the model's dtype. The reconstruction error therefore stays as it is, and features that are written back
    unchanged leave the run unchanged, bit for bit in float32. A transcoder reads one value and writes a later one: the
    change is added when the forward pass reaches the later one.

    Several dictionaries may be attached, also to one layer; those of a layer are numbered from 0.

    Args:
        model: The model; its weights may be absent.
        dictionary: A sparse autoencoder or a transcoder.
        at: The value that it encodes, with its layer: "layers_output[12]", or TransformerLens' name for it,
            "blocks.12.hook_resid_post". `dictionary.reads` if None. Values with an axis of heads are flattened to
            `[batch, seq, heads × head_dim]`.
        writes: The value that it decodes to; if None, `dictionary.writes` for a transcoder, and `at` otherwise.

    Returns:
        The layer and the dictionary's number in it, with which `model.features` can be indexed.

    Raises:
        ValueError: It is not known what the dictionary reads, or what a transcoder writes, there is no such value, the
            value has no layer or no axis of positions, a transcoder writes before it reads, or the dictionary is
            attached there already.
        IndexError: There is no such layer.
        Unavailable: The model does not have the value.
        ShapeError: The dictionary's width is not the model's; raised by the first read for values whose width no config
            declares, such as `mlp_neurons`.
        TypeError: It is no `Dictionary`.
        InsideTraceError: Called inside a trace of this model.

    Example:
        print(attach(model, nnterp.toy_dictionary("residual_4"), at="layers_output[2]"))  # → (2, 0)
        with torch.no_grad(), model.trace("The capital of France is"):
            features = model.features[2].save()  # [batch, seq, features]
    """
    model.require_no_trace("attach()")
    if not isinstance(dictionary, Dictionary):
        raise TypeError(f"attach() takes an nnterp.Dictionary, not a {type(dictionary).__name__}.")
    there = model.attachments
    at = dictionary.reads if at is None else at
    if at is None:
        raise ValueError(
            "The dictionary does not say which value it encodes (its `reads` is None): give at='layers_output[12]'."
        )
    if writes is None:
        if dictionary.transcodes and dictionary.writes is None:
            raise ValueError(
                f"The dictionary ({dictionary.source}) is a transcoder and does not say which value it decodes to: "
                "give writes='mlps_output[12]'."
            )
        writes = at if not dictionary.is_transcoder or dictionary.writes is None else dictionary.writes
    reads_value, reads = _value(model, at, "at")
    writes_value, writes_at = _value(model, writes, "writes")
    if (writes_at[1], writes_value.rank) < (reads[1], reads_value.rank):
        raise ValueError(
            f"The dictionary reads {spelled(reads)} and writes {spelled(writes_at)}, which comes before it."
        )
    _require_width(model, reads_value, dictionary.width, f"encodes activations of width {dictionary.width}")
    width = dictionary.decoder.shape[1]
    _require_width(model, writes_value, width, f"decodes to activations of width {width}")
    for (layer, number), other in there.items():
        if other.dictionary is dictionary and (other.reads, other.writes) == (reads, writes_at):
            raise ValueError(
                f"This dictionary is attached to {spelled(reads)} already, as model.features[{layer}, {number}]."
            )
    layer = reads[1]
    taken = {number for other, number in there if other == layer}
    index = layer, next(number for number in range(len(taken) + 1) if number not in taken)
    _forget(model)
    there[index] = Attachment(dictionary, reads, writes_at)
    return index


def detach(model: NamedTransformer, at: int | tuple[int, int] | str | None = None) -> None:
    """Remove attached dictionaries from a model; the numbers of the others do not change.

    Args:
        model: The model.
        at: Which one, as `model.features` is indexed: its layer, its layer and number, or the value that it reads or
            writes. None removes all.

    Raises:
        ValueError: `at` may mean several dictionaries; lists them.
        Unavailable: No dictionary is attached there.
        InsideTraceError: Called inside a trace of this model.

    Example:
        attach(model, nnterp.toy_dictionary("residual_4"))
        detach(model)
    """
    model.require_no_trace("detach()")
    _forget(model)
    if at is None:
        model.attachments.clear()
        return
    if not model.attachments:
        raise Unavailable(f"detach(at={at!r}): no dictionary is attached to this model.")
    del model.attachments[features_of(model, model.attachments, at).index]


def _forget(model: NamedTransformer) -> None:
    """Forget what was found of the features of other dictionaries, such as how many there are."""
    for key in [key for key in model.proofs if "features" in key]:
        del model.proofs[key]


def _value(model: NamedTransformer, name: Any, argument: str) -> tuple[Value, tuple[str, int]]:
    """A value of the table that a dictionary can read or write, and its name and layer from 0.

    Raises:
        ValueError, IndexError, Unavailable: There is none; see `attach`.
    """
    value, layer = canonical(name)
    if not value.per_layer or layer is None:
        raise ValueError(f"{argument}={name!r} names no layer; give a value of one layer, such as 'layers_output[12]'.")
    if not value.shape.startswith("[batch, seq, ") or value.axes > 4 or value.name in _NOT_ACTIVATIONS:
        raise ValueError(f"{argument}={name!r}: {value.name} {value.shape} holds no activations for each position.")
    if not -model.num_layers <= layer < model.num_layers:
        raise IndexError(f"{argument}={name!r}: the model has {model.num_layers} layers, from 0.")
    layer %= model.num_layers
    model.place(value.name, layer)
    if value.shape.endswith("hidden]") and value.role == "layer" and not model.readout.layout.plain:
        raise Unavailable(f"{model.model_class} keeps several streams side by side, which no dictionary is made for.")
    return value, (value.name, layer)


def _require_width(model: NamedTransformer, value: Value, width: int, does: str) -> None:
    """Raise if a dictionary cannot have been made for a value; a width that is not declared is checked when it runs.

    Raises:
        ShapeError: It is not as wide.
    """
    heads = {"heads": model.num_heads, "kv_heads": model.num_kv_heads}
    axes = value.shape.strip("[]").split(", ")
    known = model.hidden_size if axes[2:] == ["hidden"] else None
    if axes[2] in heads and axes[3] == "head_dim" and None not in (heads[axes[2]], model.head_dim):
        known = (heads[axes[2]] or 0) * (model.head_dim or 0)
    if known is not None and known != width:
        raise ShapeError(
            f"The dictionary {does}, and {value.name} of {model.model_class} has width {known}: it was made for "
            "another model or another value."
        )
