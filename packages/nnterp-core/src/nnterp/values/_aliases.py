"""TransformerLens' names for the rows of the table."""

from __future__ import annotations

import re

from nnterp.table import VALUES, Value, get_value
from nnterp.wording import nearest


def canonical(name: str) -> tuple[Value, int | None]:
    """Look up the row that a name stands for.

    Args:
        name: A name of the table (`layers_output`), one with its layer (`layers_output[3]`), or TransformerLens' name
            (`blocks.3.hook_resid_post`, `ln_final.hook_normalized`).

    Returns:
        The row, and the layer if the name says one, else None.

    Raises:
        TypeError: The name is no text.
        ValueError: No such value; lists the names there are.
    """
    if not isinstance(name, str):
        raise TypeError(f"A value is asked for by its name, such as 'layers_output', not by {name!r:.80}.")
    indexed = re.fullmatch(r"(\w+)\[(-?\d+)\]", name)
    if indexed is not None:
        value = get_value(indexed[1])
        if not value.per_layer:
            raise ValueError(f"{value.name} is not per layer; {name!r} names a layer.")
        return value, int(indexed[2])
    if name in VALUES:
        return VALUES[name], None
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    generic = f"blocks.{{}}.{block[2]}" if block else name
    for value in VALUES.values():
        if generic in value.aliases:
            return value, int(block[1]) if block else None
    aliases = [alias for value in VALUES.values() for alias in value.aliases]
    near = nearest(name, [*VALUES, *(alias.format(block[1]) if block else alias for alias in aliases)])
    raise ValueError(
        f"There is no value called {name!r:.80}.{near} Values: {', '.join(VALUES)}. "
        f"TransformerLens names: {', '.join(aliases)}."
    )
