"""Ablation: what changes when a part of the model says nothing, or what it usually says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch

from nnterp.inputs import Row, encode
from nnterp.interventions._components import Component, check, cut, edit_of, positions_of
from nnterp.interventions._edits import Cell, axes_of, positions_axis
from nnterp.interventions._metrics import bind_some, by_prompt, kl_divergence, metric_name, scored
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, bar, check_batch_size
from nnterp.interventions._states import states_of
from nnterp.interventions._sweep import sweep
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

How: TypeAlias = Literal["zero", "mean", "resample"] | torch.Tensor
PROMPTS = 8  # prompts whose activations are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class AblationResult(Result):
    """The metric of each ablated run, `scores` `[prompts, components]`, and of the whole model, `baseline`."""

    figure: ClassVar[str] = "ablation"


def ablate(
    model: StandardizedTransformer,
    prompts: Any,
    what: Component | Sequence[Component | Sequence[Component]],
    how: How = "zero",
    metric: Any = None,
    *,
    reference: Any = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
) -> AblationResult:
    """Run each prompt once for each component, the component's value replaced by one that says nothing of the prompt.

    (Zero, mean and resample ablation: Chan et al., "Causal scrubbing", 2022; Wang et al., 2022.) To leave out a whole
    layer, ablate its "mixer_contributions" and "mlp_contributions" together, to zero.

    Args:
        model: The model.
        prompts: A text or a list; anything that `nnterp.inputs.encode` takes.
        what: Components, one run for each; a list among them is ablated together. `components(...)` makes a sweep.
        how: "zero"; "mean", the value's mean over all positions of the reference prompts; "resample", the value of
            another reference prompt at the same position counted from the end; or a tensor that broadcasts to the
            value (its axes without the batch, cut to the component's positions and heads).
        metric: As in `activation_patching`; the KL divergence from the whole model's prediction if None.
        reference: Prompts that "mean" and "resample" draw from; the prompts themselves if None.
        seed: Of the draw of "resample".
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service, the metric with it.

    Returns:
        `scores` `[prompts, components]` and `baseline` `[prompts]`, float32, on the CPU.

    Raises:
        ValueError: `what` is empty, `how` is none of its choices, or no reference prompt is long enough.
        Unavailable: The model, or a layer, does not have a value.
        InsideTraceError: Called inside a trace of the same model.
    """
    model.require_no_trace("ablate()")
    check_batch_size(batch_size)
    if not isinstance(how, torch.Tensor) and how not in ("zero", "mean", "resample"):
        raise ValueError(f'how is "zero", "mean", "resample" or a tensor, not {how!r}.')
    model.prepare(remote)
    rows = encode(model, prompts)
    listed = [what] if isinstance(what, Component) else list(what)
    cases = [[check(model, c) for c in (case if isinstance(case, (list, tuple)) else [case])] for case in listed]
    if not cases or not all(cases):
        raise ValueError("what is empty; give at least one Component.")
    others = rows if reference is None else encode(model, reference)
    filling = _filling(model, rows, others, reference is None, cases, how, seed, remote)
    metric = kl_divergence() if metric is None else metric
    scores, baseline = torch.empty(len(rows), len(cases)), torch.empty(len(rows))
    with bar(len(rows) * len(cases), "ablation", progress) as shown:
        for start in range(0, len(rows), PROMPTS):
            chosen = range(start, min(start + PROMPTS, len(rows)))
            some = [rows[i] for i in chosen]
            _, logits = states_of(model, some, [], remote)
            bound = bind_some(metric, model, len(rows), logits, chosen)
            baseline[list(chosen)] = by_prompt(bound, logits, list(range(len(some))))
            fill = filling(chosen)
            cells = []
            for k, row in enumerate(some):
                for case in cases:
                    edits = []
                    for component in case:
                        at = positions_of(model, component, row, f"prompt {start + k}")
                        edits.append(edit_of(component, at, fill(k, component, at)))
                    cells.append(Cell(k, tuple(edits)))
            reduce = scored(bound, cells)
            found = sweep(model, some, cells, reduce, remote=remote, batch_size=batch_size, progress=False)["scores"]
            scores[list(chosen)] = found.view(len(some), len(cases))
            shown.update(len(cells))
    return AblationResult(
        {"scores": scores, "baseline": baseline},
        {"scores": ("prompts", "components"), "baseline": ("prompts",)},
        {
            "prompts": prompt_labels(rows, model),
            "components": tuple(" and ".join(str(c) for c in case) for case in cases),
        },
        about=describe_run(model, "ablate", how=how, metric=metric_name(metric), seed=seed),
    )


def _filling(
    model: StandardizedTransformer,
    rows: list[Row],
    others: list[Row],
    same: bool,
    cases: list[list[Component]],
    how: How,
    seed: int,
    remote: Any,
) -> Any:
    """From the prompts of a chunk to a function (prompt of the chunk, component, positions) → what is put in."""
    if isinstance(how, torch.Tensor):
        return lambda chosen: lambda prompt, component, at: how
    if how == "zero":
        return lambda chosen: lambda prompt, component, at: torch.zeros(())
    keys = list(dict.fromkeys((c.value, c.layer) for case in cases for c in case))
    if how == "mean":
        for name, _ in keys:
            if {"query", "key"} <= set(axes_of(get_value(name))):
                raise ValueError(f"{name} has an axis of keys as long as the prompt, so it has no mean over positions.")
        means = _means(model, others, keys, remote)

        def mean(prompt: int, component: Component, at: tuple[int, ...]) -> torch.Tensor:
            one = means[component.value, component.layer]
            return cut(component, (0,) * len(at), one)

        return lambda chosen: mean
    partners = _partners(rows, others, same, seed)

    def drawn(chosen: range) -> Any:
        found, _ = states_of(model, [others[partners[i]] for i in chosen], keys, remote)

        def fill(prompt: int, component: Component, at: tuple[int, ...]) -> torch.Tensor:
            i = chosen[prompt]
            shift = len(others[partners[i]]) - len(rows[i])
            return cut(component, tuple(p + shift for p in at), found[prompt][component.value, component.layer])

        return fill

    return drawn


def _means(
    model: StandardizedTransformer, rows: list[Row], keys: list[tuple[str, int]], remote: Any
) -> dict[tuple[str, int], torch.Tensor]:
    """Mean of values over all positions of all prompts, with an axis of one position."""
    sums: dict[tuple[str, int], torch.Tensor] = {}
    for start in range(0, len(rows), PROMPTS):
        found, _ = states_of(model, rows[start : start + PROMPTS], keys, remote)
        for states in found:
            for key in keys:
                part = states[key].double().sum(positions_axis(key[0]), keepdim=True)
                sums[key] = sums[key] + part if key in sums else part
    count = sum(len(row) for row in rows)
    return {key: total / count for key, total in sums.items()}


def _partners(rows: list[Row], others: list[Row], same: bool, seed: int) -> list[int]:
    """For each prompt another one, at least as long, drawn at random.

    Raises:
        ValueError: There is none.
    """
    generator = torch.Generator().manual_seed(seed)
    partners = []
    for i, row in enumerate(rows):
        able = [k for k, other in enumerate(others) if len(other) >= len(row) and other.ids != row.ids]
        if not able:
            kind = "prompt" if same else "reference prompt"
            raise ValueError(
                f'how="resample": prompt {i} has {len(row)} tokens, and no other {kind} is as long; give longer ones '
                f"as reference."
            )
        partners.append(able[int(torch.randint(len(able), (), generator=generator))])
    return partners
