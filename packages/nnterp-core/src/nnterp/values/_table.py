"""The table of values. Adding a value is adding a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnterp.anatomy import Anatomy
from nnterp.errors import Unavailable

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Site:
    """A place in the forward pass where a module hands a tensor in or out."""

    path: str
    side: Side


@dataclass(frozen=True)
class Value:
    """One thing that can be read and written in a trace.

    Attributes:
        name: The accessor's name on the model.
        role: The part it belongs to: a field of `Layer` for per-layer values, of `Anatomy` for the others.
        side: Whether it enters or leaves that part.
        shape: Its axes.
        rank: Forward order among the values of one layer (or of the model, for values that are not per layer).
        description: One sentence for the reference page.
        per_layer: Whether it is indexed by layer.
    """

    name: str
    role: str
    side: Side
    shape: str
    rank: int
    description: str
    per_layer: bool = True

    def site(self, anatomy: Anatomy, layer: int | None = None) -> Site:
        """Where the value is served in one model.

        Raises:
            Unavailable: The model, or this layer, has no such part.
        """
        if not self.per_layer:
            path = getattr(anatomy, self.role)
            if path is None:
                raise Unavailable(f"{anatomy.model_class} has no {self.name}: {anatomy.absent.get(self.role, 'absent')}.")
            return Site(path, self.side)
        assert layer is not None
        if self.role == "layer":
            return Site(anatomy.blocks[layer].path, self.side)
        part = anatomy.part(self.role, layer)
        return Site(part.entry if self.side == "input" else part.exit, self.side)


_STREAM = "[batch, seq, hidden]"

VALUES: dict[str, Value] = {
    value.name: value
    for value in (
        Value("token_embeddings", "embed_tokens", "output", _STREAM, 0, "The token embeddings, before positions.", False),
        Value("layers_input", "layer", "input", _STREAM, 0, "The residual stream entering a layer (resid_pre)."),
        Value("mixers_input", "mixer", "input", _STREAM, 1, "What the sequence mixer of any kind is given."),
        Value("attentions_input", "self_attn", "input", _STREAM, 1, "What the attention module is given."),
        Value("attentions_output", "self_attn", "output", _STREAM, 2, "What the attention module returns."),
        Value("mixers_output", "mixer", "output", _STREAM, 2, "What the sequence mixer of any kind returns."),
        Value("mlps_input", "mlp", "input", _STREAM, 3, "What the feed-forward is given."),
        Value("mlps_output", "mlp", "output", _STREAM, 4, "What the feed-forward returns."),
        Value("layers_output", "layer", "output", _STREAM, 5, "The residual stream leaving a layer (resid_post)."),
        Value("ln_final_output", "ln_final", "output", _STREAM, 6, "The normalised stream that is unembedded.", False),
    )
}


def get_value(name: str) -> Value:
    """The row called `name`.

    Raises:
        ValueError: No such value; lists the names there are.
    """
    try:
        return VALUES[name]
    except KeyError:
        raise ValueError(f"There is no value called {name!r}; there are: {', '.join(VALUES)}.") from None
