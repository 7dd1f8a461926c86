"""Check what a user gives to a function before anything runs: counts, devices, dtypes, paths, lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from nnterp.indices import integer, shown


def count(given: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """A number of things as a plain int.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less than `least`, or more than `most`.
    """
    try:
        number = integer(given, name)
    except TypeError:
        raise TypeError(f"{name} is an integer, not {shown(given)}.") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be at least {least}{'' if most is None else f', at most {most}'}, not {number}.")
    return number


def device_of(given: Any, name: str = "device") -> torch.device:
    """A device that is there.

    Raises:
        TypeError: It is neither a device nor its name.
        ValueError: There is no such device.
    """
    if not isinstance(given, (str, torch.device)) and (isinstance(given, bool) or not isinstance(given, int)):
        raise TypeError(f"{name} is a torch.device or its name, such as 'cpu' or 'cuda:0', not {shown(given)}.")
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name}={given!r}: there is no such device here ({str(error).splitlines()[0]}).") from None
    return device


def check_dtype(given: Any, name: str = "dtype") -> None:
    """Raise unless it is a dtype or None.

    Raises:
        TypeError: It is something else.
    """
    if given is not None and not isinstance(given, torch.dtype):
        raise TypeError(f"{name} is a torch.dtype, such as torch.float32, or None, not {shown(given)}.")


def listed(given: Any, name: str, what: str) -> list[Any]:
    """Several things as a list.

    Raises:
        TypeError: They are no list; `what` says what was expected.
    """
    if isinstance(given, (str, bytes, bytearray, Mapping, torch.Tensor)) or not isinstance(given, Iterable):
        raise TypeError(f"{name} is {what}, not {shown(given)}.")
    return list(given)


def path_of(given: Any, name: str = "path") -> Path:
    """A path.

    Raises:
        TypeError: It is neither a text nor a path.
        ValueError: It is empty.
    """
    if not isinstance(given, (str, PathLike)):
        raise TypeError(f"{name} is a text or a path, not {shown(given)}.")
    if not str(given):
        raise ValueError(f"{name} is empty; give the name of a file or folder.")
    return Path(given)
