"""Metrics: the numbers, computed from next-token logits, by which interventions are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from nnterp.interventions._engine import Cell, Reduce
from nnterp.interventions._tokens import ids_per_prompt

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Score: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]  # from logits [n, vocab] and their prompt's index to [n]


@dataclass(frozen=True)
class Bound:
    """A metric that is ready for some prompts: a function from logits `[n, vocab]` and their prompt's index to `[n]`.

    Attributes:
        score: The function.
        tokens: Ids of the only tokens whose logits it reads, int64 on the CPU; None if it reads all.
    """

    score: Score
    tokens: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, prompt: int) -> torch.Tensor:
        return self.score(logits, prompt)


@dataclass(frozen=True)
class Metric:
    """A number computed from next-token logits, which may depend on the prompt.

    Made by `logit_difference`, `probability_difference`, `target_probability` and `kl_divergence`.

    Attributes:
        name: What results call it.
        bind: A function that prepares the metric. It takes the model, the number of prompts and the logits of their
            reference runs, `[prompts, vocab]`; it returns a function that takes logits `[n, vocab]` of one prompt and
            the prompt's index, and returns `[n]`.

    Example:
        def bind(model, prompts, reference):
            return lambda logits, prompt: logits.log_softmax(-1).max(-1).values


        scores = ablate(model, prompts, Component("mlps_output", 3), "zero", Metric("confidence", bind))
    """

    name: str
    bind: Callable[[StandardizedTransformer, int, torch.Tensor], Score]

    def __repr__(self) -> str:
        return self.name


def logit_difference(correct: Any, wrong: Any) -> Metric:
    """Compare the logit of the correct token with that of the wrong one (Wang et al., 2022).

    Args:
        correct, wrong: A token id or a text that is one token, or a list with one entry (or list of entries) for each
            prompt. " Paris", with the space before it, continues a sentence, and is another token than "Paris".

    Returns:
        The metric: the correct token's logit minus the wrong one's; the mean of several tokens.

    Example:
        metric = logit_difference([" Paris", " Tokyo"], [" Rome", " Rome"])  # an entry for each prompt
        both = ["The capital of France is", "The capital of Japan is"]
        scores = ablate(model, both, Component("mlps_output", 3), "zero", metric)["scores"]  # [prompts, 1]
    """

    def bind(model: StandardizedTransformer, prompts: int, _: torch.Tensor) -> Score:
        good = ids_per_prompt(model, correct, prompts, "logit_difference(correct=...)")
        bad = ids_per_prompt(model, wrong, prompts, "logit_difference(wrong=...)")
        named = torch.cat([good.flatten(), bad.flatten()]).unique()
        return Bound(
            lambda logits, prompt: _mean_at(logits, good[prompt]) - _mean_at(logits, bad[prompt]), named[named >= 0]
        )

    return Metric("logit_difference", bind)


def target_probability(target: Any) -> Metric:
    """Measure the probability of a token.

    Args:
        target: A token id or a text that is one token, or a list with one entry (or list of entries) for each prompt.
            " Paris", with the space before it, continues a sentence, and is another token than "Paris".

    Returns:
        The metric, from 0 to 1; the sum over several tokens.

    Example:
        metric = target_probability(" Paris")
        scores = ablate(model, "The capital of France is", Component("mlps_output", 3), "zero", metric)["scores"]
    """

    def bind(model: StandardizedTransformer, prompts: int, _: torch.Tensor) -> Score:
        ids = ids_per_prompt(model, target, prompts, "target_probability(target=...)")
        return lambda logits, prompt: _sum_at(logits.softmax(-1), ids[prompt])

    return Metric("target_probability", bind)


def probability_difference(greater: Any, smaller: Any) -> Metric:
    """Compare probabilities of some tokens with those of others (Hanna et al., 2023, for greater-than).

    Args:
        greater, smaller: A token id or a text that is one token, or a list with one entry (or list of entries) for each
            prompt.

    Returns:
        The metric: the sum over `greater` minus that over `smaller`, from −1 to 1.

    Example:
        metric = probability_difference([[" Paris", " Rome"]], [[" Tokyo", " Oslo"]])
        scores = ablate(model, "The capital of France is", Component("mlps_output", 3), "zero", metric)["scores"]
    """

    def bind(model: StandardizedTransformer, prompts: int, _: torch.Tensor) -> Score:
        more = ids_per_prompt(model, greater, prompts, "probability_difference(greater=...)")
        less = ids_per_prompt(model, smaller, prompts, "probability_difference(smaller=...)")

        def difference(logits: torch.Tensor, prompt: int) -> torch.Tensor:
            probs = logits.softmax(-1)
            return _sum_at(probs, more[prompt]) - _sum_at(probs, less[prompt])

        return difference

    return Metric("probability_difference", bind)


def kl_divergence() -> Metric:
    """Measure how far the next-token distribution is from that of the clean, unedited run.

    Returns:
        The metric: KL(reference ‖ run), in nats; the reference is the clean, unedited run.

    Example:
        scores = ablate(model, prompts, Component("mlps_output", 3), "zero", kl_divergence())["scores"]  # [prompts, 1]
    """

    def bind(_: StandardizedTransformer, __: int, reference: torch.Tensor) -> Score:
        logs = reference.log_softmax(-1)

        def divergence(logits: torch.Tensor, prompt: int) -> torch.Tensor:
            own = logs[prompt].to(logits.device)
            return torch.nn.functional.kl_div(logits.log_softmax(-1), own, reduction="none", log_target=True).sum(-1)

        return divergence

    return Metric("kl_divergence", bind)


def bind_metric(metric: Any, model: StandardizedTransformer, prompts: int, reference: torch.Tensor) -> Bound:
    """Prepare a metric, or any callable on logits `[n, vocab]`.

    Returns:
        A function that takes logits `[n, vocab]` of one prompt and the prompt's index, and returns `[n]`, float32. It
        raises ValueError if the metric returns another shape.

    Raises:
        TypeError: It is neither a metric nor callable.
    """
    tokens: torch.Tensor | None = None
    score: Score
    if isinstance(metric, Metric):
        made: Any = metric.bind(model, prompts, reference)
        score, tokens = (made.score, made.tokens) if isinstance(made, Bound) else (made, None)
    elif callable(metric):

        def score(logits: torch.Tensor, _: int) -> torch.Tensor:
            return metric(logits)
    else:
        raise TypeError(
            f"A metric is made by logit_difference, target_probability, ..., or is a "
            f"function of logits [n, vocab]; not a {type(metric).__name__}."
        )

    def checked(logits: torch.Tensor, prompt: int) -> torch.Tensor:
        made = score(logits, prompt)
        if not isinstance(made, torch.Tensor) or made.shape != logits.shape[:1]:
            got = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise ValueError(
                f"The metric was given logits {list(logits.shape)} (runs, vocabulary) and returned {got}; it must "
                f"return one number for each run, a tensor of shape [{logits.shape[0]}]."
            )
        return made.float()

    return Bound(checked, tokens)


def bind_some(
    metric: Any, model: StandardizedTransformer, prompts: int, reference: torch.Tensor, chosen: Sequence[int]
) -> Bound:
    """`bind_metric` for some of the prompts.

    Args:
        metric: The metric.
        model: The model.
        prompts: Number of all prompts.
        reference: Logits of the chosen prompts alone, `[chosen, vocab]`.
        chosen: Indices of the chosen prompts.

    Returns:
        The bound metric, to which the first chosen prompt is prompt 0, and so on.
    """
    whole = reference.new_zeros(max(chosen) + 1, reference.shape[1])
    whole[list(chosen)] = reference
    bound = bind_metric(metric, model, prompts, whole)
    score = bound.score
    return Bound(lambda logits, prompt: score(logits, chosen[prompt]), bound.tokens)


def metric_name(metric: Any) -> str:
    """What results call a metric."""
    return metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", "metric")


def by_prompt(bound: Score, logits: torch.Tensor, prompts: list[int]) -> torch.Tensor:
    """The metric of logits `[n, vocab]`, each row of the prompt at the same place in `prompts`: `[n]`."""
    if len(set(prompts)) == 1:
        return bound(logits, prompts[0])
    made = torch.empty(len(prompts), device=logits.device)
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, own in enumerate(prompts) if own == prompt]
        made[rows] = bound(logits[rows], prompt).to(made)
    return made


def scored(bound: Bound, cells: Sequence[Cell]) -> Reduce:
    """The `reduce` of a sweep that computes the metric of each cell, as "scores"."""
    prompts, score = [cell.prompt for cell in cells], bound.score
    return lambda logits, indices: {"scores": by_prompt(score, logits, [prompts[i] for i in indices])}


def _mean_at(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits[:, _real(ids, logits)].mean(-1)


def _sum_at(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return probs[:, _real(ids, probs).unique()].sum(-1)  # a token that is named twice has its probability once


def _real(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return ids[ids >= 0].to(logits.device)
