"""Distributed alignment search: a subspace whose patching moves the metric, found by gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrizations

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.discovery import require_passes_with_gradients
from nnterp.inputs import forward_flags
from nnterp.interventions._engine import Passing, Shortcuts
from nnterp.interventions._metrics import Bound, bind_some
from nnterp.interventions._pairs import Direction, Pairs, encode_pairs, gap_between
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._results import prompt_labels
from nnterp.interventions._running import bar, filled, weights_at_rest
from nnterp.interventions._states import sharing_groups, states_of
from nnterp.interventions._subspace._patch import measured, only_basis
from nnterp.interventions._subspace._result import SubspaceResult
from nnterp.interventions._subspace._where import Where, random_basis
from nnterp.positions import Positions

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@plain_defaults()
def fit_subspace(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    metric: Any,
    value: str,
    layer: int,
    dimensions: int = 1,
    positions: Positions = -1,
    head: int | None = None,
    direction: Direction = "denoising",
    steps: int = 100,
    lr: float = 0.05,
    held_out: float = 0.25,
    controls: int = 5,
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool | None = None,
) -> SubspaceResult:
    """The subspace of a value through which one run's activation moves another run's metric to its own.

    Distributed alignment search (Geiger et al., [2023](https://arxiv.org/abs/2303.02536)): an orthogonal map from the
    value to `dimensions` numbers is trained by Adam so that runs in which these numbers are patched have the metric of
    the run patched from. The loss is the squared distance of the two metrics, as a part of what it is without patching
    (the paper's is the cross-entropy of counterfactual labels). The subspace is then measured on pairs that are held
    out, by exact runs, beside random subspaces of the same size and the whole value. Costs `steps` forward and backward
    passes of `batch_size` prompts. The weights and their `.grad` stay as they are.

    Args:
        model: The model, with its weights here: this does not run remotely.
        clean, corrupted: Prompts that go in pairs, at least two.
        metric: As for `activation_patching`; differentiable.
        value, layer, positions, head, direction: What is patched, as for `patch_subspace`.
        dimensions: Size of the subspace.
        steps: Steps of Adam.
        lr: Its learning rate.
        held_out: The part of the pairs that is held out for measuring, at least one.
        controls: How many random subspaces to measure as well.
        seed: Of the subspace it begins with, of which pairs are held out, of batches and controls.
        batch_size: Pairs of a step.
        progress: Show a progress bar; with None, only if the work lasts.

    Returns:
        A `SubspaceResult` of the pairs held out, with `basis` and `losses` `[steps]`.

    Raises:
        ValueError: There are fewer than two pairs; the two runs of each pair have the same metric; the loss is not
            finite or the metric not differentiable.
        RuntimeError: It was called under `torch.no_grad()`.
        Unavailable: The model runs some passes without gradients (HRM).
        InsideTraceError: Called inside a trace of the same model.

        An error in a later step, or an interrupt, carries the subspace so far as `error.partial`.

    Example:
        clean = ["The capital of France is", "The capital of Spain is", "The capital of Japan is"]
        corrupted = ["The capital of Italy is", "The capital of Poland is", "The capital of Norway is"]
        metric = logit_difference([" Paris", " Madrid", " Tokyo"], [" Rome", " Warsaw", " Oslo"])
        found = fit_subspace(model, clean, corrupted, metric, "layers_output", 4, dimensions=2, steps=3, held_out=0.4)
    """
    model.require_no_trace("fit_subspace()")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError("fit_subspace() was called under torch.no_grad() or inference_mode. Call it outside.")
    steps, batch_size, seed = count(steps, "steps"), count(batch_size, "batch_size"), count(seed, "seed", 0)
    count(controls, "controls", 0)
    if not isinstance(held_out, (int, float)) or not 0 < held_out < 1 or not isinstance(lr, (int, float)) or lr <= 0:
        raise ValueError(f"held_out is between 0 and 1 and lr positive, not {held_out!r} and {lr!r}.")
    pairs = encode_pairs(model, clean, corrupted, direction)
    if len(pairs) < 2:
        raise ValueError("fit_subspace() needs at least two pairs: one to fit on, and one held out to measure with.")
    model.prepare()
    require_passes_with_gradients(model._module, model.anatomy)
    where = Where(model, pairs, value, layer, positions, head)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    kept = min(len(pairs) - 1, max(1, round(held_out * len(pairs))))
    outside, inside = sorted(order[:kept]), sorted(order[kept:])
    fit = _Fit(model, pairs, metric, where, proven_shortcuts(model))
    fit.prepare(inside, batch_size)
    rotation = _rotation(fit.width, count(dimensions, "dimensions", 1, fit.width), generator).to(fit.device)
    fitted_on = prompt_labels([pairs.clean[i] for i in inside], model)
    losses: list[float] = []

    def done(found: SubspaceResult) -> SubspaceResult:
        arguments = {**found.about["arguments"], "steps": steps, "lr": lr, "fitted_on": list(fitted_on)}
        return replace(
            found,
            tensors={**found.tensors, "losses": torch.tensor(losses)},
            axes={**found.axes, "losses": ("steps",)},
            labels={**found.labels, "steps": tuple(range(len(losses)))},
            about={**found.about, "function": "fit_subspace", "arguments": arguments},
        )

    try:
        with weights_at_rest(model._module), bar(steps, "fit_subspace", progress) as shown:
            adam = torch.optim.Adam(rotation.parameters(), lr=lr)
            for _ in range(steps):
                chosen = torch.randperm(len(inside), generator=generator)[:batch_size].tolist()
                loss = fit.loss([inside[k] for k in chosen], rotation.weight.T)
                adam.zero_grad()
                loss.backward()
                adam.step()
                losses.append(float(loss.detach()))
                shown.update(1)
        options: dict[str, Any] = {"controls": controls, "seed": seed, "batch_size": batch_size, "progress": progress}
        return done(measured(model, pairs, outside, metric, where, rotation.weight.detach().T, **options))
    except BaseException as error:
        if losses:
            error.partial = done(only_basis(model, rotation.weight.detach().T, where, direction))  # type: ignore[attr-defined]
            error.add_note(f"{len(losses)} of {steps} steps are done: the subspace so far is error.partial.")
        raise


def _rotation(width: int, dimensions: int, generator: torch.Generator) -> torch.nn.Module:
    """A linear map whose rows stay orthonormal under gradient steps; it begins at a random subspace."""
    with torch.random.fork_rng(devices=[]):  # torch completes the basis by numbers of its global generator
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        linear = torch.nn.Linear(width, dimensions, bias=False)
        linear.weight.data = random_basis(width, dimensions, generator).T.contiguous()
        return parametrizations.orthogonal(linear)


class _Fit:
    """What a step of the fit needs of each pair.

    Attributes:
        width: Numbers of the value at one position.
        device: Where the value is.
        given: Pair → what the source has at its positions.
        bounds: Pair → its metric, as a function of its logits `[1, vocab]`.
        targets: Pair → the metric of the run patched from.
        gap: The mean of the squared differences of the two runs' metrics.
    """

    def __init__(
        self, model: StandardizedTransformer, pairs: Pairs, metric: Any, where: Where, shortcuts: Shortcuts
    ) -> None:
        self.model, self.pairs, self.metric, self.where, self.shortcuts = model, pairs, metric, where, shortcuts
        self.given: dict[int, torch.Tensor] = {}
        self.bounds: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.targets: dict[int, torch.Tensor] = {}
        self.gap, self.width, self.device = 0.0, 0, torch.device("cpu")

    def prepare(self, chosen: Sequence[int], batch_size: int) -> None:
        """Run the pairs unpatched.

        Raises:
            ValueError: All runs patched from have the metric of the runs patched into.
        """
        gaps = []
        for start in range(0, len(chosen), batch_size):
            some = chosen[start : start + batch_size]
            states, logits = states_of(
                self.model, [self.pairs.source[i] for i in some], [self.where.key], self.shortcuts
            )
            _, own = states_of(self.model, [self.pairs.into[i] for i in some], [], self.shortcuts)
            clean = logits if self.pairs.denoising else own
            bound = bind_some(self.metric, self.model, len(self.pairs), clean, some)
            for k, i in enumerate(some):
                self.given[i] = self.where.given(i, states[k]).clone()
                self.bounds[i] = partial(_one, bound, k)
                self.targets[i] = self.bounds[i](logits[k : k + 1]).detach()
                gap = gap_between(self.targets[i], self.bounds[i](own[k : k + 1]).detach())
                gaps.append(float(gap.nan_to_num().square()))
        first = self.given[chosen[0]]
        self.gap, self.width, self.device = sum(gaps) / len(gaps), self.where.width(first), first.device
        if not self.gap > 0:
            raise ValueError(
                "The metric is the same in the runs patched from and in those patched into, for every pair: there is "
                "nothing to fit. Take prompts or a metric that differ."
            )

    def loss(self, chosen: list[int], basis: torch.Tensor) -> torch.Tensor:
        """The squared distance to the run patched from, as a part of what it is without patching.

        Raises:
            ValueError: It is not finite, or has no gradient.
        """
        into = [self.pairs.into[i] for i in chosen]
        parts = []
        for group in sharing_groups(self.model, into, self.shortcuts):
            own = [chosen[k] for k in group]
            for i, logits in zip(own, self.patched(own, basis), strict=True):
                parts.append((self.bounds[i](logits[None]) - self.targets[i].to(logits.device)).square().cpu())
        loss = torch.stack(parts).mean() / self.gap
        if not loss.requires_grad:
            raise ValueError(
                "The metric does not depend on the value through differentiable operations: it was detached, made of "
                "integers (argmax, comparisons), or the positions that are patched come after the last token's."
            )
        if not torch.isfinite(loss):
            raise ValueError("The loss is not finite: lower lr, or load the model in float32.")
        return loss

    def patched(self, chosen: list[int], basis: torch.Tensor) -> torch.Tensor:
        """Next-token logits of the patched runs of some pairs, float32 `[chosen, vocab]`."""
        model, key, readout = self.model, self.where.key, self.shortcuts.readout
        prompts = [self.pairs.into[i] for i in chosen]
        edits = [(row, self.where.edit(i, self.given[i], basis)) for row, i in enumerate(chosen)]
        ids, flags, leaving = filled(prompts), forward_flags(model), ("layers_output", model.num_layers - 1)
        row, at = torch.arange(len(prompts)), torch.tensor([len(prompt) - 1 for prompt in prompts])
        with model.trace({"input_ids": ids}, **flags) as tracer:
            passing = Passing(model)
            new = passing.write(key, edits, tuple(ids.shape), 0)
            if readout:
                whole = new if key == leaving else passing.read(leaving)
                last = whole[row.to(whole.device), at.to(whole.device)].save()
                tracer.stop()
            else:
                whole = model.logits
                last = whole[row.to(whole.device), at.to(whole.device)].save()
        return (model.project_on_vocab(last) if readout else last).float()


def _one(bound: Bound, prompt: int, logits: torch.Tensor) -> torch.Tensor:
    """The metric of one row of logits, a scalar."""
    return bound(logits, prompt)[0]
