"""`freeze`: what was asked for is proven to be held still in this model, and then held still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from nnterp.anatomy import Anatomy
from nnterp.errors import Unavailable
from nnterp.frozen._holding import Holding
from nnterp.frozen._kinds import frozen_kinds
from nnterp.frozen._proof import FrozenProof, prove
from nnterp.frozen._tape import Tape
from nnterp.traced import Apart


class Freezable(Protocol):
    """What freezing needs of a model."""

    proofs: dict[tuple, Any]
    interleaver: Any
    _module: nn.Module

    @property
    def anatomy(self) -> Anatomy:
        """Which native module plays which part."""
        ...

    def prepare(self, remote: Any = False) -> None:
        """Load the weights."""
        ...

    def require_no_trace(self, what: str) -> None:
        """Raise inside a trace of this model."""
        ...


_KEY = ("frozen",)


def prove_frozen(model: Freezable) -> FrozenProof:
    """Find out what of a model can be held still; tried once, on a short probe, and kept in its `proofs`.

    Costs three forward passes and about one backward pass. Loads the weights if they are not there yet.

    Returns:
        The proof, with a reason for each kind that cannot be held still.
    """
    model.prepare()
    if _KEY not in model.proofs:
        with Apart(model.interleaver):
            model.proofs[_KEY] = prove(model._module, model.anatomy)
    return model.proofs[_KEY]


def require_frozen(model: Freezable, kinds: Any) -> tuple[str, ...]:
    """Check that all that was asked for can be held still in this model.

    Returns:
        The kinds, in the order of `FROZEN`.

    Raises:
        TypeError, ValueError: `kinds` does not name some of `FROZEN`.
        Unavailable: One cannot be held still; says which modules refuse it, and why.
    """
    kinds = frozen_kinds(kinds)
    if kinds and model.anatomy.runs:
        raise Unavailable(
            f"{model.anatomy.model_class}: nothing is held still in a model that runs its layers several times."
        )
    proof = prove_frozen(model) if kinds else None
    for kind in kinds:
        reason = None if proof is None else proof.reasons.get(kind)
        if reason is not None:
            able = [f'"{other}"' for other in ("patterns", "norms", "gates") if other not in proof.reasons]  # type: ignore[union-attr]
            instead = f"What can be held still: {', '.join(able)}." if able else "Nothing can be held still in it."
            raise Unavailable(f'{model.anatomy.model_class}: frozen="{kind}" is refused: {reason}. {instead}')
    return kinds


@contextlib.contextmanager
def freeze(model: Freezable, kinds: Any = ("patterns", "norms", "gates"), tape: Tape | None = None) -> Iterator[None]:
    """Hold parts of a model still in the backward pass of every forward pass that is run in the block.

    Forward passes give the numbers that they give without, and only the model's own code is changed: what a traced
    block computes itself keeps its gradient. Open it around the trace:

        with freeze(model, "norms"):
            with model.trace(prompt):
                ...

    Args:
        model: A model whose weights are here. It runs on this machine: a remote worker cannot hold anything still.
        kinds: Some of "patterns", "norms" and "gates"; see `StandardizedTransformer.gradients`.
        tape: An empty one records what is held still in one forward pass. With one that is full, forward passes are
            given what was recorded: their numbers are then those of the model with its patterns and scales of another
            pass.

    Raises:
        TypeError, ValueError: `kinds` does not name some of them.
        Unavailable: One cannot be held still in this model; says why.
        InsideTraceError: Opened inside a trace of this model.
    """
    wanted = frozen_kinds(kinds)
    if not wanted:
        yield
        return
    model.require_no_trace("freeze()")
    wanted = require_frozen(model, wanted)
    with Holding(model._module, prove_frozen(model).parts, wanted, tape):
        yield
