"""Hold attention patterns, the scales of norms and the gates of feed-forwards still in the backward pass.

The forward pass gives the same numbers; only what the gradient flows through is cut. With all three held still, what is
left is linear in the stream. Attribution graphs (Ameisen et al. 2025) and relevance propagation (AttnLRP, Achtibat et
al. 2024) differentiate it. `freeze` is the context manager, `model.gradients(..., frozen=)` its first user.
"""

from nnterp.frozen._audit import Way, way
from nnterp.frozen._freeze import freeze, prove_frozen, require_frozen
from nnterp.frozen._holding import Holding
from nnterp.frozen._kinds import FROZEN, frozen_kinds
from nnterp.frozen._parts import FrozenParts, find_parts
from nnterp.frozen._tape import Tape

__all__ = [
    "FROZEN",
    "FrozenParts",
    "Holding",
    "Tape",
    "Way",
    "find_parts",
    "freeze",
    "frozen_kinds",
    "prove_frozen",
    "require_frozen",
    "way",
]
