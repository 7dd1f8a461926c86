"""The one way to read indices that a user gives: of layers, heads, neurons, positions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeAlias

import numpy
import torch

Indices: TypeAlias = "int | slice | str | Iterable[int] | torch.Tensor | None"


def integers(given: Any, name: str) -> int | slice | list[int] | None:
    """Indices in plain form, before it is known how many entries there are.

    Args:
        given: An integer (also of NumPy, or a tensor without axes); a slice; a list, tuple, range, set, 1-d array, 1-d
            tensor or generator of integers; None or "all". Order and duplicates are kept; a set is read in ascending
            order.
        name: How errors call the argument.

    Returns:
        An int, a slice of ints, a list of ints, or None for all.

    Raises:
        TypeError: It is something else: a boolean, a float, a dict.
        ValueError: It is empty, has more than one axis, or is another text than "all".
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given != "all":
            raise ValueError(f'{name} are indices or "all", not {given!r:.80}.')
        return None
    if isinstance(given, slice):
        ends = (given.start, given.stop, given.step)
        plain = slice(*(None if end is None else integer(end, f"{name}, an end of its slice,") for end in ends))
        if plain.step == 0:
            raise ValueError(f"{name}={shown_slice(plain)}: the step of a slice cannot be 0.")
        return plain
    if (axes := axes_of_array(given)) is not None:
        if axes > 1:
            raise ValueError(f"{name} is {shown(given)}; give one index, or a list of indices, which has one axis.")
        if axes == 1:
            return _listed(given.tolist() if is_whole(given) else given, given, name)
    elif not hasattr(given, "__index__"):
        return _listed(given, given, name)
    return integer(given, name)


def integer(given: Any, name: str) -> int:
    """One index as a plain int.

    Raises:
        TypeError: It is no integer.
    """
    if not _is_boolean(given) and axes_of_array(given) in (None, 0):
        try:
            return operator.index(given)
        except TypeError:
            pass
    raise TypeError(f"{name} is {shown(given)}, and an index is an integer.")


def read_indices(given: Any, size: int, name: str, kind: str) -> list[int]:
    """The entries that a user means, counted from 0.

    Args:
        given: As in `integers`; a negative index counts from the end.
        size: How many entries there are.
        name: How errors call the argument.
        kind: What is counted, in the plural: "layers".

    Raises:
        TypeError: It is something else than indices.
        ValueError: It is empty, or a slice that selects nothing.
        IndexError: There is no such entry.
    """
    plain = integers(given, name)
    if plain is None:
        return list(range(size))
    if isinstance(plain, slice):
        chosen = list(range(size)[plain])
        if not chosen:
            raise ValueError(f"{name}={shown_slice(plain)} selects none of {size} {kind}.")
        return chosen
    return [within(index, size, name, kind) for index in ([plain] if isinstance(plain, int) else plain)]


def read_index(given: Any, size: int, name: str, kind: str) -> int:
    """One entry, counted from 0; negative indices count from the end.

    Raises:
        TypeError: It is no integer.
        IndexError: There is no such entry.
    """
    return within(integer(given, name), size, name, kind)


def within(index: int, size: int, name: str, kind: str) -> int:
    """An index counted from 0.

    Raises:
        IndexError: There is no such entry.
    """
    if not -size <= index < size:
        raise IndexError(f"{name}[{index}]: there are {size} {kind}, so indices go from {-size} to {size - 1}.")
    return index % size


def axes_of_array(given: Any) -> int | None:
    """Number of axes of a tensor or an array (0 for a NumPy scalar); None for anything else."""
    return given.ndim if isinstance(given, (torch.Tensor, numpy.ndarray, numpy.generic)) else None


def is_whole(given: torch.Tensor | numpy.ndarray) -> bool:
    """Whether a tensor or an array holds integers."""
    if isinstance(given, torch.Tensor):
        return not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    return bool(numpy.issubdtype(given.dtype, numpy.integer))


def shown(given: Any) -> str:
    """What was given, for errors: tensors by shape and dtype, anything else as it prints, with its type."""
    if axes_of_array(given):
        return f"{'a tensor' if isinstance(given, torch.Tensor) else 'an array'} {list(given.shape)} of {given.dtype}"
    return f"{given!r:.80} ({type(given).__name__})"


def shown_slice(given: slice) -> str:
    """A slice as it is written: `slice(1, None)` becomes "1:"."""
    ends = ["" if end is None else str(end) for end in (given.start, given.stop, given.step)]
    return ":".join(ends if ends[2] else ends[:2])


def _listed(items: Any, given: Any, name: str) -> list[int]:
    """Several indices.

    Raises:
        TypeError: They are no collection of integers.
        ValueError: There are none.
    """
    if isinstance(items, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(items, Iterable):
        raise TypeError(
            f"{name} is {shown(given)}; give an index, a list of indices, a slice, or None for all of them."
        )
    found = list(items)
    if not found:
        raise ValueError(f"{name} is empty; give at least one index, or None for all of them.")
    if any(_is_boolean(item) for item in found):
        raise TypeError(f"{name} holds booleans; give indices: those at which a mask is True, mask.nonzero()[0].")
    plain = [integer(item, f"{name} holds a value that") for item in found]
    return sorted(plain) if isinstance(items, Set) else plain


def _is_boolean(given: Any) -> bool:
    return isinstance(given, (bool, numpy.bool_)) or getattr(given, "dtype", None) in (torch.bool, numpy.dtype(bool))
