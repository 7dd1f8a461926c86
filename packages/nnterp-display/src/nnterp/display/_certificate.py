"""The certificate as a table."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nnterp.display._grid import table_row
from nnterp.display._text import escape_lines
from nnterp.display._theme import new_figure, shown

if TYPE_CHECKING:
    from nnterp import Certificate

_FONT = 12
_FILLS = {"✓": "rgba(0,158,115,0.4)", "✗": "rgba(213,94,0,0.5)", "–": "rgba(128,136,144,0.25)"}
_WIDTHS = [34, 380, 76, 76, 470]
_ALIGN = ["center", "left", "right", "right", "left"]


def plot_certificate(certificate: Certificate, *, title: str | None = None, show: bool = False) -> go.Figure:
    """A certificate as a table, a row for each line: mark, claim, measured error, allowed error, what was found.

    Args:
        certificate: What `model.validate()` returns, or a loaded `Certificate`.
        title: Plain text; the certificate's verdict if None.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure.

    Example:
        figure = display.plot_certificate(model.certificate)
    """
    rows = certificate.rows()
    verdict, *_ = str(certificate).split("\n", 1)
    claims, details = _wrap([row[1] for row in rows], 52), _wrap([row[4] for row in rows], 64)
    figure = new_figure(title or verdict)
    figure.update_layout(title_font_size=14)
    figure.add_trace(
        go.Table(
            columnwidth=_WIDTHS,
            header={
                "values": ["", "claim", "error", "allowed", "found"],
                "align": _ALIGN,
                "height": table_row(1, _FONT),
                "font": {"size": _FONT},
            },
            cells={
                "values": [
                    [row[0] for row in rows],
                    [escape_lines(claim) for claim in claims],
                    [row[2] for row in rows],
                    [row[3] for row in rows],
                    [escape_lines(detail) for detail in details],
                ],
                "align": _ALIGN,
                "height": table_row(1, _FONT),
                "font": {"size": _FONT},
                "fill": {"color": [[_FILLS[row[0]] for row in rows], *["rgba(0,0,0,0)"] * 4]},
            },
        )
    )
    lines = [1 + max(claim.count("\n"), detail.count("\n")) for claim, detail in zip(claims, details, strict=True)]
    _fit(figure, table_row(1, _FONT) + sum(table_row(count, _FONT) for count in lines))
    return shown(figure, show)


def _wrap(texts: list[str], columns: int) -> list[str]:
    """Each text in lines of at most `columns` characters."""
    return ["\n".join(textwrap.wrap(text, columns)) for text in texts]


def _fit(figure: go.Figure, height: int) -> None:
    """Size the figure around a table of `height` pixels."""
    top = 64
    figure.update_layout(
        width=sum(_WIDTHS) + 32,
        height=top + height + 24,
        margin={"l": 16, "r": 16, "t": top, "b": 16},
    )
