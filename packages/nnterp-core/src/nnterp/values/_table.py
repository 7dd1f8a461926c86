"""The table of values. Adding a value is adding a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nnterp.anatomy import Anatomy
from nnterp.errors import Unavailable
from nnterp.values import _serve
from nnterp.values._label import Label
from nnterp.values._places import Place, Side, Site

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer


@dataclass(frozen=True)
class Value:
    """One thing that can be read and written in a trace.

    Attributes:
        name: The accessor's name on the model.
        shape: Its axes.
        rank: Forward order among the values of one layer (or of the model, for values that are not per layer).
        description: One sentence for the reference page.
        per_layer: Whether it is indexed by layer.
        role: The part it belongs to: a field of `Layer` for per-layer values, of `Anatomy` for the others.
        side: Whether it enters or leaves that part; None for values that are no edge of a part.
        serve: For those, the function (model, layer) → `Place` that says where it is served.
        aliases: TransformerLens' names for it, `{}` standing for the layer.
        note: What has to be known to use it rightly, for the reference page.
        label: What an accessor has to know of it.
    """

    name: str
    shape: str
    rank: float
    description: str
    per_layer: bool = True
    role: str = ""
    side: Side | None = None
    serve: Callable[[StandardizedTransformer, int], Place] | None = None
    aliases: tuple[str, ...] = ()
    note: str = ""
    label: Label = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", Label(self.name, self.shape, self.description, self.per_layer))

    @property
    def axes(self) -> int:
        """How many axes it has."""
        return self.label.axes

    def site(self, anatomy: Anatomy, layer: int | None = None) -> Site:
        """Where a value that is an edge of a part is served in one model.

        Raises:
            Unavailable: The model, or this layer, has no such part, or the value is no edge of one.
        """
        if self.side is None:
            raise Unavailable(f"{self.name} is no module's input or output.")
        if not self.per_layer:
            path = getattr(anatomy, self.role)
            if path is None:
                raise Unavailable(
                    f"{anatomy.model_class} has no {self.name}: {anatomy.absent.get(self.role, 'absent')}."
                )
            return Site(path, self.side)
        assert layer is not None
        if self.role == "layer":
            return Site(anatomy.blocks[layer].path, self.side)
        part = anatomy.part(self.role, layer)
        if self.leaves_inside(anatomy, layer):
            raise Unavailable(f"{self.name}[{layer}] is no module's output: it leaves inside {part.exit}.")
        return Site(part.entry if self.side == "input" else part.exit, self.side)

    def leaves_inside(self, anatomy: Anatomy, layer: int | None) -> bool:
        """Whether it is what leaves a part inside the part's own module, see `Part.closing`."""
        if self.side != "output" or not self.per_layer or self.role == "layer":
            return False
        return anatomy.part(self.role, layer or 0).closing is not None

    def place(self, model: StandardizedTransformer, layer: int | tuple[int, int] | None = None) -> Place:
        """Where the value is served in one model; looked up once.

        Args:
            model: The model.
            layer: The layer; for one of several attentions in a layer, the layer and its number in it.

        Raises:
            Unavailable: The model, or this layer, does not have it; says why, and which layers do.
        """
        key = (self.name, layer)
        places = model.__dict__.get("_places")
        if places is None:
            places = {}
            object.__setattr__(model, "_places", places)
        place = places.get(key)
        if place is None:
            if isinstance(layer, tuple):
                if self.role != "self_attn" or self.name == "attention_contributions":
                    raise Unavailable(f"{self.name}{list(layer)}: {self.name} has one index, the layer's.")
                place = _serve.one_of_several(model, self.name, self.side, *layer)
            elif self.side is None:
                assert self.serve is not None
                place = self.serve(model, layer or 0)
            elif self.leaves_inside(model.anatomy, layer):
                place = _serve.end_inside(model, layer or 0, self.role)
            else:
                place = self.site(model.anatomy, layer)
            place = places[key] = _serve.as_shown(model, place)
        return place


_STREAM = "[batch, seq, hidden]"
_HEADS = "[batch, seq, heads, head_dim]"
_KV_HEADS = "[batch, keys, kv_heads, head_dim]"
_PATTERN = "[batch, heads, query, key]"
_EAGER = "Needs `enable_attention_probs=True` (eager attention)."
_NEW = "A new tensor where it is a sum or a multiple: assign it, an edit in place may have no effect."


def _edge(
    name: str,
    role: str,
    side: Side,
    shape: str,
    rank: float,
    description: str,
    per_layer: bool = True,
    aliases: tuple[str, ...] = (),
) -> Value:
    return Value(name, shape, rank, description, per_layer, role, side, None, aliases)


def _inner(
    name: str,
    role: str,
    shape: str,
    rank: float,
    description: str,
    serve: Callable,
    aliases: tuple[str, ...] = (),
    note: str = "",
) -> Value:
    return Value(name, shape, rank, description, True, role, None, serve, aliases, note)


VALUES: dict[str, Value] = {
    value.name: value
    for value in (
        _edge(
            "token_embeddings",
            "embed_tokens",
            "output",
            _STREAM,
            0,
            "The token embeddings, before positions.",
            False,
            ("hook_embed",),
        ),
        _edge(
            "layers_input",
            "layer",
            "input",
            _STREAM,
            0,
            "The residual stream entering a layer (resid_pre).",
            True,
            ("blocks.{}.hook_resid_pre",),
        ),
        _edge("mixers_input", "mixer", "input", _STREAM, 1, "What the sequence mixer of any kind is given."),
        _edge("attentions_input", "self_attn", "input", _STREAM, 1, "What the attention module is given."),
        _inner(
            "attention_queries",
            "self_attn",
            _HEADS,
            1.1,
            "Queries, after rotary embedding.",
            _serve.attention("attention_queries"),
            ("blocks.{}.attn.hook_rot_q", "blocks.{}.attn.hook_q"),
            "TransformerLens' `hook_q` and `hook_k` are before the rotary embedding: the same where there is none.",
        ),
        _inner(
            "attention_keys",
            "self_attn",
            _KV_HEADS,
            1.2,
            "Keys, after rotary embedding.",
            _serve.attention("attention_keys"),
            ("blocks.{}.attn.hook_rot_k", "blocks.{}.attn.hook_k"),
            "As many heads as the model has key-value heads: under grouped-query attention fewer than queries. "
            "With a cache, the keys of all tokens so far.",
        ),
        _inner(
            "attention_values",
            "self_attn",
            _KV_HEADS,
            1.3,
            "Values.",
            _serve.attention("attention_values"),
            ("blocks.{}.attn.hook_v",),
            "As many heads as the model has key-value heads. With a cache, the values of all tokens so far. Models "
            "whose attention is no function of its own (BLOOM, MPT, BERT, ...) pass them where they meet the "
            "probabilities, after these. DiffLlama's heads average vectors twice as wide, of half as many "
            "heads: a new tensor there.",
        ),
        _inner(
            "attention_scores",
            "self_attn",
            _PATTERN,
            1.4,
            "What the softmax is given: masked, biased and capped.",
            _serve.attention("attention_scores"),
            ("blocks.{}.attn.hook_attn_scores",),
            _EAGER,
        ),
        _inner(
            "attention_probabilities",
            "self_attn",
            _PATTERN,
            1.5,
            "How much each position attends to each (pattern).",
            _serve.attention("attention_probabilities"),
            ("blocks.{}.attn.hook_pattern",),
            f"{_EAGER} Rows sum to one, or below it where the model has attention sinks.",
        ),
        _inner(
            "attention_head_outputs",
            "self_attn",
            _HEADS,
            1.6,
            "The output of each head before W_O (z).",
            _serve.attention("attention_head_outputs"),
            ("blocks.{}.attn.hook_z",),
            "What W_O is given: after the gate, for models that gate their heads.",
        ),
        _inner(
            "attention_head_contributions",
            "self_attn",
            "[batch, seq, heads, hidden]",
            1.7,
            "Each head's output through W_O.",
            _serve.head_contributions,
            ("blocks.{}.attn.hook_result",),
            f"Their sum over heads and the bias of W_O make `attentions_output`. {_NEW}",
        ),
        _inner(
            "mixer_states",
            "mixer",
            "[batch, ...]",
            1.8,
            "The recurrent state of a linear attention or state space mixer after the last position.",
            _serve.state,
            (),
            "In runs with a cache (`use_cache=True`), to which it is handed: writing it changes what the next tokens "
            "go on from, and nothing of this forward pass. Its axes are the mixer's own: `[batch, channels, state]` in "
            "Mamba, `[batch, heads, key, value]` in delta rules.",
        ),
        _edge("attentions_output", "self_attn", "output", _STREAM, 2, "What the attention module returns."),
        _edge("mixers_output", "mixer", "output", _STREAM, 2, "What the sequence mixer of any kind returns."),
        _inner(
            "attention_contributions",
            "self_attn",
            _STREAM,
            2.5,
            "What attention adds to the residual stream.",
            _serve.contribution("self_attn"),
            ("blocks.{}.hook_attn_out",),
            f"After post-norms and multipliers. {_NEW}",
        ),
        _inner(
            "mixer_contributions",
            "mixer",
            _STREAM,
            2.5,
            "What the sequence mixer of any kind adds to the residual stream.",
            _serve.contribution("mixer"),
            (),
            f"After post-norms and multipliers; of all mixers of a layer that has several. {_NEW}",
        ),
        _inner(
            "layers_mid",
            "layer",
            _STREAM,
            2.7,
            "The residual stream between mixer and feed-forward (resid_mid).",
            _serve.mid,
            ("blocks.{}.hook_resid_mid",),
            "Not in parallel blocks, whose feed-forward reads what attention reads.",
        ),
        _edge("mlps_input", "mlp", "input", _STREAM, 3, "What the feed-forward is given."),
        _inner(
            "router_logits",
            "mlp",
            "[batch, seq, experts]",
            3.2,
            "The router's score of each expert.",
            _serve.router(0),
            (),
        ),
        _inner(
            "router_choices",
            "mlp",
            "[batch, seq, chosen]",
            3.3,
            "Indices of the experts each token is sent to.",
            _serve.router(1),
            (),
        ),
        _inner(
            "mlp_neurons",
            "mlp",
            "[batch, seq, neurons]",
            3.5,
            "Activations of the feed-forward's neurons, after the gate.",
            _serve.neurons("mlp_neurons"),
            ("blocks.{}.mlp.hook_post",),
            "The input of the projection that ends the feed-forward.",
        ),
        _inner(
            "shared_expert_neurons",
            "mlp",
            "[batch, seq, neurons]",
            3.6,
            "Activations of the neurons of the expert that runs on all tokens, in a mixture that has one.",
            _serve.neurons("shared_expert_neurons"),
            (),
            "The chosen experts' have no one shape: each runs on the tokens that are sent to it.",
        ),
        _edge("mlps_output", "mlp", "output", _STREAM, 4, "What the feed-forward returns."),
        _inner(
            "mlp_contributions",
            "mlp",
            _STREAM,
            4.5,
            "What the feed-forward adds to the residual stream.",
            _serve.contribution("mlp"),
            ("blocks.{}.hook_mlp_out",),
            f"After post-norms and multipliers. {_NEW}",
        ),
        _inner(
            "other_contributions",
            "layer",
            _STREAM,
            4.7,
            "What further modules of a layer add to the residual stream (Gemma 3n's and 4's per-layer embeddings).",
            _serve.contribution("layer"),
            (),
            _NEW,
        ),
        _edge(
            "layers_output",
            "layer",
            "output",
            _STREAM,
            5,
            "The residual stream leaving a layer (resid_post).",
            True,
            ("blocks.{}.hook_resid_post",),
        ),
        _edge(
            "ln_final_output",
            "ln_final",
            "output",
            _STREAM,
            6,
            "The normalised stream that is unembedded.",
            False,
            ("ln_final.hook_normalized",),
        ),
    )
}


LABELS: dict[str, Label] = {name: value.label for name, value in VALUES.items()}


def get_label(name: str) -> Label:
    """What accessors know of the value called `name`: light enough to be sent along with a remote request.

    Raises:
        ValueError: No such value; lists the names there are.
    """
    try:
        return LABELS[name]
    except KeyError:
        raise ValueError(f"There is no value called {name!r}; there are: {', '.join(LABELS)}.") from None


def get_value(name: str) -> Value:
    """The row called `name`.

    Raises:
        ValueError: No such value; lists the names there are.
    """
    try:
        return VALUES[name]
    except KeyError:
        raise ValueError(f"There is no value called {name!r}; there are: {', '.join(VALUES)}.") from None


def edges() -> list[Value]:
    """The rows that are an edge of a part: a module's input or output."""
    return [value for value in VALUES.values() if value.side is not None]
