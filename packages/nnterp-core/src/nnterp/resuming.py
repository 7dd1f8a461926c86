"""Calls that run a model many times: what one computed that is cut short is kept, and another goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nnterp.identity import CHANGES, parts_of_function, same, settings_of_model, summary

_NAMED = 4  # differences that a message names


class Call:
    """One call of a function: what its numbers depend on, and what becomes of them if it is cut short.

    An error in the middle of a call, KeyboardInterrupt included, is raised as it is, with the result so far as its
    attribute `partial`. The same call with `resume=error.partial` goes on from there.

    Args:
        model: The model.
        function: The function's name.
        arguments: Its arguments as they were understood: numbers, texts, tensors, containers of these.
        code: Functions among its arguments, by name.
        also: A second name for `partial` on the error.

    Attributes:
        record: Saved with a partial result, and compared when a call goes on from it. It is empty until the call is cut
            short, because it takes one read of the weights.
    """

    def __init__(
        self,
        model: Any,
        function: str,
        arguments: Mapping[str, Any],
        code: Mapping[str, Any] | None = None,
        also: str = "",
    ) -> None:
        self.model, self.function, self.code, self.also = model, function, dict(code or {}), also
        self.arguments = {name: _known(summary, value) for name, value in arguments.items()}
        self.parts = self._parts()
        self.record: dict[str, Any] = {}

    @contextmanager
    def keeping(self, partial: Callable[[], Any]) -> Iterator[None]:
        """A block whose errors carry what `partial` returns, which holds `record`; nothing if it returns None."""
        try:
            yield
        except BaseException as error:
            self._attach(error, partial)
            raise

    def check(self, earlier: Mapping[str, Any] | None, where: str) -> None:
        """Raise unless an earlier call with this record computes the same.

        Args:
            earlier: The record of the partial result.
            where: What the message calls it.

        Raises:
            ValueError: It is another call, or it was not cut short; names what differs.
        """
        if not earlier:
            raise ValueError(
                f"Cannot resume: {where} is no partial result. It is complete, or was made by another function; an "
                f"error of {self.function}() carries a partial result as its attribute `partial`."
            )
        if wrong := differing(earlier, self.settings()):
            raise ValueError(
                f"Cannot resume: {where} was made with {wrong}. Repeat the earlier call, or start anew without resume."
            )

    def _attach(self, error: BaseException, partial: Callable[[], Any]) -> None:
        try:
            kept = partial()
        except Exception as second:
            error.add_note(f"What {self.function}() had computed is lost ({type(second).__name__}: {second}).")
            return
        if kept is None:
            return
        for name in ("partial", *([self.also] if self.also else [])):
            setattr(error, name, kept)
        error.add_note(
            f"What {self.function}() had computed is in this exception's `partial`: it can be saved, and "
            f"{self.function}(..., resume=error.partial) goes on from there."
        )
        now = self.settings()
        changed = {name: CHANGES for name, part in self.parts.items() if not same(now.get(name), part)}
        self.record.update({**now, **changed})

    def settings(self) -> dict[str, Any]:
        """Everything that the call's numbers depend on, flat, as JSON holds it."""
        model = _known(settings_of_model, self.model)
        model = model if isinstance(model, dict) else {"weights": model}
        return {"function": self.function, **model, **self.arguments, **self._parts()}

    def _parts(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, function in self.code.items():
            parts = _known(parts_of_function, function) if callable(function) else {"value": _known(summary, function)}
            parts = parts if isinstance(parts, dict) else {"code": parts}
            found |= {f"{name} ({part})": value for part, value in parts.items()}
        return found


def differing(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the settings of two calls, for a message; empty if nothing does."""
    wrong = []
    for name in {**earlier, **now}:
        then, here = earlier.get(name, "nothing"), now.get(name, "nothing")
        if CHANGES not in (then, here) and not same(then, here):
            wrong.append(f"{name} = {then!r}, and this call has {here!r}")
    return "; with ".join(wrong[:_NAMED])


def _known(find: Callable[[Any], Any], value: Any) -> Any:
    """What identifies a value; for one that cannot be told, a text that says why, and is equal to no other."""
    try:
        return find(value)
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error}) {id(value)}"
