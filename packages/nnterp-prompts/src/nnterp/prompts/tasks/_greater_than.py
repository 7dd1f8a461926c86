"""Greater-than (Hanna et al., "How does GPT-2 compute greater-than?", 2023), in sentences of our own."""

from __future__ import annotations

from typing import Any

from nnterp.prompts._errors import TokenizationError
from nnterp.prompts._tokens import tokenizer_of
from nnterp.prompts.tasks._task import Pair, Task, continuation, drawn, task_of, tokens_of

NOUNS = (
    "war", "siege", "voyage", "strike", "famine", "drought", "reign", "journey", "expedition", "dispute", "project",
    "trial", "exhibition", "campaign", "debate", "construction", "crisis", "alliance", "experiment", "occupation",
)  # fmt: skip
CENTURIES = ("13", "14", "15", "16", "17", "18")
TEMPLATE = "The {noun} lasted from the year {century}{start:02d} to the year {century}"
FIRST = 1  # the corrupted year, after which every year is later
YEARS = range(100)


def greater_than(tokenizer: Any, n: int = 32, seed: int = 0) -> Task:
    """Sentences that end inside a year which has to be later than another one.

    "The war lasted from the year 1732 to the year 17" goes on with 33 to 99. In the corrupted prompt the war begins in
    1701. The metric of the task is `probability_difference(task.correct, task.wrong)`.

    What is compared is the next token. Where the tokenizer writes two digits as one token, it is the whole year of the
    century: `correct` are the years after the start, `wrong` the start and the years before it. Where it writes each
    digit as a token (Llama 2, Gemma, SmolLM2), it is the decade: `correct` are the later decades, `wrong` the earlier
    ones, and the start's own decade, in which a year may be earlier or later, is in neither.

    Args:
        tokenizer: A tokenizer, or a model with one.
        n: Number of pairs.
        seed: Of the random draw. The same tokenizer, `n` and seed give the same pairs.

    Returns:
        A `Task`, with several tokens in each entry of `correct` and `wrong`.

    Raises:
        TokenizationError: The tokenizer does not write a year so that it continues the century: it merges three digits
            or more.
        ValueError: `n` is not positive.

    Example:
        task = tasks.greater_than(tiny_tokenizer(), n=4)
        metric = probability_difference(task.correct, task.wrong)
    """
    tokenizer = tokenizer_of(tokenizer)
    following = {century: _following(tokenizer, century) for century in CENTURIES}
    starts = [
        (century, start)
        for century, tokens in following.items()
        for start in YEARS
        if _split(tokens, start) is not None and _same_length(tokenizer, century, start)
    ]
    if not starts:
        year = tokenizer.convert_ids_to_tokens(tokens_of(tokenizer, "the year 1732"))
        raise TokenizationError(
            "greater_than() needs a tokenizer whose next token after the century is one or two digits of the year; "
            f"this one writes 'the year 1732' as {' '.join(map(repr, year))}."
        )
    pairs = []
    for rng in drawn(n, seed):
        (century, start), noun = rng.choice(starts), rng.choice(NOUNS)
        split = _split(following[century], start)
        assert split is not None
        clean, corrupted = (TEMPLATE.format(noun=noun, century=century, start=year) for year in (start, FIRST))
        pairs.append(Pair(clean, corrupted, *split))
    return task_of("greater_than", pairs)


def _following(tokenizer: Any, century: str) -> dict[int, list[int]]:
    """The tokens that may follow the century, each with the years of it that begin with the token; {} if unclear."""
    prompt = TEMPLATE.format(noun="war", century=century, start=FIRST)
    found: dict[int, list[int]] = {}
    for year in YEARS:
        ids = continuation(tokenizer, prompt, f"{year:02d}")
        if ids is None or ids[0] == tokenizer.unk_token_id:
            return {}
        found.setdefault(ids[0], []).append(year)
    return found


def _split(following: dict[int, list[int]], start: int) -> tuple[list[int], list[int]] | None:
    """The tokens whose years are all later than the start, and those whose years are all not; None if one is empty."""
    later = [token for token, years in following.items() if min(years) > start]
    others = [token for token, years in following.items() if max(years) <= start]
    return (later, others) if later and others else None


def _same_length(tokenizer: Any, century: str, start: int) -> bool:
    texts = [TEMPLATE.format(noun="war", century=century, start=year) for year in (start, FIRST)]
    clean, corrupted = (tokens_of(tokenizer, text) for text in texts)
    return start > FIRST and len(clean) == len(corrupted)
