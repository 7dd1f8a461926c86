"""The certificate as a table."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nnterp.display._grid import table_row
from nnterp.display._text import escape
from nnterp.display._theme import new_figure, shown

if TYPE_CHECKING:
    from nnterp import Certificate

_FONT = 12
_FILLS = {"✓": "rgba(0,158,115,0.4)", "✗": "rgba(213,94,0,0.5)", "–": "rgba(128,136,144,0.25)"}
_COLUMNS = {"claim": 52, "detail": 64}


def plot_certificate(certificate: Certificate, *, title: str | None = None, show: bool = False) -> go.Figure:
    """A table with a row for each line of a certificate: mark, claim, measured error, allowed error, finding.

    Args:
        certificate: What `model.validate()` returns, or a loaded `Certificate`.
        title: Plain text; the certificate's own verdict if None.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure.
    """
    rows = certificate.rows()
    head, *_ = str(certificate).split("\n", 1)
    claims = [textwrap.wrap(row[1], _COLUMNS["claim"]) or [""] for row in rows]
    details = [textwrap.wrap(row[4], _COLUMNS["detail"]) or [""] for row in rows]
    lines = [max(len(claim), len(detail)) for claim, detail in zip(claims, details, strict=True)]
    widths = [34, 380, 76, 76, 470]
    figure = new_figure(title or "\n".join(textwrap.wrap(head, 96)))
    figure.update_layout(title_font_size=14)
    figure.add_trace(
        go.Table(
            columnwidth=widths,
            header={
                "values": ["", "claim", "error", "allowed", "found"],
                "align": ["center", "left", "right", "right", "left"],
                "height": table_row(1, _FONT),
                "font": {"size": _FONT},
            },
            cells={
                "values": [
                    [row[0] for row in rows],
                    ["<br>".join(map(escape, claim)) for claim in claims],
                    [row[2] for row in rows],
                    [row[3] for row in rows],
                    ["<br>".join(map(escape, detail)) for detail in details],
                ],
                "align": ["center", "left", "right", "right", "left"],
                "height": table_row(1, _FONT),
                "font": {"size": _FONT},
                "fill": {"color": [[_FILLS[row[0]] for row in rows], *["rgba(0,0,0,0)"] * 4]},
            },
        )
    )
    titles = len(figure.layout.title.text.split("<br>"))
    top = 40 + 20 * titles
    height = table_row(1, _FONT) + sum(table_row(count, _FONT) for count in lines)
    figure.update_layout(
        width=sum(widths) + 32,
        height=top + height + 24,
        margin={"l": 16, "r": 16, "t": top, "b": 16},
    )
    return shown(figure, show)
