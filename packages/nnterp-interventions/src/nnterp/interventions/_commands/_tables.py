"""Tables of tokens and probabilities, fitted to a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

from nnterp.token_text import TokenNames, shorten

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from rich.text import Text

ACCENT = "#0072B2"
STRONG = "#009E73"
WIDEST_TOKEN = 22
NARROW = 72  # columns of a terminal below which tables leave things out
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(probability: float, columns: int = 14) -> Text:
    """A probability as a horizontal bar with a resolution of an eighth of a character."""
    from rich.text import Text

    eighths = round(min(max(probability, 0.0), 1.0) * columns * 8)
    full, part = divmod(eighths, 8)
    drawn = "█" * full + (_EIGHTHS[part] if part else "")
    return Text(drawn.ljust(columns), style=STRONG if probability >= 0.5 else ACCENT)


def percent(probability: float) -> str:
    """A probability in percent: `0.3 %`, `<0.1 %`."""
    if 0 < probability < 0.0005:
        return "<0.1 %"
    return f"{100 * probability:.1f} %"


def some_rows(count: int, most: int = 24) -> list[int]:
    """Indices of the rows to print: all, or `most` of them, evenly spaced from the first to the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def layers_shown(layers: Sequence[int]) -> str:
    """Which layers a table shows, in words; empty if it shows all."""
    rows = some_rows(len(layers))
    if len(rows) == len(layers):
        return ""
    return f"{len(rows)} of {len(layers)} layers are shown: {', '.join(str(layers[i]) for i in rows)}"


def layer_table(
    layers: Sequence[int],
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    names: TokenNames,
    *,
    first: str,
    width: int,
    last_first: bool = True,
    every: bool = False,
) -> Table:
    """A table with one row per layer: the most probable token with a bar, and as many of the next ones as fit.

    Args:
        layers: Labels of the rows.
        ids: `[layers, k]`, most probable first.
        probabilities: `[layers, k]`.
        names: Texts of the tokens.
        first: Header of the most probable token.
        width: Columns of the terminal.
        last_first: Put the last layer on top, as in the figures.
        every: Show all layers; else at most as many as `some_rows` gives.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = list(range(len(layers))) if every else some_rows(len(layers))
    rows = list(reversed(shown)) if last_first else shown
    widest, bars = (WIDEST_TOKEN, [14]) if width >= NARROW else (14, [])
    texts = {i: [shorten(name, widest) for name in names.many(ids[i].tolist())] for i in rows}
    values = {i: probabilities[i].tolist() for i in rows}
    taken = [len("layer"), max(len(first), *(cell_len(texts[i][0]) for i in rows)), *bars, len("100.0 %")]
    room = width - sum(columns + 3 for columns in taken) - 2
    after = {i: _whole(_entries(texts[i], values[i])[1:], room) for i in rows}

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right", style="dim", no_wrap=True)
    table.add_column(first, no_wrap=True)
    for _ in bars:
        table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    if any(after.values()):
        table.add_column("then", style="dim", no_wrap=True)
    for i in rows:
        cells = [
            Text(str(layers[i])),
            Text(texts[i][0], style="bold" if values[i][0] >= 0.5 else ""),
            *(bar(values[i][0], length) for length in bars),
            Text(percent(values[i][0])),
        ]
        table.add_row(*cells, *([Text(after[i])] if any(after.values()) else []))
    return table


def _entries(texts: Sequence[str], values: Sequence[float]) -> list[str]:
    return [f"{text} {percent(value)}" for text, value in zip(texts, values, strict=True)]


def _whole(entries: Sequence[str], room: int) -> str:
    """As many entries as fit on a line of some columns, none of them cut."""
    line = ""
    for entry in entries:
        longer = f"{line}  {entry}".strip()
        if cell_len(longer) > room:
            break
        line = longer
    return line


def _lines(entries: Sequence[str], room: int) -> str:
    """All entries, on lines of some columns; an entry that is longer has a line of its own."""
    lines = [""]
    for entry in entries:
        longer = f"{lines[-1]}  {entry}".strip()
        if cell_len(longer) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(entry)
    return "\n".join(lines)


def side_by_side(columns: dict[str, tuple[torch.Tensor, torch.Tensor]], names: TokenNames, *, width: int) -> Table:
    """A table of several distributions, side by side or, in a narrow terminal, one under another.

    Args:
        columns: Heading → token ids `[k]` and probabilities `[k]`.
        names: Texts of the tokens.
        width: Columns of the terminal.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if width < NARROW:
        stacked = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
        room = width - max(map(cell_len, columns)) - 6
        for heading, (ids, probabilities) in columns.items():
            texts = [shorten(name, WIDEST_TOKEN) for name in names.many(ids.tolist())]
            stacked.add_row(Text(heading, style="bold"), Text(_lines(_entries(texts, probabilities.tolist()), room)))
        return stacked
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    bars = [10] if width >= 110 else [4] if width >= 90 else []
    for heading in columns:
        table.add_column(Text(heading), no_wrap=True)
        for _ in bars:
            table.add_column("", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True, style="dim")
    rows = min(len(ids) for ids, _ in columns.values())
    for i in range(rows):
        cells: list[Text] = []
        for ids, probabilities in columns.values():
            value = float(probabilities[i])
            token = Text(shorten(names(int(ids[i])), WIDEST_TOKEN if width >= 110 else 14))
            cells += [token, *(bar(value, length) for length in bars), Text(percent(value))]
        table.add_row(*cells)
    return table
