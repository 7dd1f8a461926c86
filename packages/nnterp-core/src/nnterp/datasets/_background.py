"""Files are written, and tensors leave the GPU, while the model already runs the next batch."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_WAITING = 2  # batches that may wait to be written


class Background:
    """One thread that does what it is given, in order. An error in it is raised by the next `submit` or by `wait`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.waiting: deque[Future[Any]] = deque()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called, after waiting until few others are left."""
        while len(self.waiting) >= _WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *arguments))

    def wait(self) -> None:
        """Wait until all is done."""
        while self.waiting:
            self.waiting.popleft().result()


@contextlib.contextmanager
def background() -> Iterator[Background]:
    """A thread for the block; at its end, also after an error, what was submitted is done."""
    with ThreadPoolExecutor(1, thread_name_prefix="nnterp-dataset") as pool:
        yield Background(pool)


class Leaving:
    """Tensors on their way to the CPU.

    From a GPU they are copied into pinned memory in a stream of their own, beside the next forward pass. Their memory
    on the GPU is kept until they have left.

    Args:
        tensors: By name, on any device.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.events: list[torch.cuda.Event] = []
        self.sources: list[torch.Tensor] = []
        for name, tensor in tensors.items():
            self.tensors[name] = self._leave(tensor) if tensor.is_cuda else tensor.cpu()

    def _leave(self, tensor: torch.Tensor) -> torch.Tensor:
        stream = _stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            there.copy_(tensor, non_blocking=True)
            self.events.append(stream.record_event())
        self.sources.append(tensor)
        return there

    def arrived(self) -> dict[str, torch.Tensor]:
        """The tensors on the CPU, once they are there."""
        for event in self.events:
            event.synchronize()
        self.sources.clear()
        return self.tensors


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
