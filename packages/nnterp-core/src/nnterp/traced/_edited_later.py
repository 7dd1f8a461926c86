"""A module's output that the model's own code edits in place after it was read, as Falcon does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.eproperty import WriteBack
from nnsight.intervention.interleaver import Mediator

from nnterp.traced._places import Site, container_of, stream_returned
from nnterp.traced._sums import Sum

if TYPE_CHECKING:
    from nnterp.traced._running import Running


# nnsight swaps what `WriteBack` makes into the run when the block asks for the next value, or ends. Until then an edit
# in place by the block is one of what the model goes on with, as it is for any other value.
class EditedLater(Site):
    """An output whose reader keeps the tensor, while the model goes on with a copy of it."""

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The stream, which nothing but the block itself edits."""
        worker: Any = Mediator.current(label)
        envoy = model.envoy(self.path)
        at = f"{envoy.path}.output"
        key = EditedLater, at, worker.wanted(at)
        if worker.transform is None or worker.transform.key != key:
            seen = envoy.output
            worker.transform = WriteBack(lambda: self.handed_on(seen, label), seen, *key)
        return stream_returned(worker.transform.view, label)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace the stream by a copy of the tensor, made when the block goes on."""
        Site.write(self, model, tensor, label)
        self.read(model, label)

    def handed_on(self, seen: Any, label: str) -> Any:
        """What the model goes on with: what was read, with a copy of the stream."""
        stream = stream_returned(seen, label).clone()
        return stream if isinstance(seen, torch.Tensor) else container_of(seen)((stream, *seen[1:]))


class SumEditedLater(Sum):
    """A `Sum` of outputs of which some are edited in place later."""

    kind = EditedLater
