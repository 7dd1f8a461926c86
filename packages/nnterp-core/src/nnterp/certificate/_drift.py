"""How far a model's values are from those of the same model in a higher precision: figures, printable and storable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnterp.rendering import FittedTable, html_table

if TYPE_CHECKING:
    from rich.console import RenderableType

_HEADER = ("value", "mean", "worst layer", "its mean", "worst position")


@dataclass(frozen=True)
class DriftLine:
    """The drift of one value at one layer.

    At each position the error is the norm of the difference over the norm of the reference, both over everything the
    value has there (all heads, all neurons). Norms below a thousandth of the largest count as that, so that positions
    at which a value is nearly zero do not decide. For `router_choices` it is the share of experts that differ.

    Attributes:
        value: The value's name in the table, or "logits".
        layer: The layer; None for a value that is not per layer.
        mean: The error, averaged over positions.
        worst: The largest error at one position.
    """

    value: str
    layer: int | None
    mean: float
    worst: float

    def __str__(self) -> str:
        where = self.value if self.layer is None else f"{self.value}[{self.layer}]"
        return f"{where}: mean {self.mean:.1e}, worst position {self.worst:.1e}"


@dataclass(frozen=True)
class Drift:
    """How far a model's values are from a reference's on the same prompts; see `StandardizedTransformer.validate`.

    Attributes:
        against: The reference: "the same weights in float32", or the name and dtype of the model that was given.
        prompts, positions: How many prompts were run, and how many positions they have.
        lines: The drift of each value at each layer, in forward order of the table, "logits" last.
        agreement: Share of positions at which both models' most probable next token is the same.
        divergence: Kullback–Leibler divergence of the model's next-token distribution from the reference's, in nats,
            averaged over positions.
        left_out: Value → why it was not compared.
    """

    against: str
    prompts: int
    positions: int
    lines: tuple[DriftLine, ...]
    agreement: float
    divergence: float
    left_out: dict[str, str]

    @property
    def values(self) -> tuple[str, ...]:
        """The values that were compared."""
        return tuple(dict.fromkeys(line.value for line in self.lines))

    def of(self, value: str) -> tuple[DriftLine, ...]:
        """Look up one value.

        Returns:
            Its lines, by layer.

        Raises:
            KeyError: It was not compared; says why.
        """
        found = tuple(line for line in self.lines if line.value == value)
        if not found:
            why = self.left_out.get(value, f"there are: {', '.join(self.values)}")
            raise KeyError(f"{value} was not compared ({why}).")
        return found

    def worst(self, value: str) -> DriftLine:
        """Find the layer at which a value drifts most.

        Returns:
            The line with the largest mean over positions.

        Raises:
            KeyError: The value was not compared; says why.
        """
        return max(self.of(value), key=lambda line: line.mean)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Make the table that is printed.

        Returns:
            (value, mean over layers, worst layer, its mean, worst position of any layer) of each value, as texts.
        """
        rows = []
        for value in self.values:
            lines, worst = self.of(value), self.worst(value)
            mean = sum(line.mean for line in lines) / len(lines)
            layer = "" if worst.layer is None else str(worst.layer)
            position = max(line.worst for line in lines)
            rows.append((value, f"{mean:.1e}", layer, f"{worst.mean:.1e}", f"{position:.1e}"))
        return rows

    @property
    def caption(self) -> str:
        """What was compared, and how well the predictions agree, in one line."""
        return (
            f"Drift from {self.against}, {self.prompts} prompts, {self.positions} positions: the most probable next "
            f"token is the same at {self.agreement:.1%}, divergence {self.divergence:.1e} nats"
        )

    def __str__(self) -> str:
        rows = [_HEADER, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        body = ("  " + "  ".join(_aligned(row, widths)).rstrip() for row in rows)
        notes = [f"  not compared: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join([self.caption, *body, *notes])

    def _repr_html_(self) -> str:
        return html_table(self.caption, _HEADER, self.rows())

    def __rich__(self) -> RenderableType:
        return FittedTable(self.caption, _HEADER, self.rows())


def _aligned(row: tuple[str, ...], widths: list[int]) -> Iterable[str]:
    """The first cell to the left, numbers to the right."""
    yield f"{row[0]:<{widths[0]}}"
    for cell, width in zip(row[1:], widths[1:], strict=True):
        yield f"{cell:>{width}}"
