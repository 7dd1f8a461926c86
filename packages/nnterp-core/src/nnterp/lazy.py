"""Packages that import their public names when one is first asked for (PEP 562): a command's help needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec


def names_on_demand(package: str, module: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package whose public names are those of one of its modules.

    The module is imported when a name that the package does not have yet is first asked for. The package then has all
    of the module's public names. A submodule of the package is imported when it is asked for as an attribute.

    Args:
        package: The package's `__name__`.
        module: The module of the package that imports the public names and lists them in its `__all__`.

    Returns:
        `(__getattr__, __dir__)`, to assign in the package's `__init__`.
    """
    own = vars(sys.modules[package])

    def public() -> list[str]:
        names = import_module(f"{package}.{module}")
        for name in names.__all__:
            own.setdefault(name, getattr(names, name))
        return list(names.__all__)

    def get(name: str) -> object:
        if name == "__all__":
            return public()
        missing = AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        if name.startswith("_"):
            raise missing
        try:
            found = find_spec(f"{package}.{name}") is not None
        except ModuleNotFoundError as error:  # a package of this namespace that is not installed
            raise missing from error
        if found:
            return import_module(f"{package}.{name}")
        if name in public():
            return own[name]
        raise missing

    def listed() -> list[str]:
        return sorted({*own, *public()})

    return get, listed
