"""Attribution patching: an estimate of every cell of activation patching from two forward passes and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from nnterp.arguments import count, listed
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.interventions._attribution._audit import AUDIT, audited
from nnterp.interventions._attribution._exact import exact_effects
from nnterp.interventions._attribution._pairs_run import Method, PairsRun
from nnterp.interventions._attribution._result import AttributionResult
from nnterp.interventions._attribution._slopes import require_gradients_on
from nnterp.interventions._attribution._softmax import KEYS, QUERIES
from nnterp.interventions._columns import column
from nnterp.interventions._grid import Grid
from nnterp.interventions._metrics import kl_divergence, metric_name
from nnterp.interventions._pairs import Direction, Pairs, encode_pairs
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, bar, check_batch_size, within_memory
from nnterp.positions import Positions
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

AUTO_PAIRS, AUTO_TOKENS = 16, 2048  # most pairs and tokens of a batch whose size is "auto": gradients keep every value


@plain_defaults()
def attribution_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    metric: Any,
    values: str | Sequence[str] = "layers_output",
    layers: Indices = None,
    positions: Positions | Literal["all"] = None,
    heads: Indices = None,
    direction: Direction = "denoising",
    method: Method = "gradient",
    steps: int = 5,
    audit: int = 50,
    *,
    graddrop: bool = False,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    resume: Resume = None,
) -> AttributionResult:
    """Estimate what `activation_patching` would find in every cell, from the gradient of the metric.

    A cell's score is what patching it would change, to first order: the difference of the two runs' values times the
    gradient at the run patched into. All cells together cost two forward passes and one backward pass of the prompts.
    Estimates can be wrong, of large activations most of all, so some of them are computed exactly: see `audit`.

    Methods:

    - "gradient": the gradient at the run patched into (Nanda, [Attribution Patching](
      https://www.neelnanda.io/mechanistic-interpretability/attribution-patching), 2023; Syed et al., 2023).
    - "integrated": the mean gradient over `steps` runs whose token embeddings lie between those of the two runs
      (EAP-IG-inputs: Hanna et al., [Have Faith in Faithfulness](https://arxiv.org/abs/2403.17806), 2024). Points are
      the middles of equal steps, and not their ends as in the paper, which has the same limit and reaches it sooner:
      scores of the stream that enters the first layer, over all positions, sum to the difference of the two runs.
      Costs `steps` times as much.
    - "attention-aware": for queries and keys, the pattern that patching them makes is recomputed through the softmax,
      and what changes in it is multiplied with the gradient of the pattern (AtP*, section 3.1.1: Kramár et al.,
      [AtP*](https://arxiv.org/abs/2403.00745), 2024); other values as for "gradient". Needs attention that is computed
      eagerly (`enable_attention_probs=True`).

    A cell may act on the metric in two ways that cancel, directly and through a later layer, and then the gradient
    says that it does nothing, though a small error in either would show that it does. With `graddrop`, gradients are
    taken without what flows through one layer's contribution to the stream, for each layer in turn, and a score is the
    mean of the absolute estimates (GradDrop: AtP*, section 3.1.2; with "attention-aware" it is AtP*). The layer that a
    cell belongs to is left out of the mean: what is inside of it acts through nothing else. Scores have no sign then:
    they rank cells to be patched, and are no estimates of their effects.

    Args:
        model: The model, with its weights here: this does not run remotely.
        clean: A prompt, or a list.
        corrupted: As many prompts, one for each clean one.
        metric: `logit_difference(...)`, `target_probability(...)`, `kl_divergence()`, or a function of the next-token
            logits `[n, vocab]` of n runs that returns n numbers; differentiable.
        values: What is patched, as for `activation_patching`: the name of a value, or several.
        layers: The layer or layers; all that have the value if None.
        positions: Positions over the prompts' own tokens, or text selectors, as for `activation_patching`.
        heads: Tell apart these heads (or neurons): indices or "all".
        direction: "denoising" patches from the clean run into the corrupted one, "noising" the reverse.
        method: How effects are estimated.
        steps: Points between the two runs, for "integrated".
        audit: How many scores to compute exactly as well: half of them the largest, half a random sample of the
            others. 0 for none. The comparison is the result's `audit`.
        graddrop: Make scores of magnitudes, as above. Costs a backward pass for each layer of the model instead of one.
        seed: Of the random sample.
        batch_size: Pairs of a batch (rows, in the audit); "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to.

    Returns:
        An `AttributionResult`. `scores` has the axes and labels of `activation_patching`'s and estimates the metric of
        the patched run minus that of the run patched into; its `patched` estimates `activation_patching`'s own scores.
        `clean` and `corrupted` are the metrics of the unpatched runs, `[prompts]`. Float32 on the CPU. With `graddrop`
        scores are at least 0, the audit compares them with absolute exact effects, and there is no `patched`.

    Raises:
        ValueError: The metric is not differentiable; prompts whose embeddings are to be mixed are not equally long;
            numbers or lengths of prompts do not match; `graddrop` is given with "integrated", or an argument is not
            one of its choices.
        IndexError: There is no such layer, head or position (the prompt's tokens are shown).
        Unavailable: The model, or a layer that was named, does not have the value, or no gradient with respect to it;
            or scores are not made of queries and keys in a way that can be recomputed; or, for `graddrop`, what leaves
            a layer is not what enters it plus what it adds (BERT), or the value may stand in the middle of that.
        RuntimeError: It was called under `torch.no_grad()`.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` is False.

    Example:
        >>> found = attribution_patching(  # doctest: +SKIP
        ...     model, "The capital of France is", "The capital of Italy is", logit_difference(" Paris", " Rome")
        ... )
        >>> found.top(3), found.audit.rank_correlation  # doctest: +SKIP
    """
    model.require_no_trace("attribution_patching()")
    require_gradients_on("attribution_patching()")
    check_batch_size(batch_size)
    steps, audit, seed = count(steps, "steps"), count(audit, "audit", 0), count(seed, "seed", 0)
    pairs = encode_pairs(model, clean, corrupted, direction)
    model.prepare()
    names = [values] if isinstance(values, str) else listed(values, "values", "the name of a value, or several")
    if not names:
        raise ValueError("values is empty; give the name of a value, or several.")
    _check_method(method, names, pairs, metric_name(metric))
    if graddrop and method == "integrated":
        raise ValueError(
            'graddrop=True goes with method="gradient" or "attention-aware", and not with "integrated", whose '
            "gradients are of many runs. Leave one of both out."
        )
    grid = Grid(model, pairs, names, layers, positions, heads)
    asked = {
        "prompts": ids_of(pairs.clean, pairs.corrupted),
        "values": names,
        "layers": grid.layers,
        "heads": grid.units,
        "positions": grid.where,
        "direction": direction,
        "method": method,
        "steps": steps if method == "integrated" else None,
        **({"graddrop": True} if graddrop else {}),
    }
    call = Call(model, "attribution_patching", asked, {"metric": metric})
    run = _Attribution(model, grid, metric, method, steps, batch_size, resumed(call, resume), audit > 0, graddrop)
    with bar(len(pairs), "attribution patching", progress) as shown, call.keeping(lambda: run.partial(call)):
        run.everything(shown)
        return run.result(audit, seed)


def _check_method(method: Any, names: list[str], pairs: Pairs, metric: str) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method is one of {', '.join(map(repr, get_args(Method)))}, not {method!r:.80}.")
    if method == "attention-aware" and not {QUERIES, KEYS} & set(names):
        raise ValueError(
            f'method="attention-aware" recomputes the softmax for {QUERIES} and {KEYS}; values={names} has neither. '
            'Add them, or take method="gradient", which is the same for other values.'
        )
    if metric == kl_divergence().name and not pairs.denoising and method != "integrated":
        raise ValueError(
            f'{metric}() is least, and has no gradient, at the clean run, which direction="noising" patches into: all '
            'estimates would be 0. Take method="integrated", direction="denoising" or another metric.'
        )
    if method == "integrated":
        for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
            if len(clean) != len(corrupted):
                raise ValueError(
                    f"Pair {i}: the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupted)}, so "
                    'there are no embeddings between theirs for method="integrated". Make them equally long, or take '
                    'method="gradient".'
                )


class _Attribution:
    """The estimates of a call of `attribution_patching`.

    Attributes:
        scores: The estimated effect of each cell, `[prompts, values, layers, heads, positions]`.
        into, source: The metric of the run patched into and of the run patched from, `[prompts]`.
        finished: How many pairs are done, from the first.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        grid: Grid,
        metric: Any,
        method: Method,
        steps: int,
        batch_size: BatchSize,
        earlier: Result | None,
        audited: bool,
        graddrop: bool,
    ) -> None:
        self.graddrop = graddrop
        self.model, self.grid, self.pairs, self.metric = model, grid, grid.pairs, metric
        self.batch_size, self.method, self.steps = batch_size, method, steps
        self.shortcuts = proven_shortcuts(model)
        self.run = PairsRun(model, grid, metric, method, steps, self.shortcuts, audited, graddrop)
        self.scores = torch.full((len(self.pairs), *grid.shape), torch.nan, dtype=torch.float32)
        self.into, self.source = (torch.full((len(self.pairs),), torch.nan, dtype=torch.float32) for _ in range(2))
        self.finished = 0
        if earlier is not None:
            self.scores = earlier["scores"].view(self.scores.shape).clone()
            ends = (earlier["corrupted"], earlier["clean"])
            self.into, self.source = (end.clone() for end in (ends if self.pairs.denoising else ends[::-1]))
            self.finished = int(earlier[DONE].sum())

    def everything(self, shown: Any) -> None:
        """All pairs, in batches; when memory runs out, the batch is halved and run again."""
        shown.update(self.finished)
        most = AUTO_PAIRS if self.batch_size == "auto" else self.batch_size
        while self.finished < len(self.pairs):
            longest = max(len(self.pairs.into[self.finished]), len(self.pairs.source[self.finished]))
            size = min(most, max(1, AUTO_TOKENS // longest)) if self.batch_size == "auto" else most
            chosen = range(self.finished, min(self.finished + size, len(self.pairs)))
            if not within_memory(partial(self.some, chosen), len(chosen)):
                most = max(1, len(chosen) // 2)
                continue
            self.finished = chosen.stop
            shown.update(len(chosen))

    def some(self, chosen: range) -> None:
        """The cells of some pairs."""
        rows = list(chosen)
        self.scores[rows], self.into[rows], self.source[rows] = self.run.effects(rows)

    def in_question(self) -> torch.Tensor:
        """The flat scores, NaN for cells that patch nothing, because both runs are equal up to their positions."""
        scores = self.scores.clone()
        for i in range(len(self.pairs)):
            empty = [c for c, (at, _) in enumerate(self.grid.differing(i, self.shortcuts)) if not at]
            scores[i, ..., empty] = torch.nan
        return scores.flatten()

    def partial(self, call: Call) -> Result | None:
        """What is computed so far; None if that is nothing."""
        done = torch.arange(len(self.pairs)) < self.finished
        return unfinished(call, self.result, done, ("prompts",))

    def result(self, audit: int = 0, seed: int = 0) -> AttributionResult:
        """The scores with labels, and the audit of some of them."""
        scores, axes, labels, tokens = self.grid.labelled(self.scores)
        clean, corrupted = (self.source, self.into) if self.pairs.denoising else (self.into, self.source)
        kind = "size of the change" if self.graddrop else "change"
        result = AttributionResult(
            {"scores": scores, "clean": clean, "corrupted": corrupted},
            {"scores": axes, "clean": ("prompts",), "corrupted": ("prompts",)},
            labels,
            tokens,
            about=describe_run(
                self.model,
                "attribution_patching",
                metric=metric_name(self.metric),
                score=f"estimated {kind} of {metric_name(self.metric)}".replace("_", " "),
                values=self.grid.names,
                direction=self.pairs.direction,
                corrupted=prompt_labels(self.pairs.corrupted, self.model),
                method=self.method,
                **({"steps": self.steps} if self.method == "integrated" else {}),
                **({"graddrop": True} if self.graddrop else {}),
            ),
        )
        if audit:
            cells = partial(
                exact_effects,
                self.model,
                self.grid,
                self.metric,
                shortcuts=self.shortcuts,
                batch_size=self.batch_size,
                known=self.run.known,
            )
            labelled = partial(_labels, result)
            signed = not self.graddrop
            exact = cells if signed else lambda indices: cells(indices).abs()
            result.about[AUDIT] = audited(self.in_question(), exact, labelled, audit, seed, signed).record()
        return result


def _labels(result: AttributionResult, cell: int) -> dict[str, Any]:
    """The labels of one score, by its place in the flat scores."""
    where = torch.unravel_index(torch.tensor(cell), result["scores"].shape)
    return {column(axis): result.labels[axis][int(i)] for axis, i in zip(result.axes["scores"], where, strict=True)}
