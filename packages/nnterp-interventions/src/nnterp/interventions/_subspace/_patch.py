"""Patching a subspace of a value: exact runs, beside random subspaces of the same size and the whole value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.interventions._engine import Cell, sweep
from nnterp.interventions._metrics import bind_some, by_prompt, metric_name, scored
from nnterp.interventions._pairs import Direction, Pairs, encode_pairs
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._results import describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, bar, check_batch_size
from nnterp.interventions._states import states_of
from nnterp.interventions._subspace._result import SubspaceResult
from nnterp.interventions._subspace._where import Where, orthonormal, random_basis
from nnterp.positions import Positions

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PAIRS = 8  # pairs of prompts whose activations are held at a time


@plain_defaults()
def patch_subspace(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    metric: Any,
    value: str,
    layer: int,
    basis: torch.Tensor | SubspaceResult,
    positions: Positions = -1,
    head: int | None = None,
    direction: Direction = "denoising",
    controls: int = 5,
    *,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
) -> SubspaceResult:
    """Put one run's activation into another's, but only the part of it that lies in a subspace.

    The rest of the activation stays as it is: a distributed interchange intervention (Geiger et al., [Finding
    alignments between interpretable causal variables and distributed neural
    representations](https://arxiv.org/abs/2303.02536), 2023). Every number comes from a forward pass with the patch in
    it. A subspace that works need not be one that the model uses (Makelov et al.,
    [2023](https://arxiv.org/abs/2311.17030)): test it on other prompts.

    Args:
        model: The model.
        clean, corrupted: Prompts that go in pairs, as for `activation_patching`.
        metric: As for `activation_patching`.
        value: The value that is patched, such as "layers_output".
        layer: Its layer.
        basis: Vectors that span the subspace, `[width, dimensions]` (one vector may be `[width]`), where width is the
            number of numbers that the value has at one position; they are made orthonormal. Or what `fit_subspace`
            returned.
        positions: Positions over the prompts' own tokens, or text selectors, all patched at once.
        head: Only this head of the value; None for all of it.
        direction: "denoising" puts activations of the clean run into the corrupted one, "noising" the reverse.
        controls: How many random subspaces of the same size to patch as well.
        seed: Of these.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service, the metric included; the activations to patch in are fetched first.

    Returns:
        A `SubspaceResult`.

    Raises:
        ShapeError: The basis does not have as many rows as the value has numbers at a position.
        ValueError: Its vectors depend on each other, or numbers or lengths of prompts do not match.
        IndexError: There is no such layer, head or position.
        Unavailable: The layer does not have the value.
        InsideTraceError: Called inside a trace of the same model.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        whole = torch.eye(model.hidden_size)  # [hidden, dimensions]
        print(patch_subspace(model, clean, corrupted, metric, "layers_output", 4, whole).recovered() > 0.5)  # → True
    """
    model.require_no_trace("patch_subspace()")
    check_batch_size(batch_size)
    count(controls, "controls", 0)
    pairs = encode_pairs(model, clean, corrupted, direction)
    model.prepare(remote)
    where = Where(model, pairs, value, layer, positions, head)
    given = basis.basis if isinstance(basis, SubspaceResult) else basis
    every, seed = range(len(pairs)), count(seed, "seed", 0)
    return measured(model, pairs, every, metric, where, given, controls, seed, batch_size, progress, remote)


def measured(
    model: StandardizedTransformer,
    pairs: Pairs,
    chosen: Sequence[int],
    metric: Any,
    where: Where,
    basis: torch.Tensor,
    controls: int,
    seed: int,
    batch_size: BatchSize,
    progress: bool | None,
    remote: Any = False,
) -> SubspaceResult:
    """What patching a subspace does in some of the pairs, its controls, and the whole value; see `patch_subspace`."""
    shortcuts, generator = proven_shortcuts(model, remote), torch.Generator().manual_seed(seed)
    scores = torch.full((len(chosen), 3 + controls), torch.nan)  # unpatched, whole, the subspace, and its controls
    source_scores = torch.full((len(chosen),), torch.nan)
    bases: list[torch.Tensor] = []
    with bar(len(chosen), "patching a subspace", progress) as shown:
        for start in range(0, len(chosen), PAIRS):
            some = chosen[start : start + PAIRS]
            into, source = [pairs.into[i] for i in some], [pairs.source[i] for i in some]
            states, logits = states_of(model, source, [where.key], shortcuts, remote)
            clean = logits if pairs.denoising else states_of(model, into, [], shortcuts, remote)[1]
            bound = bind_some(metric, model, len(pairs), clean, some)
            given = [where.given(i, states[k]) for k, i in enumerate(some)]
            if not bases:
                width = where.width(given[0])
                own = orthonormal(basis, width)
                bases = [own, *(random_basis(width, own.shape[1], generator) for _ in range(controls))]
            cells = []
            for k, i in enumerate(some):
                cells += [Cell(k, ()), *(where.cell(k, i, given[k], one) for one in (None, *bases))]
            options: dict[str, Any] = {"batch_size": batch_size, "progress": False, "remote": remote}
            found = sweep(model, into, cells, scored(bound, cells), shortcuts, tokens=bound.tokens, **options)["scores"]
            here = slice(start, start + len(some))
            scores[here] = found.view(len(some), -1)
            source_scores[here] = by_prompt(bound, logits, list(range(len(some)))).detach().cpu()
            shown.update(len(some))
    ends = (source_scores, scores[:, 0]) if pairs.denoising else (scores[:, 0], source_scores)
    tensors = {
        "scores": scores[:, 2],
        "control": scores[:, 3:],
        "whole": scores[:, 1],
        "clean": ends[0],
        "corrupted": ends[1],
        "basis": bases[0],
    }
    return SubspaceResult(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        dict.fromkeys(tensors, ("prompts",)) | {"control": ("prompts", "controls"), "basis": ("width", "dimensions")},
        {
            "prompts": prompt_labels([pairs.clean[i] for i in chosen], model),
            "controls": tuple(range(controls)),
            "width": tuple(range(bases[0].shape[0])),
            "dimensions": tuple(range(bases[0].shape[1])),
        },
        about=_about(model, where, pairs.direction, metric=metric_name(metric), seed=seed),
    )


def only_basis(model: StandardizedTransformer, basis: torch.Tensor, where: Where, direction: str) -> SubspaceResult:
    """A subspace that was not measured."""
    labels = {axis: tuple(range(size)) for axis, size in zip(("width", "dimensions"), basis.shape, strict=True)}
    axes: dict[str, tuple[str, ...]] = {"basis": ("width", "dimensions")}
    return SubspaceResult({"basis": basis.cpu().contiguous()}, axes, labels, about=_about(model, where, direction))


def _about(model: StandardizedTransformer, where: Where, direction: str, **arguments: Any) -> dict[str, Any]:
    value, layer = where.key
    own = {"value": value, "layer": layer, "head": where.heads, "positions": where.asked, "direction": direction}
    return describe_run(model, "patch_subspace", **own, **arguments)
