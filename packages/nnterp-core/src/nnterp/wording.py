"""How nnterp writes module paths and layer indices in messages and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def generic_path(path: str) -> str:
    """Replace every index in a module path by `*`: "model.layers.3.mlp" becomes "model.layers.*.mlp"."""
    return ".".join("*" if piece.isdigit() else piece for piece in path.split("."))


def ranges(indices: Sequence[int], at_most: int = 24) -> str:
    """Write ascending indices as ranges: `(0, 1, 2, 5)` becomes "0–2, 5".

    Args:
        indices: Layer indices, in ascending order.
        at_most: The most ranges to write. If there are more, the middle ones are left out and the number of layers is
            added.
    """
    pieces: list[list[int]] = []
    for i in indices:
        if pieces and i == pieces[-1][-1] + 1:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    words = [str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in pieces]
    if len(words) > at_most:
        words = [*words[: at_most - 1], "…", words[-1]]
        return f"{', '.join(words)}; {len(indices)} layers"
    return ", ".join(words)


def nearest(name: object, names: Iterable[str], cutoff: float = 0.7) -> str:
    """A question to put into an error about a misspelt name: " Did you mean layers_output?", "" if nothing is near.

    Args:
        name: What was given.
        names: What it may be, the likeliest first.
        cutoff: How alike two names have to be, from 0 to 1.
    """
    close = (
        difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=cutoff) if isinstance(name, str) else []
    )
    return f" Did you mean {' or '.join(close)}?" if close else ""
