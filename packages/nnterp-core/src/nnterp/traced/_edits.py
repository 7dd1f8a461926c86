"""The edits of a running model. They travel only with a request that makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnterp.errors import Unavailable
from nnterp.traced._own_tokens import Given
from nnterp.traced._skipping import skip_layers
from nnterp.traced._steering import steer
from nnterp.traced._steps import StepLoop, in_steps, start_standing

if TYPE_CHECKING:
    from nnterp.traced._running import Running


class NoEdits:
    """Stands for `Edits` in a request whose block names none of them."""

    def begin(self, model: Running, kwargs: dict[str, Any], mask: Any, width: int | None) -> None:
        """Do nothing before a run."""

    def loop(self, loop: Any) -> Any:
        """nnsight's own loop over the steps."""
        return loop

    def steer(self, *_: Any) -> None:
        """Refuse."""
        raise Unavailable(
            "This edit did not travel with the request, because neither the traced block nor a function that it names "
            "mentions steer, skip_layer, skip_layers or each_step. Write model.steer(...) (or the edit you make) in "
            "the block, or in a function that the block calls by its name."
        )

    skip_layers = each_step = steer


class Edits(NoEdits):
    """Skipping layers, steering, and an edit in every step."""

    def begin(self, model: Running, kwargs: dict[str, Any], mask: Any, width: int | None) -> None:
        """Note which rows a run is given, and start the edits that stand for every run."""
        model.interleaver.given = Given(kwargs.get("decoder_input_ids", kwargs.get("input_ids")), mask, width)
        start_standing(model, model.standing)

    def loop(self, loop: Any) -> StepLoop:
        """A loop over the steps in which edits know that they are in one."""
        return StepLoop()

    def steer(self, *args: Any) -> None:
        """See `_steering.steer`."""
        steer(*args)

    def skip_layers(self, *args: Any) -> None:
        """See `_skipping.skip_layers`."""
        skip_layers(*args)

    def each_step(self, model: Running, edit: Callable[[int], None], steps: Any) -> None:
        """See `_steps.in_steps`."""
        in_steps(model, edit, steps)
