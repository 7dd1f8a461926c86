"""The same table for a notebook (HTML) and for a terminal (rich), every text in it taken literally."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

# Both show on light and on dark backgrounds.
GOOD, BAD, SOFT = "#009e73", "#d55e00", "#808890"
LAST_COLUMN = 40  # the most characters that a table is kept wide for


def html_table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, colours: Sequence[str] = ()
) -> str:
    """A table as HTML.

    Args:
        caption: Text above the table.
        header: Names of the columns.
        rows: Texts, escaped here.
        colours: A colour for the first cell of each row.

    Returns:
        A line and a `<table>`. They take their colours from the page around them.
    """
    cell = "text-align:left;vertical-align:top;padding:2px 10px 2px 0;white-space:pre-wrap"
    head = "".join(f'<th style="{cell}">{html.escape(name)}</th>' for name in header)
    body = []
    for i, row in enumerate(rows):
        first = f";color:{colours[i]}" if colours else ""
        cells = (f'<td style="{cell}{first if not j else ""}">{html.escape(text)}</td>' for j, text in enumerate(row))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div style="font-weight:bold;padding:4px 0;color:inherit">{html.escape(caption)}</div>'
        '<table style="border-collapse:collapse;background:transparent;color:inherit;margin:0">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


class FittedTable:
    """A caption and a table for `rich`. In a terminal that is too narrow for the table, each row is several lines.

    Args:
        caption: Text above the table.
        header: Names of the columns.
        rows: Texts, taken literally: brackets are no markup.
        colours: A colour for the first cell of each row.
    """

    def __init__(
        self, caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, colours: Sequence[str] = ()
    ) -> None:
        self.caption, self.header = caption, header
        self.rows, self.colours = [list(row) for row in rows], list(colours)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len
        from rich.text import Text

        yield Text(self.caption, style="bold")
        *columns, last = zip(*(map(cell_len, row) for row in [self.header, *self.rows]), strict=True)
        needed = sum(max(lengths) + 3 for lengths in columns) + min(max(last), LAST_COLUMN) + 3
        yield self._table() if needed <= options.max_width or len(self.header) < 3 else self._stacked()

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for name in self.header:
            table.add_column(Text(name), overflow="fold")
        for row, first in zip(self.rows, self._styles(), strict=True):
            table.add_row(Text(row[0], style=first), *map(Text, row[1:]))
        return table

    def _stacked(self) -> Table:
        """The first cell beside the second, and under it the others that are not empty, with their columns' names."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row, first in zip(self.rows, self._styles(), strict=True):
            told = [f"{name} {text}".strip() for name, text in zip(self.header[2:], row[2:], strict=True) if text]
            under = Text(f"\n{'; '.join(told)}" if told else "", style="dim")
            table.add_row(Text(row[0], style=first), Text(row[1]) + under)
        return table

    def _styles(self) -> list[str]:
        return self.colours or [""] * len(self.rows)
