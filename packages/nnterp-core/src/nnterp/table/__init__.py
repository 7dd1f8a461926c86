"""The table of values: everything that can be read and written in a forward pass, one row each.

Adding a value is adding a row; `nnterp.values` says where each is served in a given model.
"""

from __future__ import annotations

from nnterp.table._encoder import CROSS_ROWS, ENCODER_ROWS
from nnterp.table._images import IMAGE_ROWS
from nnterp.table._rows import ROWS
from nnterp.table._value import Label, Side, Stack, Value
from nnterp.wording import nearest

__all__ = ["LABELS", "SENT_WHERE_NAMED", "VALUES", "Label", "Side", "Stack", "Value", "get_label", "get_value"]

VALUES: dict[str, Value] = {value.name: value for value in (*ROWS, *IMAGE_ROWS, *ENCODER_ROWS, *CROSS_ROWS)}


class _Labels(dict[str, Label]):
    """The labels of all values. A request carries those of models that send requests: none of encoders."""

    def __reduce__(self) -> tuple:
        return dict, ({name: label for name, label in self.items() if label.stack not in ("encoder", "cross")},)


LABELS: dict[str, Label] = _Labels({name: value.label for name, value in VALUES.items()})
# Values of few models: a remote request takes them along only if its block names them, so that the others stay small.
_OF_FEW_MODELS = ("router", "experts", "state", "linear")
SENT_WHERE_NAMED = frozenset(v.name for v in VALUES.values() if v.finder in _OF_FEW_MODELS and v.stack == "layers")


def get_label(name: str) -> Label:
    """Look up the value called `name`; returns its label, which is small enough to travel with a remote request.

    Raises:
        ValueError: There is no such value; lists the names there are.
    """
    try:
        return LABELS[name]
    except (KeyError, TypeError):
        near = nearest(name, LABELS)
        raise ValueError(f"There is no value called {name!r:.80}.{near} There are: {', '.join(LABELS)}.") from None


def get_value(name: str) -> Value:
    """Look up the value called `name`; returns its row.

    Raises:
        ValueError: There is no such value; lists the names there are.
    """
    try:
        return VALUES[name]
    except (KeyError, TypeError):
        near = nearest(name, VALUES)
        raise ValueError(f"There is no value called {name!r:.80}.{near} There are: {', '.join(VALUES)}.") from None
