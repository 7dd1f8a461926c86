"""What is proven, as JSON and tensors: written and read without running any code that a file could name."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable
from types import MappingProxyType, NoneType
from typing import Any

import torch

from nnterp.proofs._types import Check, check_of
from nnterp.record import Record

# A value is a JSON value, or a list whose first entry says what it is. Texts longer than this are written once.
_LONG = 40
_BARE = (bool, int, str, NoneType)
_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, Any] = {"dict": dict, "proxy": MappingProxyType}
_OWN = {kind: name for name, kind in (_CONTAINERS | _MAPPINGS).items()}


class Writer:
    """Turns values into JSON, and collects their tensors and long texts.

    Attributes:
        tensors: The tensors, by the names under which the JSON refers to them.
        texts: The long texts, in the order in which the JSON refers to them.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self.classes = frozenset(classes)
        self.tensors: dict[str, torch.Tensor] = {}
        self.texts: dict[str, int] = {}

    def form(self, value: Any) -> Any:
        """The value as JSON can hold it.

        Raises:
            TypeError: It holds something of another type than those that can be written.
        """
        kind = type(value)
        if kind in (bool, int, NoneType):
            return value
        if kind is str:
            return value if len(value) <= _LONG else ["text", self.texts.setdefault(value, len(self.texts))]
        if kind is float:
            return ["float", value.hex()]
        if kind is torch.Size:
            return ["size", *value]
        if kind in (set, frozenset):
            return [_OWN[kind], *map(self.form, sorted(value, key=repr))]
        if kind in (tuple, list):
            return [_OWN[kind], *map(self.form, value)]
        if kind in (dict, MappingProxyType):
            return [_OWN[kind], *(self.form(item) for pair in value.items() for item in pair)]
        if kind in (torch.Tensor, torch.nn.Parameter):
            return ["tensor", self._named(value), str(value.device)]
        if kind in self.classes:
            return ["object", kind.__name__, *map(self.form, fields_of(value).values())]
        raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be written")

    def _named(self, tensor: torch.Tensor) -> str:
        name = str(len(self.tensors))
        self.tensors[name] = tensor.detach().clone()
        return name


class Reader:
    """Turns what `Writer` made into values again; a form that `Writer` does not make is refused."""

    def __init__(self, classes: Iterable[type], tensors: dict[str, torch.Tensor], texts: list[str]) -> None:
        self.classes = {own.__name__: own for own in classes}
        self.tensors, self.texts = tensors, texts

    def value(self, form: Any) -> Any:
        """The value of a form.

        Raises:
            ValueError, TypeError, KeyError, IndexError, AttributeError: It is none of those that `Writer` makes.
        """
        if type(form) in _BARE:
            return form
        if not isinstance(form, list):
            raise ValueError(f"a bare {type(form).__name__}")
        kind, *rest = form
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self._values(rest))
        if kind in _MAPPINGS:
            items = self._values(rest)
            return _MAPPINGS[kind](dict(zip(items[::2], items[1::2], strict=True)))
        if kind == "object":
            return self._object(*rest)
        (first, *more) = rest
        if kind == "text":
            return self._text(first)
        if kind == "float":
            return float.fromhex(first)
        if kind == "size":
            return torch.Size(rest)
        if kind == "tensor":
            return self.tensors[first].to(torch.device(*more))
        raise ValueError(f"{kind!r} is no kind of value")

    def _values(self, forms: Iterable[Any]) -> list[Any]:
        return [form if type(form) in _BARE else self.value(form) for form in forms]

    def _text(self, index: Any) -> str:
        if type(index) is not int or not 0 <= index < len(self.texts) or type(self.texts[index]) is not str:
            raise ValueError("a text that is not there")
        return self.texts[index]

    def _object(self, name: str, *forms: Any) -> Any:
        own = self.classes[name]
        checks = _checks_of(own)
        values = dict(zip(checks, self._values(forms), strict=True))
        for field, check in checks.items():
            if not check(values[field]):
                raise TypeError(f"{name}.{field} is a {type(values[field]).__name__}")
        made: Any = object.__new__(own)
        made.__dict__.update(values)
        return made


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a record or a dataclass, by name.

    Raises:
        TypeError: It has attributes beside its fields, or lacks one.
    """
    own: Any = type(value)
    held, names = vars(value), names_of(own)
    if held.keys() != names.keys():
        raise TypeError(f"a {type(value).__name__} with other fields than its own cannot be written")
    return {name: held[name] for name in names}


@functools.cache
def _checks_of(own: Any) -> dict[str, Check]:
    return {name: check_of(hint) for name, hint in names_of(own).items()}


@functools.cache
def names_of(own: Any) -> dict[str, Any]:
    """The fields of a class and their types; `Any` for types that are named for type checkers alone."""
    if dataclasses.is_dataclass(own):
        names, stated = [field.name for field in dataclasses.fields(own)], own
    else:
        stated = own.__init__  # type: ignore[misc,assignment]
        names = [name for name in stated.__annotations__ if name != "return"]
        assert issubclass(own, Record)
    try:
        hints = typing.get_type_hints(stated)
    except NameError:
        hints = {}
    return {name: hints.get(name, Any) for name in names}
