"""Names of columns: an axis "layers" has many, a row stands at one, so its column is "layer"."""

from __future__ import annotations

from typing import Any

from nnterp.deprecation import deprecated

COLUMNS = {
    "components": "component",
    "controls": "control",
    "dimensions": "dimension",
    "factors": "factor",
    "features": "feature",
    "folds": "fold",
    "heads": "head",
    "layers": "layer",
    "members": "member",
    "parts": "part",
    "positions": "position",
    "prompts": "prompt",
    "receivers": "receiver",
    "repeats": "repeat",
    "senders": "sender",
    "sizes": "size",
    "steps": "step",
    "targets": "target",
    "tokens": "token_index",  # "token" is a text
    "values": "value",
    "wrongs": "wrong",
}


def column(axis: str) -> str:
    """The column of a row's label on `axis`; an axis that is not in `COLUMNS` is no plural."""
    return COLUMNS.get(axis, axis)


class Entry(dict[str, Any]):
    """One entry of a result: column → label or number. The name of an axis works too, with a warning."""

    def __missing__(self, name: str) -> Any:
        if name in COLUMNS and COLUMNS[name] in self:
            deprecated(f"The key {name!r} of a result's entry", f'"{COLUMNS[name]}"', removed_in="3.0")
            return self[COLUMNS[name]]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and super().__contains__(COLUMNS.get(name)))

    def get(self, name: str, default: Any = None) -> Any:
        """What is there under a name, also under that of an axis, with a warning; `default` if nothing is."""
        try:
            return self[name]
        except KeyError:
            return default
