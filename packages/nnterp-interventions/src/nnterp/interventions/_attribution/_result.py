"""What attribution patching returns: estimated effects, and the audit of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from nnterp.interventions._attribution._audit import Audit
from nnterp.interventions._pairs import gap_between
from nnterp.interventions._results import Result


@dataclass(frozen=True, eq=False, repr=False)
class AttributionResult(Result):
    """Estimated effects of patching, `scores`, and the metric of the unpatched `clean` and `corrupted` runs.

    A score estimates how much patching changes the metric: that of the patched run minus that of the run patched into.
    Scores made with `graddrop=True` are magnitudes, without a sign.

    Example:
        metric = logit_difference(" Paris", " Rome")
        found = attribution_patching(model, "The capital of France is", "The capital of Italy is", metric, audit=4)
        shares = found.normalized()["scores"]  # [prompts, layers, positions]
    """

    figure: ClassVar[str] = "patching"

    @property
    def audit(self) -> Audit | None:
        """Some scores beside exact effects; None if the result was not audited."""
        return Audit.of(self.about)

    @property
    def unpatched(self) -> torch.Tensor:
        """The metric of the run patched into, `[prompts]`, float32 on the CPU."""
        return self["corrupted" if self.about["arguments"]["direction"] == "denoising" else "clean"]

    @property
    def patched(self) -> torch.Tensor:
        """The estimated metric of each patched run: what `activation_patching` calls `scores`, of the same shape,
        dtype (float32) and device (the CPU).

        Raises:
            ValueError: The scores are magnitudes (`graddrop=True`).
        """
        if self._magnitudes:
            raise ValueError(
                "There is no estimate of the patched runs' metric: with graddrop=True scores are magnitudes, and do "
                "not say which way patching moves it. Take graddrop=False, or patch the cells that rank first."
            )
        return self["scores"] + self._by_prompt(self.unpatched)

    def normalized(self) -> AttributionResult:
        """Scores as parts of the difference between the two runs: 1 where patching would make it all.

        NaN where the two runs have the same metric, up to rounding (1e-6 of the larger one). Magnitudes
        (`graddrop=True`) are divided by the difference's absolute value. The audit stays with the scores as they were.
        """
        denoising = self.about["arguments"]["direction"] == "denoising"
        source = self["clean" if denoising else "corrupted"]
        gap = gap_between(source, self.unpatched)
        scores = self["scores"] / self._by_prompt(gap.abs() if self._magnitudes else gap)
        arguments = {**self.about["arguments"], "score": "estimated part of the difference"}
        return replace(self, tensors={**self.tensors, "scores": scores}, about={**self.about, "arguments": arguments})

    @property
    def _magnitudes(self) -> bool:
        return bool(self.about["arguments"].get("graddrop"))

    def _by_prompt(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers `[prompts]`, to be broadcast over the scores."""
        return numbers.view((-1,) + (1,) * (self["scores"].dim() - 1))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}; {self.audit or 'not audited'})"
