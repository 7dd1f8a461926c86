"""The table of values: everything that can be read or written in a forward pass, one row each. Adding a value is adding
a row; `nnterp.values` says where each is served in a given model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from nnterp.record import Record

Side = Literal["input", "output"]


class Label(Record):
    """The part of a row that travels with a model to a remote worker.

    Attributes:
        name: The accessor's name on the model.
        shape: Its axes.
        description: One sentence.
        per_layer: Whether it is indexed by layer.
        stack: Layers it belongs to: "encoder", "cross" (a decoder's attention to an encoder), or "" (all others).
    """

    def __init__(self, name: str, shape: str, description: str, per_layer: bool, stack: str = "") -> None:
        self.name, self.shape, self.description, self.per_layer, self.stack = name, shape, description, per_layer, stack

    @property
    def of_encoder(self) -> bool:
        """Whether its positions are those of the encoder's input."""
        return self.stack == "encoder" or (self.stack == "cross" and "[batch, keys" in self.shape)

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
        aliases: TransformerLens' names for it, `{}` standing for the layer.
        note: For the reference page: what a reader must know to use it correctly.
        stack, label: As in `Label`; the part of the row that an accessor needs.
    """

    name: str
    shape: str
    rank: float
    description: str
    role: str = ""
    side: Side | None = None
    finder: str = "edge"
    per_layer: bool = True
    aliases: tuple[str, ...] = ()
    note: str = ""
    stack: str = ""
    label: Label = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", Label(self.name, self.shape, self.description, self.per_layer, self.stack))

    @property
    def axes(self) -> int:
        """Number of axes."""
        return self.label.axes

    @property
    def base(self) -> str:
        """The same value of a model's own layers: "layers_output" for "encoder_layers_output"."""
        return self.name.removeprefix(f"{self.stack}_")

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

_ROWS: tuple[Value, ...] = (
    Value(
        "token_embeddings",
        STREAM,
        0,
        "The token embeddings, before positions.",
        role="embed_tokens",
        side="output",
        per_layer=False,
        aliases=("hook_embed",),
    ),
    Value(
        "layers_input",
        STREAM,
        0,
        "The residual stream entering a layer (resid_pre).",
        role="layer",
        side="input",
        aliases=("blocks.{}.hook_resid_pre",),
    ),
    Value(
        "mixers_input",
        STREAM,
        1,
        "What the sequence mixer of any kind is given.",
        role="mixer",
        side="input",
    ),
    Value(
        "attentions_input",
        STREAM,
        1,
        "What the attention module is given.",
        role="self_attn",
        side="input",
    ),
    Value(
        "attention_queries",
        HEADS,
        1.1,
        "Queries, after rotary embedding.",
        role="self_attn",
        finder="attention",
        aliases=("blocks.{}.attn.hook_rot_q", "blocks.{}.attn.hook_q"),
        note="TransformerLens' `hook_q` and `hook_k` are before the rotary embedding: the same where there is none.",
    ),
    Value(
        "attention_keys",
        KV_HEADS,
        1.2,
        "Keys, after rotary embedding.",
        role="self_attn",
        finder="attention",
        aliases=("blocks.{}.attn.hook_rot_k", "blocks.{}.attn.hook_k"),
        note="As many heads as the model has key-value heads: under grouped-query attention fewer than queries. "
        "With a cache, the keys of all tokens so far.",
    ),
    Value(
        "attention_values",
        KV_HEADS,
        1.3,
        "Values.",
        role="self_attn",
        finder="attention",
        aliases=("blocks.{}.attn.hook_v",),
        note="As many heads as the model has key-value heads. With a cache, the values of all tokens so far. Models "
        "that compute attention inline (BLOOM, MPT, BERT, ...) reach them after the scores and probabilities: read "
        "them in that order there. In DiffLlama each head averages vectors twice as wide, of half as many heads: a new "
        "tensor there.",
    ),
    Value(
        "attention_scores",
        PATTERN,
        1.4,
        "What the softmax is given: masked, biased and capped.",
        role="self_attn",
        finder="attention",
        aliases=("blocks.{}.attn.hook_attn_scores",),
        note=EAGER,
    ),
    Value(
        "attention_probabilities",
        PATTERN,
        1.5,
        "How much each position attends to each (pattern).",
        role="self_attn",
        finder="attention",
        aliases=("blocks.{}.attn.hook_pattern",),
        note=f"{EAGER} Rows sum to one, or below it where the model has attention sinks.",
    ),
    Value(
        "attention_head_outputs",
        HEADS,
        1.6,
        "The output of each head before W_O (z).",
        role="self_attn",
        finder="attention",
        aliases=("blocks.{}.attn.hook_z",),
        note="What W_O is given: after the gate, for models that gate their heads.",
    ),
    Value(
        "attention_head_contributions",
        "[batch, seq, heads, hidden]",
        1.7,
        "Each head's output through W_O.",
        role="self_attn",
        finder="head_contributions",
        aliases=("blocks.{}.attn.hook_result",),
        note=f"Their sum over heads and the bias of W_O make `attentions_output`. {NEW}",
    ),
    Value(
        "mixer_states",
        "[batch, ...]",
        1.8,
        "The recurrent state of a linear attention or state space mixer after the last position.",
        role="mixer",
        finder="state",
        note="Only in runs with a cache (`use_cache=True`), which stores it for the next token. Writing it changes the "
        "tokens that follow, and nothing in the current forward pass. Its axes are the mixer's own: "
        "`[batch, channels, state]` in Mamba, `[batch, heads, key, value]` in delta rules.",
    ),
    Value(
        "attentions_output",
        STREAM,
        2,
        "What the attention module returns.",
        role="self_attn",
        side="output",
    ),
    Value(
        "mixers_output",
        STREAM,
        2,
        "What the sequence mixer of any kind returns.",
        role="mixer",
        side="output",
    ),
    Value(
        "attention_contributions",
        STREAM,
        2.5,
        "What attention adds to the residual stream.",
        role="self_attn",
        finder="contribution",
        aliases=("blocks.{}.hook_attn_out",),
        note=f"After post-norms and multipliers. {NEW}",
    ),
    Value(
        "mixer_contributions",
        STREAM,
        2.5,
        "What the sequence mixer of any kind adds to the residual stream.",
        role="mixer",
        finder="contribution",
        note=f"After post-norms and multipliers; of all mixers of a layer that has several. {NEW}",
    ),
    Value(
        "layers_mid",
        STREAM,
        2.7,
        "The residual stream between mixer and feed-forward (resid_mid).",
        role="layer",
        finder="mid",
        aliases=("blocks.{}.hook_resid_mid",),
        note="Not in parallel blocks, whose feed-forward reads what attention reads.",
    ),
    Value(
        "mlps_input",
        STREAM,
        3,
        "What the feed-forward is given.",
        role="mlp",
        side="input",
    ),
    Value(
        "router_logits",
        "[batch, seq, experts]",
        3.2,
        "The router's score of each expert.",
        role="mlp",
        finder="router",
    ),
    Value(
        "router_choices",
        "[batch, seq, chosen]",
        3.3,
        "Indices of the experts each token is sent to.",
        role="mlp",
        finder="router",
    ),
    Value(
        "mlp_neurons",
        "[batch, seq, neurons]",
        3.5,
        "Activations of the feed-forward's neurons, after the gate.",
        role="mlp",
        finder="neurons",
        aliases=("blocks.{}.mlp.hook_post",),
        note="The input of the projection that ends the feed-forward.",
    ),
    Value(
        "shared_expert_neurons",
        "[batch, seq, neurons]",
        3.6,
        "Activations of the neurons of the expert that runs on all tokens, in a mixture that has one.",
        role="mlp",
        finder="neurons",
        note="The neurons of the chosen experts have no single shape: each expert runs on the tokens sent to it.",
    ),
    Value(
        "mlps_output",
        STREAM,
        4,
        "What the feed-forward returns.",
        role="mlp",
        side="output",
    ),
    Value(
        "mlp_contributions",
        STREAM,
        4.5,
        "What the feed-forward adds to the residual stream.",
        role="mlp",
        finder="contribution",
        aliases=("blocks.{}.hook_mlp_out",),
        note=f"After post-norms and multipliers. {NEW}",
    ),
    Value(
        "other_contributions",
        STREAM,
        4.7,
        "What further modules of a layer add to the residual stream (Gemma 3n's and 4's per-layer embeddings).",
        role="layer",
        finder="contribution",
        note=NEW,
    ),
    Value(
        "layers_output",
        STREAM,
        5,
        "The residual stream leaving a layer (resid_post).",
        role="layer",
        side="output",
        aliases=("blocks.{}.hook_resid_post",),
    ),
    Value(
        "features",
        "[batch, seq, features]",
        5.5,
        "The features that an attached dictionary makes of a value of the layer (SAE, transcoder).",
        role="layer",
        finder="features",
        note="Only where a dictionary is [attached](features.md). A new tensor in the dictionary's dtype: assign it. "
        "Several dictionaries of one layer are told apart by a number: `model.features[3, 1]`.",
    ),
    Value(
        "ln_final_output",
        STREAM,
        6,
        "The normalised stream that is unembedded.",
        role="ln_final",
        side="output",
        per_layer=False,
        aliases=("ln_final.hook_normalized",),
    ),
)

_CROSS = [v for v in _ROWS if v.role == "self_attn" and v.name != "attention_contributions"]
_ENCODED = [v for v in _ROWS if v.per_layer and v.role in ("layer", "self_attn", "mlp") and v.finder != "features"]


def _of_stack(value: Value, stack: str) -> Value:
    words = f"{stack.capitalize()}: {value.description}"
    return replace(value, name=f"{stack}_{value.name}", description=words, aliases=(), stack=stack)


_ROWS += (*(_of_stack(v, "encoder") for v in _ENCODED), *(_of_stack(v, "cross") for v in _CROSS))

VALUES: dict[str, Value] = {value.name: value for value in _ROWS}
LABELS: dict[str, Label] = {name: value.label for name, value in VALUES.items()}


def get_label(name: str) -> Label:
    """The label of the value called `name`; unlike the row, it is small enough to travel with a remote request.

    Raises:
        ValueError: There is no such value; lists the names there are.
    """
    try:
        return LABELS[name]
    except (KeyError, TypeError):
        raise ValueError(f"There is no value called {name!r:.80}; there are: {', '.join(LABELS)}.") from None


def get_value(name: str) -> Value:
    """The row called `name`.

    Raises:
        ValueError: There is no such value; lists the names there are.
    """
    try:
        return VALUES[name]
    except (KeyError, TypeError):
        raise ValueError(f"There is no value called {name!r:.80}; there are: {', '.join(VALUES)}.") from None
