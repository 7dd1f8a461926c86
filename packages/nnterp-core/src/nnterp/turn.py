"""One model runs in one thread at a time."""

from __future__ import annotations

import threading
from types import TracebackType

from nnterp.errors import AnotherThreadError


class Turn:
    """Held by the thread that runs a model; the same thread may take it again. A `with` block takes and returns it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: threading.Thread | None = None
        self.depth = 0

    def __enter__(self) -> None:
        with self.lock:
            self.require_mine()
            self.owner = threading.current_thread()
            self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.lock:
            self.depth -= 1
            if not self.depth:
                self.owner = None

    def require_mine(self) -> None:
        """Raise if another thread runs the model.

        Raises:
            AnotherThreadError: It does.
        """
        owner = self.owner
        if owner is not None and owner is not threading.current_thread():
            raise AnotherThreadError(
                f"Thread {owner.name!r} is running this model, and a model runs in one thread at a time: a trace and "
                "the model's modules take turns. Put a threading.Lock around the calls, or load one model a thread."
            )
