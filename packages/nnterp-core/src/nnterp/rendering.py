"""The same table for a notebook (HTML) and for a terminal (rich), every text in it taken literally."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

# Both show on light and on dark backgrounds.
GOOD, BAD, SOFT = "#009e73", "#d55e00", "#808890"


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


def rich_table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, colours: Sequence[str] = ()
) -> Group:
    """A caption and a table for `rich`; see `html_table`. Brackets in the texts are no markup."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*(Text(text, style=colours[i] if colours and not j else "") for j, text in enumerate(row)))
    return Group(Text(caption, style="bold"), table)
