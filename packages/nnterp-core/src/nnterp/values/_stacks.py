"""The stacks of layers that values belong to: the residual stream's, the vision tower's, the encoder's."""

from __future__ import annotations

from nnterp.facts import Facts
from nnterp.table import Value


def stack_depth(facts: Facts, value: Value) -> int:
    """Count the layers of the stack that a value is of.

    Returns:
        Their number; 1 for a vision tower that nothing has proven yet.

    Raises:
        Unavailable: The value is of an encoder, and the model has none.
    """
    if value.stack == "vision":
        return max(1, 0 if facts.vision is None else len(facts.vision.layers))
    return facts.of_stack(value.stack).anatomy.num_layers
