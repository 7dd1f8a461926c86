"""What `direct_logit_attribution` returns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nnterp.interventions._results import Result

_UNIT = re.compile(r"L(\d+)\.[HNF](\d+)")
_SUBLAYER = re.compile(r"L(\d+) (.+)")


@dataclass(frozen=True, eq=False, repr=False)
class DirectAttribution(Result):
    """How much each part adds to the logit of a target, or to the difference of two.

    The tensors, float32 on the CPU:

    - `scores` `[prompts, parts]`. The labels of `parts` are "embeddings", then by layer "L3", by sublayer
      "L3 attention" (or "L3 mixer"), "L3 mlp" and "L3 other", by head "L3.H5", by neuron "L3.N5", with
      "L3 attention bias" and "L3 mlp bias" for what no head or neuron has a share in; by feature "L3.F5", with
      "L3 mlp error" (or "L3 error" of the whole stream) for what its dictionary does not decode, its bias included; the
      last is "bias", of the final norm and the unembedding.
    - By position instead `scores` `[prompts, positions]`, `heads` `[prompts, layers, heads, positions]`, of which it is
      the sum but for what the read position adds, and `bias` `[prompts]`. By token `scores` `[prompts, tokens]` with
      `source_ids`, the token each stands for (-1 where a prompt has fewer), and `bias`.
    - `logits` `[prompts]`: the model's own logit (difference), before a softcap.
    - `residue` `[prompts]`: `logits` less the sum of all scores and biases: rounding.
    - `target_ids`, and for differences `wrong_ids`, `[prompts, targets]`, padded with -1.

    Example:
        direct = direct_logit_attribution(model, prompts[0], (" Paris", " Rome"), by="head")
        heads = direct.grid()  # [prompts, layers, heads]
    """

    figure: ClassVar[str] = "direct_attribution"

    def __repr__(self) -> str:
        worst = float(self["residue"].abs().max())
        return f"{super().__repr__()[:-1]}; residue at most {worst:.1e} of logits up to {self._largest():.3g})"

    def _largest(self) -> float:
        return float(self["logits"].abs().max())

    def grid(self) -> torch.Tensor:
        """Lay the scores out by layer.

        Returns:
            `[prompts, layers, heads]`, `[prompts, layers, neurons]` or, by sublayer, `[prompts, layers, sublayers]`,
            float32 on the CPU; NaN where a layer has fewer. `columns()` names the last axis.

        Raises:
            ValueError: The parts are whole layers, positions or tokens, and are no grid.
        """
        where, columns = self._cells()
        layers = 1 + max(layer for layer, _ in where.values())
        whole = torch.full((len(self.values), layers, len(columns)), float("nan"))
        for part, (layer, column) in where.items():
            whole[:, layer, columns.index(column)] = self.values[:, part]
        return whole

    def columns(self) -> tuple[Any, ...]:
        """Name the last axis of `grid()`.

        Returns:
            Its labels: indices of heads or neurons, or names of sublayers.

        Raises:
            ValueError: As for `grid`.
        """
        return self._cells()[1]

    def _cells(self) -> tuple[dict[int, tuple[int, Any]], tuple[Any, ...]]:
        """Where each part stands in the grid: index of the part → (layer, column); and the columns."""
        labels = self.labels.get("parts", ())
        units = {i: found for i, label in enumerate(labels) if (found := _UNIT.fullmatch(label))}
        if units:
            where: dict[int, tuple[int, Any]] = {i: (int(m[1]), int(m[2])) for i, m in units.items()}
            return where, tuple(range(1 + max(column for _, column in where.values())))
        named = {i: found for i, label in enumerate(labels) if (found := _SUBLAYER.fullmatch(label))}
        if not named:
            by = self.about.get("arguments", {}).get("by")
            raise ValueError(f'These scores are by {by!r}: a grid is made of scores by "head", "neuron" or "sublayer".')
        where = {i: (int(m[1]), m[2]) for i, m in named.items()}
        return where, tuple(dict.fromkeys(column for _, column in where.values()))
