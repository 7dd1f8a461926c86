"""The table of values: everything that can be read or written in a forward pass, one row each. Adding a value is adding
a row; `nnterp.values` says where each is served in a given model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nnterp.record import Record

Side = Literal["input", "output"]
Stack = Literal["layers", "vision", "encoder", "cross"]


class Label(Record):
    """The part of a row that travels with a model to a remote worker.

    Attributes:
        name: The accessor's name on the model.
        shape: Its axes.
        description: One sentence.
        per_layer: Whether it is indexed by layer.
        stack: As in `Value`.
    """

    def __init__(self, name: str, shape: str, description: str, per_layer: bool, stack: str = "layers") -> None:
        self.name, self.shape, self.description, self.per_layer = name, shape, description, per_layer
        self.stack = stack

    @property
    def axes(self) -> int:
        """Number of axes."""
        return self.shape.count(",") + 1


@dataclass(frozen=True)
class Value:
    """One thing that can be read and written in a trace.

    Attributes:
        name: The accessor's name on the model.
        shape: Its axes.
        rank: Forward order among the values of one layer (or of the model, for values that are not per layer).
        description: One sentence for the reference page.
        role: The part it belongs to: a field of `Layer` for per-layer values, of `Anatomy` for the others; "layer" for
            the layer itself.
        side: For the input or output of a part, which of the two; None for every other value.
        finder: For every other value, the name of the function that finds it: a key of `nnterp.values`' `FINDERS`.
        per_layer: Whether it is indexed by layer.
        stack: Which layers these are: "layers", those of the residual stream; "vision", those of the vision tower (and
            all other values of images, per layer or not); "encoder", those of an encoder-decoder model's encoder; or
            "cross", those of its decoder, of which the value belongs to the attention to the encoder.
        aliases: TransformerLens' names for it, `{}` standing for the layer.
        note: For the reference page: what a reader must know to use it correctly.
        label: The part of the row that an accessor needs.
    """

    name: str
    shape: str
    rank: float
    description: str
    role: str = ""
    side: Side | None = None
    finder: str = "edge"
    per_layer: bool = True
    stack: Stack = "layers"
    aliases: tuple[str, ...] = ()
    note: str = ""
    label: Label = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", Label(self.name, self.shape, self.description, self.per_layer, self.stack))

    @property
    def axes(self) -> int:
        """Number of axes."""
        return self.label.axes

    @property
    def of_encoder(self) -> bool:
        """Whether its positions are those of the encoder's input."""
        return self.stack == "encoder" or (self.stack == "cross" and self.shape.startswith("[batch, keys"))

    @property
    def base(self) -> str:
        """In an encoder-decoder model, the same value of a model's own layers: that of `encoder_layers_output` is
        `layers_output`."""
        return self.name.removeprefix(f"{self.stack}_") if self.stack in ("encoder", "cross") else self.name

    @property
    def is_pattern(self) -> bool:
        """Whether its last two axes are queries and keys."""
        return self.shape.endswith("query, key]")


STREAM = "[batch, seq, hidden]"
HEADS = "[batch, seq, heads, head_dim]"
KV_HEADS = "[batch, keys, kv_heads, head_dim]"
PATTERN = "[batch, heads, query, key]"
EAGER = "Needs `enable_attention_probs=True` (eager attention)."
NEW = "Where it is a sum or a multiple, reading makes a new tensor: assign it, an edit in place may have no effect."
PROMPT = "In passes over several tokens: the step of a generation computes another operation."
