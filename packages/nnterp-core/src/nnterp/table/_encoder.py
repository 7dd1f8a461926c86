"""The rows of encoder-decoder models: the encoder's values, and those of its decoder's attention to what it returns."""

from dataclasses import replace

from nnterp.table._rows import ROWS
from nnterp.table._value import Stack, Value


def _of_stack(value: Value, stack: Stack, rank: float) -> Value:
    words = f"{stack.capitalize()}: {value.description}"
    return replace(value, name=f"{stack}_{value.name}", rank=rank, description=words, aliases=(), stack=stack)


_ENCODED = [
    v
    for v in ROWS
    if v.per_layer and v.role in ("layer", "self_attn", "mlp") and v.finder not in ("features", "experts")
]
_ACROSS = [v for v in ROWS if v.role == "self_attn" and v.name != "attention_contributions"]

ENCODER_ROWS = tuple(_of_stack(value, "encoder", value.rank) for value in _ENCODED)
# A decoder attends to the encoder after its self-attention (rank 2.5 at most), before its feed-forward (2.7 at least).
CROSS_ROWS = tuple(_of_stack(value, "cross", 2.5 + value.rank / 20) for value in _ACROSS)
