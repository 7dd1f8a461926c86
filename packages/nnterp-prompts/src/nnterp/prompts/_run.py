"""`run_prompts`: the probabilities of targets after many prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm as auto_tqdm

from nnterp import StandardizedTransformer
from nnterp.arguments import count, listed, path_of
from nnterp.defaults import plain_defaults
from nnterp.inputs import Batch, batches
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.progress import DELAY, check_progress
from nnterp.prompts import _storage
from nnterp.prompts._checkpoint import Keeper
from nnterp.prompts._functions import ask_function
from nnterp.prompts._identity import settings_of
from nnterp.prompts._missing import warn_of_missing
from nnterp.prompts._plan import Plan, Scoring, make_plan
from nnterp.prompts._prompt import Prompt
from nnterp.prompts._questions import Question
from nnterp.prompts._readout import ask, is_causal
from nnterp.prompts._results import PromptResults
from nnterp.prompts._resume import take_over


@takes_nnsight_models
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
    progress: bool | None = None,
) -> PromptResults:
    """Return the probability of each category after each prompt.

    Prompts of similar length share a batch; the results are in the order of the prompts. Only the targets'
    probabilities leave the model, so memory does not grow with vocabulary × layers × prompts.

    Args:
        model: The model.
        prompts: Prompts, all with the same categories.
        batch_size: Largest number of rows in a batch.
        get_probs_func: The function whose probabilities are taken; None for the model's own next-token distribution.
            It is called as `(model, prompts, remote=..., **func_kwargs)` and returns `[prompts, layers, vocab]` or
            `[prompts, vocab]`. A function with the attribute `reduces_targets = True` (such as
            `nnterp.interventions.logit_lens`) is called with the prompts as token ids, and with `targets`: for each
            prompt a list of lists of token ids. It returns `[prompts, layers, len(targets[i])]` or
            `[prompts, len(targets[i])]`, the probability of each list, so that the vocabulary stays inside the trace.
            What comes back is checked: values between 0 and 1 that add up to 1 over the vocabulary.
            If such a function has an argument `progress`, it is given False.
        func_kwargs: Further keyword arguments of `get_probs_func`.
        remote: Passed to the trace.
        tqdm: Another bar, of 1.x: wraps the batches, called as `tqdm(batches, desc=...)`. None for no bar.
        scoring: "first_token" scores a category by its `target_tokens`. "sequence" scores the whole answers in its
            `target_strings`: the log-probability of every token of an answer, by teacher forcing. Models that are not
            causal, and functions given as `get_probs_func`, read an answer of n tokens in n rows instead. Several
            answers of a category are added up; an answer that continues another one is part of it.
        normalize_length: With "sequence", score an answer by the mean log-probability of its tokens, and a category by
            its best answer.
        answer_prefix: With "sequence", the text between a text prompt and an answer, if neither has whitespace there.
        distinct: Raise if two categories of a prompt share a token (or an answer).
        resume: The results of an earlier run of the same prompts that broke off, or the folder they were saved to.
            What they hold is not computed again. The earlier run must have been made in the same way: with the same
            settings, function and arguments (their values, and the function's code, defaults and closure), the same
            model, dtype and weights.
        checkpoint: A folder to save the results to: every half minute, at the end, and when a batch fails. If it
            already holds results of this run, they are resumed. If it holds results of another run, that is an error.
            It is also written before the first batch, so that a folder that cannot be written is found then.
        progress: True for a progress bar, False for none. With None there is one if the run takes more than two
            seconds.

    Returns:
        `PromptResults`, a dict `{category: [prompts]}` or `{category: [prompts, layers]}`, float32 on the CPU. Prompts
        for which the model's logits (or the function's probabilities) are NaN or infinite are NaN; a
        `MissingScoresWarning` says how many. Empty without prompts.

    Raises:
        ValueError: Before the model runs: prompts have different categories, a target is empty or outside the
            vocabulary, a prompt is longer than the model's context, or the results to resume from are of another run
            (the message names what differs).
        TokenizationError: Before the model runs: an answer has no tokens.
        CollisionError: Before the model runs: `distinct=True`, and two categories share a token or an answer.
        OSError: Before the model runs: the checkpoint cannot be written, or the folder holds other files of its names.
        IncompleteRunError: A batch failed, or the checkpoint could not be written at the end. Its `__cause__` is the
            error; its `partial` is the results so far.
        InsideTraceError: Called inside a trace of the model.
        TypeError: Before the model runs: an argument has another type, such as a `model` that is no
            StandardizedTransformer.

    Example:
        asked = [Prompt.from_strings("The capital of France is", {"right": "Paris", "wrong": "Rome"}, model)]
        print(run_prompts(model, asked)["right"].item() > 0.9)  # → True
        over_layers = run_prompts(model, asked, get_probs_func=logit_lens)["right"]  # [prompts, layers]
    """
    with plain_defaults():
        _check_call(model, batch_size, get_probs_func, func_kwargs, scoring, normalize_length)
        bar = _bar(tqdm, progress)
        if not isinstance(answer_prefix, str):
            raise TypeError(f"answer_prefix is a text, not {answer_prefix!r:.80}.")
        for name, folder in (("resume", resume), ("checkpoint", checkpoint)):
            if folder is not None and not isinstance(folder, PromptResults):
                path_of(folder, name)
        if func_kwargs is not None:  # every batch is given them, and an iterator gives its items once
            func_kwargs = {name: list(v) if isinstance(v, Iterator) else v for name, v in func_kwargs.items()}
        prompts = [prompts] if isinstance(prompts, Prompt) else listed(prompts, "prompts", "a Prompt, or a list")
        plan = _plan_of(model, prompts, scoring, get_probs_func, answer_prefix, distinct, normalize_length, remote)
        if prompts and not remote and not model.remote:
            model.dispatch()  # the weights are a part of what is compared when a run is resumed
        results = PromptResults(
            plan.categories,
            plan.texts,
            [dict(prompt.metadata) for prompt in prompts],
            settings_of(model, scoring, normalize_length, get_probs_func, func_kwargs),
            plan.fingerprints,
        )
        if resume is not None:
            take_over(results, resume)
        if checkpoint is not None and _storage.exists(checkpoint):
            take_over(results, checkpoint)

        answer = partial(_answer, model, get_probs_func, func_kwargs or {}, plan.plain, remote)
        keeper = Keeper(results, checkpoint, get_probs_func, func_kwargs)
        keeper.begin()
        _run_batches(model, plan, keeper, answer, batch_size, bar, normalize_length)
        keeper.finish()
        warn_of_missing(results.missing, "Their scores are NaN and their ranks 0, and accuracy leaves them out.")
        return results


def _check_call(
    model: Any,
    batch_size: int,
    get_probs_func: Any,
    func_kwargs: dict[str, Any] | None,
    scoring: str,
    normalize_length: bool,
) -> None:
    """Check the arguments of `run_prompts` that do not depend on the prompts.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument has a value that does not exist or does not go with the others.
        InsideTraceError: Called inside a trace of the model.
    """
    if not isinstance(model, StandardizedTransformer):
        raise TypeError(
            f"run_prompts needs a StandardizedTransformer, not a {type(model).__name__}: StandardizedTransformer(...)."
        )
    model.require_no_trace("run_prompts()")
    count(batch_size, "batch_size")
    if func_kwargs is not None and not isinstance(func_kwargs, Mapping):
        raise TypeError(f"func_kwargs is a dict of arguments for get_probs_func, not {func_kwargs!r:.80}.")
    if get_probs_func is not None and not callable(get_probs_func):
        raise TypeError(f"get_probs_func must be a function (model, prompts, **kwargs), not {get_probs_func!r}.")
    if get_probs_func is None and func_kwargs:
        raise ValueError(f"func_kwargs={sorted(func_kwargs)} are for get_probs_func, and none was given.")
    if normalize_length and scoring != "sequence":
        raise ValueError("normalize_length=True is for scoring='sequence'; a first token has no length.")


def _bar(tqdm: Callable[..., Any] | None, progress: bool | None) -> Callable[..., Any]:
    """Return the function that wraps the batches of a run; see `run_prompts`.

    Raises:
        TypeError: An argument has another type.
    """
    if tqdm is not None and not callable(tqdm):
        raise TypeError(f"tqdm must be a function that wraps an iterable, or None for no bar, not {tqdm!r}.")
    check_progress(progress)
    if tqdm is None or progress is False:
        return lambda batches, **_: batches
    return partial(tqdm, delay=DELAY, leave=False) if progress is None and tqdm is auto_tqdm else tqdm


def _plan_of(
    model: StandardizedTransformer,
    prompts: Sequence[Prompt],
    scoring: Scoring,
    get_probs_func: Callable[..., Any] | None,
    answer_prefix: str,
    distinct: bool,
    normalize_length: bool,
    remote: Any,
) -> Plan:
    """Return the plan of a run; the arguments are those of `run_prompts`. May run the model on one row."""
    make = partial(
        make_plan,
        model,
        prompts,
        scoring,
        answer_prefix=answer_prefix,
        distinct=distinct,
        normalize_length=normalize_length,
    )
    if scoring != "sequence" or not prompts:
        return make()
    if get_probs_func is not None:
        return make(teacher_forcing=False)
    plan = make()
    return plan if _reads_answers_in_one_row(model, plan, remote) else make(teacher_forcing=False)


def _answer(
    model: StandardizedTransformer,
    get_probs_func: Callable[..., torch.Tensor] | None,
    func_kwargs: dict[str, Any],
    plain: bool,
    remote: Any,
    batch: Batch,
    asked: Sequence[Sequence[Question]],
) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield, for each row of a batch, the log-probabilities of its questions and their ranks in the vocabulary.

    Args:
        model: The model.
        get_probs_func: As in `run_prompts`. Ranks are None with a function.
        func_kwargs: As in `run_prompts`.
        plain: As in `Plan`.
        remote: As in `run_prompts`.
        batch: The rows.
        asked: For each row its questions.
    """
    if get_probs_func is None:
        logs, ranks = ask(model, batch, asked, remote)
        sizes = [len(questions) for questions in asked]
        yield from zip(logs.double().split(sizes), ranks.split(sizes), strict=True)
    else:
        for row in ask_function(get_probs_func, model, batch, asked, plain, remote, func_kwargs):
            yield row, None


def _reads_answers_in_one_row(model: StandardizedTransformer, plan: Plan, remote: Any) -> bool:
    """Return True if all tokens of an answer can be read in one row, False if each needs a row of its own."""
    model.prepare(remote)
    side = model.sharing.side
    if not model.padding_is_exact or any(
        side(question.position + 1) != side(len(row))
        for sheet in plan.sheets
        for row, questions in zip(sheet.rows, sheet.questions, strict=True)
        for question in questions
    ):  # the tokens behind a position decide how it is computed
        return False
    longest = max((row for sheet in plan.sheets for row in sheet.rows), key=len)
    return is_causal(model, longest, remote)


def _run_batches(
    model: StandardizedTransformer,
    plan: Plan,
    keeper: Keeper,
    answer: Callable[[Batch, Sequence[Sequence[Question]]], Iterable[tuple[torch.Tensor, torch.Tensor | None]]],
    batch_size: int,
    bar: Callable[..., Any],
    normalize_length: bool,
) -> None:
    """Run the rows that the results do not have yet, and store what they answer.

    Args:
        model: The model.
        plan: The rows and questions.
        keeper: Holds the results.
        answer: Returns, for each row of a batch, its log-probabilities and its ranks in the vocabulary (or None).
        batch_size: Largest number of rows in a batch.
        bar: Wraps the batches.
        normalize_length: See `Sheet.combine`.
    """
    results = keeper.results
    owners = [  # the prompt and the row of each row that is left to run
        (i, j)
        for i, sheet in enumerate(plan.sheets)
        if not results.done[i]
        for j in range(len(sheet.rows))
        if j not in results.pending.get(i, {})
    ]
    work = list(batches(model, [plan.sheets[i].rows[j] for i, j in owners], batch_size))
    finished = 0
    try:
        for batch in bar(work, desc="Running prompts"):
            chosen = [owners[k] for k in batch.indices]
            asked = [plan.sheets[i].questions[j] for i, j in chosen]
            for (i, j), (logs, ranks) in zip(chosen, answer(batch, asked), strict=True):
                _store(results, plan, i, j, logs, ranks, normalize_length)
            finished += 1
            keeper.save_if_due()
    except BaseException as error:
        keeper.break_off(error, f"Batch {finished + 1} of {len(work)}")


def _store(
    results: PromptResults,
    plan: Plan,
    index: int,
    row: int,
    logs: torch.Tensor,
    ranks: torch.Tensor | None,
    normalize_length: bool,
) -> None:
    """Store the answers to one row. Once all rows of a prompt are there, compute its scores."""
    rows = results.pending.setdefault(index, {})
    rows[row] = logs
    if len(rows) == len(plan.sheets[index].rows):
        scores = plan.sheets[index].combine([rows[j] for j in range(len(rows))], normalize_length)
        results._record(index, scores, ranks if results.scoring == "first_token" else None)
        del results.pending[index]
