"""What patching a subspace returns: the metric beside that of random subspaces and of the whole value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnterp.interventions._results import Result


@dataclass(frozen=True, eq=False, repr=False)
class SubspaceResult(Result):
    """The metric of runs in which a subspace of a value was patched, exactly, beside its controls.

    Its tensors, float32 on the CPU: `scores` `[prompts]`, with the subspace patched; `control` `[prompts, controls]`,
    with random subspaces of the same size; `whole` `[prompts]`, with all of the value; `clean` and `corrupted`
    `[prompts]`, unpatched; `basis` `[width, dimensions]`, orthonormal; and `losses` `[steps]` if it was fitted.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        basis = torch.eye(model.hidden_size)[:, :8]  # [hidden, dimensions]
        result = patch_subspace(model, clean, corrupted, metric, "layers_output", 4, basis)
        result.recovered(), result.recovered("control")  # parts of the clean minus the corrupted metric
    """

    @property
    def basis(self) -> torch.Tensor:
        """The subspace: orthonormal columns, float32 `[width, dimensions]` on the CPU."""
        return self["basis"]

    def recovered(self, tensor: str = "scores") -> float:
        """Say how much of the difference between the two runs patching makes, over the prompts together.

        1 minus the sum over prompts of (patched − run patched from)², as a part of that of (run patched into − run
        patched from)². 1: as the run patched from; 0: no nearer to it than without patching; it may be negative. For
        "control", the mean over random subspaces.

        Args:
            tensor: "scores", "control" or "whole".

        Returns:
            The recovered part, without a unit, as defined above.
        """
        ends = self["clean"].double(), self["corrupted"].double()
        source, into = ends if self.about["arguments"]["direction"] == "denoising" else ends[::-1]
        gap = (into - source).square().sum()
        found = self[tensor].double()
        found = found[:, None] if found.dim() == 1 else found
        return float((1 - (found - source[:, None]).square().sum(0) / gap).mean())

    def __repr__(self) -> str:
        if "scores" not in self.tensors:
            return super().__repr__()
        width, dimensions = self.basis.shape
        return (
            f"SubspaceResult({dimensions} of {width} dimensions, {len(self['scores'])} pairs; recovered: "
            f"{self.recovered():.2f}, random subspaces {self.recovered('control'):.2f}, the whole value "
            f"{self.recovered('whole'):.2f}; {self.about.get('model', '')})"
        )
