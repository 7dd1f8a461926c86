"""Run many prompts and keep, of each, what is asked for."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm as auto_tqdm

from nnterp.inputs import Batch, batches
from nnterp.prompts import _storage
from nnterp.prompts._errors import IncompleteRunError
from nnterp.prompts._plan import Plan, Question, Scoring, make_plan
from nnterp.prompts._prompt import Prompt, reduces_targets, sum_of_tokens
from nnterp.prompts._readout import ask, reads_on_the_way
from nnterp.prompts._results import PromptResults

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

SAVE_EVERY = 30.0  # seconds between two writes of a checkpoint


@torch.no_grad()
def run_prompts(
    model: StandardizedTransformer,
    prompts: Sequence[Prompt],
    batch_size: int = 32,
    get_probs_func: Callable[..., torch.Tensor] | None = None,
    func_kwargs: dict[str, Any] | None = None,
    remote: Any = False,
    tqdm: Callable[..., Any] | None = auto_tqdm,
    *,
    scoring: Scoring = "first_token",
    normalize_length: bool = False,
    answer_prefix: str = " ",
    distinct: bool = False,
    resume: PromptResults | str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> PromptResults:
    """Each category's probability after each prompt.

    Prompts of like length share a batch, and results are given back in the prompts' order. Only what is asked for
    leaves the model, so that memory does not grow with vocabulary × layers × prompts.

    Args:
        model: The model.
        prompts: Prompts, all with the same categories.
        batch_size: Rows of a batch, at most.
        get_probs_func: Whose probabilities are taken; the model's own next-token distribution if None. Any
            `(model, prompts, remote=..., **func_kwargs) → [prompts, layers, vocab]` (or `[prompts, vocab]`). A function
            with an attribute `reduces_targets = True` (such as `nnterp.interventions.logit_lens`) is called with the
            prompts as token ids and `targets`, for each prompt a list of lists of token ids, and returns
            `[prompts, layers, len(targets[i])]`, the probability of each list, so that no vocabulary leaves the trace.
            If it has an argument `progress`, that is False.
        func_kwargs: Further keyword arguments of `get_probs_func`.
        remote: Passed to the trace.
        tqdm: Wraps the batches to show progress, called as `tqdm(batches, desc=...)`. None for no bar.
        scoring: "first_token": a category is the set of its `target_tokens`. "sequence": it is its `target_strings`,
            whole, by teacher forcing (in a row for each token where a model is not causal). Several answers count
            together (an answer that continues another is part of it). Functions with `get_probs_func` read an answer
            of n tokens in n rows, one for each of its beginnings.
        normalize_length: With "sequence": the mean log-probability per token, and of several answers the best.
        answer_prefix: With "sequence": put before an answer where neither it nor the end of a text prompt is
            whitespace.
        distinct: Refuse prompts in which two categories share a token (or an answer).
        resume: Results of a run of the same prompts that broke off, or the folder they were saved to; what they have is
            not computed again.
        checkpoint: A folder to save results to on the way (every half minute, at the end, and when a batch fails). If
            it already holds results of this run, it is resumed.

    Returns:
        `PromptResults`: as a dict, `{category: [prompts]}` or `{category: [prompts, layers]}`, float32 on the CPU.

    Raises:
        ValueError: Before the model runs: no prompts, categories that differ, an empty target, a prompt longer than the
            model's context, a result to resume from that belongs to another run.
        TokenizationError: Before the model runs: an answer has no tokens.
        CollisionError: Before the model runs: `distinct`, and categories collide.
        IncompleteRunError: A batch failed. Its cause is the error; its `partial` holds the results so far.
        InsideTraceError: Called inside a trace of the model.
    """
    _check_call(model, batch_size, get_probs_func, func_kwargs, tqdm, scoring, normalize_length)
    prompts = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    plan = make_plan(model, prompts, scoring, get_probs_func is None, answer_prefix, distinct)
    if scoring == "sequence" and get_probs_func is None and not _can_teach(model, plan, remote):
        plan = make_plan(model, prompts, scoring, False, answer_prefix, distinct)
    results = PromptResults(
        plan.categories,
        plan.texts,
        [dict(prompt.metadata) for prompt in prompts],
        _settings(model, scoring, normalize_length, get_probs_func, func_kwargs),
        plan.fingerprints,
    )
    if resume is not None:
        _resume(results, resume)
    if checkpoint is not None and _storage.exists(checkpoint):
        _resume(results, checkpoint)

    owners = [
        (i, j)
        for i, sheet in enumerate(plan.sheets)
        if not results.done[i]
        for j in range(len(sheet.rows))
        if j not in results.pending.get(i, {})
    ]
    rows = [plan.sheets[i].rows[j] for i, j in owners]
    work = list(batches(model, rows, batch_size))
    saved = time.monotonic()
    bar = work if tqdm is None else tqdm(work, desc="Running prompts")
    finished = 0
    try:
        for batch in bar:
            asked = [plan.sheets[i].questions[j] for i, j in (owners[k] for k in batch.indices)]
            answers: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
            if get_probs_func is None:
                answers = _own_answers(model, batch, asked, remote)
            else:
                answers = _answers_of(get_probs_func, model, batch, asked, plan.plain, remote, func_kwargs or {})
            for k, answer in zip(batch.indices, answers, strict=True):
                i, j = owners[k]
                _take(results, plan, i, j, answer, normalize_length)
            finished += 1
            if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY:
                results.save(checkpoint)
                saved = time.monotonic()
    except BaseException as error:
        _break_off(results, error, finished, len(work), checkpoint)
        raise
    results._fill()
    if checkpoint is not None:
        results.save(checkpoint)
    return results


def _check_call(
    model: Any,
    batch_size: int,
    get_probs_func: Any,
    func_kwargs: dict[str, Any] | None,
    tqdm: Any,
    scoring: str,
    normalize_length: bool,
) -> None:
    from nnterp import StandardizedTransformer

    if not isinstance(model, StandardizedTransformer):
        raise TypeError(
            f"run_prompts needs a StandardizedTransformer, not a {type(model).__name__}: StandardizedTransformer(...)."
        )
    model.require_no_trace("run_prompts()")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    if get_probs_func is not None and not callable(get_probs_func):
        raise TypeError(f"get_probs_func must be a function (model, prompts, **kwargs), not {get_probs_func!r}.")
    if get_probs_func is None and func_kwargs:
        raise ValueError(f"func_kwargs={sorted(func_kwargs)} are for get_probs_func, and none was given.")
    if tqdm is not None and not callable(tqdm):
        raise TypeError(f"tqdm must be a function that wraps an iterable, or None for no bar, not {tqdm!r}.")
    if normalize_length and scoring != "sequence":
        raise ValueError("normalize_length=True is for scoring='sequence'; a first token has no length.")


def _can_teach(model: StandardizedTransformer, plan: Plan, remote: Any) -> bool:
    """Whether all tokens of an answer can be read in one row, or each needs a row that ends before it."""
    model.prepare(remote)
    if not model.padding_is_exact:
        return False
    longest = max((row for sheet in plan.sheets for row in sheet.rows), key=len)
    return reads_on_the_way(model, longest, remote)


def _own_answers(
    model: StandardizedTransformer, batch: Batch, asked: Sequence[Sequence[Question]], remote: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each row the log-probabilities and vocabulary ranks of its questions, from the model itself."""
    logs, ranks = ask(model, batch, asked, remote)
    sizes = [len(questions) for questions in asked]
    return zip(logs.double().split(sizes), ranks.split(sizes), strict=True)


def _answers_of(
    get_probs: Callable[..., torch.Tensor],
    model: StandardizedTransformer,
    batch: Batch,
    asked: Sequence[Sequence[Question]],
    plain: bool,
    remote: Any,
    kwargs: dict[str, Any],
) -> list[tuple[torch.Tensor, None]]:
    """For each row the log-probabilities of its questions, `[questions]` or `[layers, questions]`, from a function."""
    ids = [list(row.ids) for row in batch.rows]
    most = max(map(len, asked))
    if reduces_targets(get_probs):
        # Every row of a batch needs as many targets: the first is repeated, and the surplus dropped again.
        targets = [
            [list((questions[k] if k < len(questions) else questions[0]).tokens) for k in range(most)]
            for questions in asked
        ]
        if "progress" in inspect.signature(get_probs).parameters:
            kwargs = {"progress": False, **kwargs}  # the run has a bar of its own, or none
        values = get_probs(model, ids, remote=remote, targets=targets, **kwargs)
        _check_shape(get_probs, values, len(batch), most, "categories")
        found = [row[..., : len(questions)] for row, questions in zip(values, asked, strict=True)]
    else:
        texts = [row.text for row in batch.rows]
        values = get_probs(model, texts if plain and None not in texts else ids, remote=remote, **kwargs)
        _check_shape(get_probs, values, len(batch), None, "vocab")
        found = [
            torch.stack([sum_of_tokens(row, question.tokens) for question in questions], dim=-1)
            for row, questions in zip(values, asked, strict=True)
        ]
    return [(row.detach().cpu().double().log(), None) for row in found]


def _check_shape(get_probs: Callable[..., Any], values: Any, rows: int, last: int | None, name: str) -> None:
    fits = isinstance(values, torch.Tensor) and values.dim() in (2, 3) and values.shape[0] == rows
    if not fits or (last is not None and values.shape[-1] != last):
        got = f"shape {list(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        wanted = name if last is None else f"{name} = {last}"
        raise ValueError(
            f"{getattr(get_probs, '__name__', get_probs)!r} returned {got} for {rows} prompts; "
            f"[prompts, layers, {wanted}] or [prompts, {wanted}] was expected."
        )


def _take(
    results: PromptResults,
    plan: Plan,
    index: int,
    row: int,
    answer: tuple[torch.Tensor, torch.Tensor | None],
    normalize_length: bool,
) -> None:
    """Keep the answers to one row; when a prompt's rows are all there, turn them into its scores."""
    logs, ranks = answer
    rows = results.pending.setdefault(index, {})
    rows[row] = logs
    if len(rows) == len(plan.sheets[index].rows):
        scores = plan.sheets[index].combine([rows[j] for j in range(len(rows))], normalize_length)
        results._record(index, scores, ranks if results.scoring == "first_token" else None)
        del results.pending[index]


def _settings(
    model: StandardizedTransformer, scoring: str, normalize_length: bool, get_probs: Any, kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    function = getattr(get_probs, "func", get_probs)
    simple = (bool, int, float, str, type(None))
    return {
        "scoring": scoring,
        "normalize_length": normalize_length,
        "get_probs_func": None if get_probs is None else getattr(function, "__qualname__", type(function).__qualname__),
        "func_kwargs": {
            key: value if isinstance(value, simple) else type(value).__name__ for key, value in (kwargs or {}).items()
        },
        "model_class": model.anatomy.model_class,
        "model": model.repo_id or "",
    }


def _resume(results: PromptResults, earlier: PromptResults | str | Path) -> None:
    """Take over what an earlier run of the same prompts has.

    Raises:
        ValueError: It was another run.
    """
    where = "the results to resume from" if isinstance(earlier, PromptResults) else str(earlier)
    if not isinstance(earlier, PromptResults):
        earlier = PromptResults.load(earlier)
    differing = [key for key in results.settings if earlier.settings.get(key) != results.settings[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"Cannot resume: {where} was run with {key}={earlier.settings.get(key)!r}, and this run has "
            f"{results.settings[key]!r}. "
            f"Repeat the earlier call, or start anew without it."
        )
    if earlier.categories != results.categories or len(earlier.texts) != len(results.texts):
        raise ValueError(
            f"Cannot resume: {where} has {len(earlier.texts)} prompts with {list(earlier.categories)}, and this run "
            f"has "
            f"{len(results.texts)} with {list(results.categories)}. Pass the same prompts in the same order."
        )
    for i, (theirs, ours) in enumerate(zip(earlier.fingerprints, results.fingerprints, strict=True)):
        if theirs != ours:
            raise ValueError(
                f"Cannot resume: prompt {i} of {where} is {earlier.texts[i]!r:.80}, and in this run it is "
                f"{results.texts[i]!r:.80} "
                f"or has other targets. Pass the same prompts in the same order."
            )
    for i in earlier.done.nonzero().flatten().tolist():
        if not results.done[i]:
            results.pending.pop(i, None)
            ranks = None if earlier.vocabulary_ranks is None else earlier.vocabulary_ranks[i]
            results._record(i, earlier.log_probs[i], ranks)
    for i, rows in earlier.pending.items():
        if not results.done[i]:
            results.pending[i] = {**results.pending.get(i, {}), **rows}
    results._fill()


def _break_off(results: PromptResults, error: BaseException, finished: int, total: int, checkpoint: Any) -> None:
    """Hand on what there is: as `IncompleteRunError.partial`, or on an interrupt as its attribute `partial`."""
    results._fill()
    kept = f"{int(results.done.sum())} of {len(results.done)} prompts"
    if checkpoint is not None:
        results.save(checkpoint)
    where = f" and in {checkpoint}" if checkpoint is not None else ""
    if isinstance(error, Exception):
        raise IncompleteRunError(
            f"Batch {finished + 1} of {total} failed after {kept} ({type(error).__name__}: {error}). What was "
            f"computed is in this "
            f"error's `partial`{where}: run_prompts(..., resume=error.partial) goes on from there.",
            results,
        ) from error
    error.partial = results  # type: ignore[attr-defined]
    error.add_note(f"run_prompts was interrupted after {kept}; they are in this exception's `partial`{where}.")
