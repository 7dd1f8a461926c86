"""An edit in every forward pass of a generation, made by a worker that runs beside the user's block.

A block's own reads and writes belong to one forward pass: the first, or the one that a `tracer.iter` loop has reached.
`in_steps` makes an edit in the block's own pass at once, and starts an `EachStep` for the later ones. Edits that stand
for a whole `with model.steering(...)` are workers from the first pass on, started by `start_standing`.

Steps count forward passes from 0. The pass of the prompt is step 0; step k runs the k-th new token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import InterleavingTracer

if TYPE_CHECKING:
    from nnterp.traced._running import Running


# It waits for the model's input in every pass, so that an edit that does nothing cannot run ahead of the model, and it
# asks for what the edit reads in that very pass: nnsight's own pins slip to the next pass where a read comes late.
class EachStep(Mediator):
    """The worker that makes an edit in each chosen forward pass of one run, from `first` on."""

    def __init__(self, model: Running, edit: Callable[[int], None], steps: Any, first: int, begin: dict) -> None:
        Mediator.__init__(self, None, {}, {})
        self.model, self.edit, self.steps, self.first, self.begin = model, edit, steps, first, begin
        self.step, self.owner = first, None  # the worker of the block that the edit stands in

    def _run(self) -> None:
        for step in self.steps if isinstance(self.steps, range) else sorted(self.steps):
            if step < self.first:
                continue
            self.step = step
            try:
                Mediator.value(f"{self.model.path}.input")
            except OutOfOrderError:
                return  # the generation is over
            if self.owner is not None and self.owner.iteration != 0:
                return  # it stands in a loop of nnsight's own (`model.iter`), which makes the edit itself
            self.edit(step)
            self.flush()

    def occurrence(self, location: str) -> int:
        """How many times the model has reached `location` since the run began."""
        return self.interleaver.counts.get(location, 0) - self.begin.get(location, 0)

    def wanted(self, location: str) -> int:
        """The pass that is being edited."""
        return self.step


class StepTracer(InterleavingTracer):
    """nnsight's tracer, whose `iter` tells edits that they stand in a loop over the steps."""

    @property
    def iter(self) -> StepLoop:
        """Loop over the forward passes of a generation; see nnsight's `tracer.iter`."""
        return StepLoop()


class StepLoop(Iterations):
    """nnsight's loop over steps; its worker knows while it is in it."""

    def __getitem__(self, key: Any) -> StepLoop:
        chosen = Iterations.__getitem__(self, key)
        return StepLoop(chosen.start, chosen.stop, chosen.steps)

    def __iter__(self) -> Any:
        with Looping():
            yield from Iterations.__iter__(self)

    def execute(self, code: Any) -> None:
        """The deprecated `with tracer.iter[...]:`."""
        with Looping():
            Iterations.execute(self, code)


class Looping:
    """While the block is open, the running worker is in a loop over steps."""

    def __enter__(self) -> None:
        self.mediator: Any = Mediator.current("tracer.iter")
        self.outer = getattr(self.mediator, "looping", False)
        self.mediator.looping = True

    def __exit__(self, *_: Any) -> None:
        self.mediator.looping = self.outer


# In a loop over steps, and in a run of one pass, only this pass is edited, if it is chosen.
def in_steps(model: Running, edit: Callable[[int], None], steps: Any) -> None:
    """Make an edit in the chosen forward passes of the run: in this pass at once, in later ones when they come."""
    mediator: Any = Mediator.current("steps")
    chosen, now = read_steps(steps), step_of(model, mediator)
    if not model.interleaver.stepping and 0 not in chosen:
        raise ValueError(f"steps={steps!r}: a trace runs one forward pass, step 0. Later steps exist in generate().")
    if model.interleaver.stepping and not isinstance(mediator, EachStep) and not in_a_loop():
        later = EachStep(model, edit, chosen, now + 1, mediator.counts_at_start)
        later.batch_group, later.owner = mediator.batch_group, mediator
        _start(model, later)
    if now in chosen:
        edit(now)


def in_a_loop() -> bool:
    """Whether the running block is in a loop over steps. nnsight's own loops show it from their second step on."""
    mediator: Any = Mediator.current("steps")
    return getattr(mediator, "looping", False) or mediator.iteration != 0


def start_standing(model: Running, edits: tuple) -> None:
    """Start the workers of the edits that stand for every run, before the run begins; the first given acts first."""
    begin = dict(model.interleaver.counts)
    for place, edit in enumerate(edits):
        worker = EachStep(model, edit.begun(model), read_steps(None), 0, begin)  # it chooses its steps itself
        model.interleaver.mediators.insert(place, worker)


def _start(model: Running, worker: EachStep) -> None:
    """Start a worker in the middle of a run. It is served before the block that started it."""
    mediators = model.interleaver.mediators
    mediators.insert(mediators.index(Mediator.current("steps")), worker)
    worker.start(model.interleaver)


def step_of(model: Running, mediator: Any) -> int:
    """The forward pass that a worker's next read belongs to."""
    if isinstance(mediator, EachStep):
        return mediator.step
    if mediator.iteration is not None:
        return mediator.iteration
    return max(0, mediator.occurrence(f"{model.path}.input") - 1)


def read_steps(steps: Any) -> Any:
    """The chosen steps, as a range or a set."""
    if steps is None or steps == "all":
        return range(sys.maxsize)
    if steps == "prompt":
        return range(1)
    if steps == "generated":
        return range(1, sys.maxsize)
    hint = 'Give "all", "prompt", "generated", an index from 0, a slice, or several indices.'
    if isinstance(steps, slice):
        ends = (steps.start or 0, sys.maxsize if steps.stop is None else steps.stop, steps.step or 1)
        if min(ends) < 0:
            raise ValueError(f"steps={steps}: steps count from 0, because a generation's length is not known. {hint}")
        chosen: Any = range(*ends)
    else:
        single = hasattr(steps, "__index__")
        try:
            given = [steps] if single else list(steps)
            if isinstance(steps, str) or any(isinstance(step, bool) for step in given):
                raise TypeError
            chosen = frozenset(step.__index__() for step in given)
        except (TypeError, AttributeError):
            raise TypeError(f"steps={steps!r} chooses no steps. {hint}") from None
        if any(step < 0 for step in chosen):
            raise ValueError(f"steps={steps!r}: steps count from 0, because a generation's length is not known. {hint}")
    if not chosen:
        raise ValueError(f"steps={steps!r} is empty. {hint}")
    return chosen
