"""Small immutable values that can be sent to a remote worker."""

from __future__ import annotations

from typing import Any, TypeVar

R = TypeVar("R", bound="Record")


class Record:
    """Base of small value classes: equal when their fields are equal, printed with their fields, never changed.

    A hand-written frozen dataclass. A dataclass's generated methods have no source, so nnsight would send them to a
    remote worker as bytecode, which another version of Python does not run.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self).__name__, *self.__dict__.values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"


def replace(record: R, **changes: Any) -> R:
    """A copy of a record with some fields changed, as `dataclasses.replace` makes one.

    Raises:
        TypeError: The record has no such field.
    """
    unknown = changes.keys() - record.__dict__.keys()
    if unknown:
        raise TypeError(f"{type(record).__name__} has no field {', '.join(sorted(unknown))}.")
    return type(record)(**{**record.__dict__, **changes})


def relocated(value: Any, old: str, new: str) -> Any:
    """A record, or a tuple of them, with the module path `old` replaced by `new` wherever a path begins with it."""
    if isinstance(value, str):
        return new + value[len(old) :] if value == old or value.startswith(f"{old}.") else value
    if type(value) is tuple:
        return tuple(relocated(item, old, new) for item in value)
    if isinstance(value, Record):
        moved = object.__new__(type(value))
        moved.__dict__.update({name: relocated(item, old, new) for name, item in value.__dict__.items()})
        return moved
    return value
