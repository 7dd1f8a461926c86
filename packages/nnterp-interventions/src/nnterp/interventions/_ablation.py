"""Ablation: what changes when a component of the model is replaced by zero, by its mean or by another prompt's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch

from nnterp.arguments import listed
from nnterp.defaults import plain_defaults
from nnterp.indices import integer
from nnterp.inputs import Row, encode
from nnterp.interventions._components import Component, check, cut, edit_of, positions_of
from nnterp.interventions._engine import Cell, Kept, Key, Shortcuts, axes_of, positions_axis, sweep
from nnterp.interventions._metrics import bind_some, by_prompt, kl_divergence, metric_name, scored
from nnterp.interventions._partial import DONE, Resume, cells_of, held_of, ids_of, resumed, unfinished
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, bar, check_batch_size
from nnterp.interventions._states import states_of
from nnterp.resuming import Call
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

How: TypeAlias = Literal["zero", "mean", "resample"] | torch.Tensor
# From a prompt (counted from the first that is held), a component and its positions to what replaces it there.
Filling: TypeAlias = Callable[[int, Component, tuple[int, ...]], torch.Tensor]
PROMPTS = 8  # prompts whose activations are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class AblationResult(Result):
    """The metric of each ablated run, `scores` `[prompts, components]`, and of the unedited runs, `baseline`.

    Example:
        result = ablate(model, prompts, components(model, "mlps_output"), "zero")
        worst = result.top(1)[0]  # labels and score: the MLP without which the prediction changes most
    """

    figure: ClassVar[str] = "ablation"


@plain_defaults()
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
    resume: Resume = None,
) -> AblationResult:
    """Run each prompt once for each component, with the component replaced by zero, its mean or another prompt's.

    (Zero, mean and resample ablation: Chan et al., "Causal scrubbing", 2022; Wang et al., 2022.) To remove a whole
    layer, ablate its "mixer_contributions" and "mlp_contributions" together, to zero.

    Args:
        model: The model.
        prompts: A text or a list; anything that `nnterp.inputs.encode` takes.
        what: A component, or a list: one run for each entry, which is a component or a list of components to ablate
            together. `components(...)` makes such a list.
        how: What replaces the component. "zero"; "mean", its mean over all positions of the reference prompts;
            "resample", its value in another reference prompt, at the same position counted from the end; or a tensor
            that broadcasts to the value (its axes without the batch, cut to the component's positions and heads).
        metric: As in `activation_patching`; the KL divergence from the unedited run's prediction if None.
        reference: Prompts that "mean" and "resample" draw from; the prompts themselves if None.
        seed: Seed of the random draw of "resample".
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service, the metric included.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        `scores` `[prompts, components]` and `baseline` `[prompts]`, float32, on the CPU.

    Raises:
        ValueError: `what` is empty, `how` is not one of its choices, or no reference prompt is long enough.
        Unavailable: The model, or a layer, does not have a value.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` is False.

    Example:
        heads = components(model, "attention_head_outputs", layers=[4], heads="all")
        scores = ablate(model, prompts, heads, "zero")["scores"]  # [prompts, components], KL in nats
    """
    model.require_no_trace("ablate()")
    check_batch_size(batch_size)
    seed = integer(seed, "seed")
    if not isinstance(how, torch.Tensor) and not (isinstance(how, str) and how in ("zero", "mean", "resample")):
        raise ValueError(f'how is "zero", "mean", "resample" or a tensor, not {how!r}.')
    model.prepare(remote)
    encoded = encode(model, prompts)
    cases = _cases(model, what)
    shortcuts = proven_shortcuts(model, remote)
    others = None if reference is None else encode(model, reference)
    metric = kl_divergence() if metric is None else metric
    asked = {
        "prompts": ids_of(encoded, others or []),
        "components": [[(c.value, c.layer, c.heads, c.positions) for c in case] for case in cases],
        "how": how,
        "seed": seed,
    }
    call = Call(model, "ablate", asked, {"metric": metric})
    about = describe_run(model, "ablate", how=how, metric=metric_name(metric), seed=seed)
    run = _Ablations(model, encoded, cases, shortcuts, about, resumed(call, resume))
    with bar(run.scores.numel(), "ablation", progress) as shown, call.keeping(lambda: run.partial(call)):
        fillings = _fillings(model, encoded, others, cases, how, seed, shortcuts, remote)
        for start in range(0, len(encoded), PROMPTS):
            chosen = range(start, min(start + PROMPTS, len(encoded)))
            if not run.done[list(chosen)].all() or held_of(run.earlier, (start,)):
                run.some(chosen, fillings(chosen), metric, remote=remote, batch_size=batch_size)
            shown.update(len(chosen) * len(cases))
    return run.result()


class _Ablations:
    """The runs of a call of `ablate`, and their metrics.

    Attributes:
        scores, done: The metric of each run, `[prompts, components]`, and whether it is there.
        baseline: The metric of the unedited runs, `[prompts]`.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        prompts: list[Row],
        cases: list[list[Component]],
        shortcuts: Shortcuts,
        about: dict[str, Any],
        earlier: Result | None,
    ) -> None:
        self.model, self.prompts, self.cases, self.shortcuts, self.about = model, prompts, cases, shortcuts, about
        self.scores = torch.full((len(prompts), len(cases)), float("nan"))
        self.baseline = torch.full((len(prompts),), float("nan"))
        self.done = torch.zeros(self.scores.shape, dtype=torch.bool)
        self.earlier, self.last = earlier, (Kept(), (0,))  # what is kept of the sweep that runs, and which it is
        if earlier is not None:
            self.scores, self.baseline = earlier["scores"].clone(), earlier["baseline"].clone()
            self.done = earlier[DONE].clone()

    def some(self, chosen: range, filling: Filling, metric: Any, **options: Any) -> None:
        """The runs of some prompts."""
        own, some = list(chosen), [self.prompts[i] for i in chosen]
        _, logits = states_of(self.model, some, [], self.shortcuts, options["remote"])
        bound = bind_some(metric, self.model, len(self.prompts), logits, chosen)
        self.baseline[own] = by_prompt(bound, logits, list(range(len(some))))
        cells = _cells(self.model, some, self.cases, filling, chosen.start)
        done = set(self.done[own].flatten().nonzero()[:, 0].tolist())
        kept = Kept({"scores": self.scores[own].flatten()}, done, held_of(self.earlier, (chosen.start,)))
        self.last = kept, (chosen.start,)
        try:
            sweep(
                self.model,
                some,
                cells,
                scored(bound, cells),
                self.shortcuts,
                kept=kept,
                tokens=bound.tokens,
                progress=False,
                **options,
            )
        finally:
            found, finished = cells_of(kept, len(some), len(self.cases))
            self.scores[own], self.done[own] = found["scores"], finished

    def result(self) -> AblationResult:
        """The scores with labels."""
        return AblationResult(
            {"scores": self.scores, "baseline": self.baseline},
            {"scores": ("prompts", "components"), "baseline": ("prompts",)},
            {
                "prompts": prompt_labels(self.prompts, self.model),
                "components": tuple(" and ".join(str(c) for c in case) for case in self.cases),
            },
            about=self.about,
        )

    def partial(self, call: Call) -> Result | None:
        """What is computed so far; None if that is nothing."""
        return unfinished(call, self.result, self.done, ("prompts", "components"), *self.last)


def _cases(model: StandardizedTransformer, what: Any) -> list[list[Component]]:
    """The components that are ablated together in each run, checked.

    Raises:
        ValueError: There are none.
    """
    what = [what] if isinstance(what, Component) else listed(what, "what", "a Component, or several")
    cases = [[check(model, c) for c in (case if isinstance(case, (list, tuple)) else [case])] for case in what]
    if not cases or not all(cases):
        raise ValueError("what is empty; give at least one Component.")
    return cases


def _cells(
    model: StandardizedTransformer, prompts: list[Row], cases: list[list[Component]], filling: Filling, first: int
) -> list[Cell]:
    """A cell for each prompt and case; `first` is the first prompt's index, for errors."""
    cells = []
    for k, prompt in enumerate(prompts):
        for case in cases:
            edits = []
            for component in case:
                at = positions_of(model, component, prompt, f"prompt {first + k}")
                edits.append(edit_of(component, at, filling(k, component, at)))
            cells.append(Cell(k, tuple(edits)))
    return cells


def _fillings(
    model: StandardizedTransformer,
    prompts: list[Row],
    reference: list[Row] | None,
    cases: list[list[Component]],
    how: How,
    seed: int,
    shortcuts: Shortcuts,
    remote: Any,
) -> Callable[[range], Filling]:
    """What replaces components, prepared for all prompts; called with the indices of some prompts, a `Filling`."""
    if isinstance(how, torch.Tensor):
        return lambda chosen: lambda prompt, component, at: how
    if how == "zero":
        return lambda chosen: lambda prompt, component, at: torch.zeros(())
    keys = list(dict.fromkeys((c.value, c.layer) for case in cases for c in case))
    others = prompts if reference is None else reference
    if how == "mean":
        means = _means(model, others, keys, shortcuts, remote)
        return lambda chosen: (
            lambda prompt, component, at: cut(component, (0,) * len(at), means[component.value, component.layer])
        )
    pattern = next((name for name, _ in keys if get_value(name).is_pattern), None)
    partners = _partners(prompts, others, "prompt" if reference is None else "reference prompt", seed, pattern)

    def drawn(chosen: range) -> Filling:
        found, _ = states_of(model, [others[partners[i]] for i in chosen], keys, shortcuts, remote)

        def filling(prompt: int, component: Component, at: tuple[int, ...]) -> torch.Tensor:
            i = chosen[prompt]
            shift = len(others[partners[i]]) - len(prompts[i])
            return cut(component, tuple(p + shift for p in at), found[prompt][component.value, component.layer])

        return filling

    return drawn


def _means(
    model: StandardizedTransformer,
    prompts: list[Row],
    keys: Sequence[Key],
    shortcuts: Shortcuts,
    remote: Any,
) -> dict[Key, torch.Tensor]:
    """Mean of values over all positions of all prompts, float64, with an axis of one position.

    Raises:
        ValueError: A value has an axis of keys, as long as the prompt.
    """
    for name, _ in keys:
        if {"query", "key"} <= set(axes_of(get_value(name))):
            raise ValueError(f"{name} has an axis of keys as long as the prompt, so it has no mean over positions.")
    sums: dict[Key, torch.Tensor] = {}
    for start in range(0, len(prompts), PROMPTS):
        found, _ = states_of(model, prompts[start : start + PROMPTS], keys, shortcuts, remote)
        for states in found:
            for key in keys:
                part = states[key].double().sum(positions_axis(key[0]), keepdim=True)
                sums[key] = sums[key] + part if key in sums else part
    count = sum(len(prompt) for prompt in prompts)
    return {key: total / count for key, total in sums.items()}


def _partners(prompts: list[Row], others: list[Row], kind: str, seed: int, pattern: str | None) -> list[int]:
    """For each prompt the index of another one that is at least as long, drawn at random.

    With `pattern`, the name of a value that has an axis of keys, another one that is exactly as long.

    Raises:
        ValueError: There is none.
    """
    generator = torch.Generator().manual_seed(seed)
    partners = []
    for i, prompt in enumerate(prompts):
        able = [k for k, other in enumerate(others) if len(other) >= len(prompt) and other.ids != prompt.ids]
        if pattern is not None:
            able = [k for k in able if len(others[k]) == len(prompt)]
        if not able and pattern is not None:
            raise ValueError(
                f'how="resample": {pattern} has an axis of keys, as long as the prompt; prompt {i} has {len(prompt)} '
                f"tokens, and no other {kind} has as many. Give some as reference."
            )
        if not able:
            raise ValueError(
                f'how="resample": prompt {i} has {len(prompt)} tokens, and no other {kind} is as long; give longer '
                f"ones as reference."
            )
        partners.append(able[int(torch.randint(len(able), (), generator=generator))])
    return partners
