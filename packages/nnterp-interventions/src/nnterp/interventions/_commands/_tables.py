"""Tables of tokens and probabilities for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnterp.token_text import TokenNames, shorten

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from rich.text import Text

ACCENT = "#0072B2"
STRONG = "#009E73"
WIDEST_TOKEN = 22
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


def _cut(text: str) -> Text:
    """A text on one line, cut where its column ends."""
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def some_rows(count: int, most: int = 24) -> list[int]:
    """Indices of the rows to print: all, or `most` of them, evenly spaced from the first to the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def layer_table(
    layers: Sequence[int],
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    names: TokenNames,
    *,
    first: str,
    last_first: bool = True,
) -> Table:
    """A table with one row per layer: the most probable token with a bar, and the next ones.

    Args:
        layers: Labels of the rows.
        ids: `[layers, k]`, most probable first.
        probabilities: `[layers, k]`.
        names: Texts of the tokens.
        first: Header of the most probable token.
        last_first: Put the last layer on top, as in the figures.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right", style="dim", no_wrap=True)
    table.add_column(first, no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    if ids.shape[1] > 1:
        table.add_column("then", style="dim")  # the only column that is cut in a narrow terminal
    rows = some_rows(len(layers))
    for i in reversed(rows) if last_first else rows:
        texts = [shorten(name, WIDEST_TOKEN) for name in names.many(ids[i].tolist())]
        values = probabilities[i].tolist()
        after = "  ".join(f"{text} {percent(value)}" for text, value in zip(texts[1:], values[1:], strict=True))
        cells = [
            Text(str(layers[i])),
            Text(texts[0], style="bold" if values[0] >= 0.5 else ""),
            bar(values[0]),
            Text(percent(values[0])),
        ]
        table.add_row(*cells, *([_cut(after)] if ids.shape[1] > 1 else []))
    return table


def side_by_side(
    columns: dict[str, tuple[torch.Tensor, torch.Tensor]], names: TokenNames, *, bar_columns: int = 4
) -> Table:
    """A table of several distributions side by side: heading → token ids `[k]` and probabilities `[k]`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in columns:
        table.add_column(Text(heading))  # is cut in a narrow terminal
        table.add_column("", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True, style="dim")
    rows = min(len(ids) for ids, _ in columns.values())
    for i in range(rows):
        cells: list[Text] = []
        for ids, probabilities in columns.values():
            value = float(probabilities[i])
            cells += [_cut(shorten(names(int(ids[i])), WIDEST_TOKEN)), bar(value, bar_columns), Text(percent(value))]
        table.add_row(*cells)
    return table
