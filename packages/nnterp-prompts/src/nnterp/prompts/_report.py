"""`tokenization_report`: how prompts and targets tokenize, and which categories share tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnterp.prompts._prompt import Prompt, PromptPair
from nnterp.prompts._texts import prompt_text, prompt_tokens
from nnterp.prompts._tokens import is_lone_space, token_name, tokenizer_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PromptReport:
    """How one prompt and its targets tokenize.

    Attributes:
        text: The prompt's text, after the chat template if it is a chat.
        tokens: Names of the prompt's tokens, special tokens included.
        targets: Names of the tokens that each category tracks.
        collisions: Names of the tokens that several categories share, each with those categories.
        remarks: Possible mistakes: the last token is only a space, or it is a special token.
    """

    text: str
    tokens: tuple[str, ...]
    targets: dict[str, tuple[str, ...]]
    collisions: dict[str, tuple[str, ...]]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class TokenizationReport:
    """How a set of prompts and their targets tokenize. `print` it, or call `to_dataframe()`.

    Attributes:
        prompts: One `PromptReport` for each prompt.
        unequal: Indices of the pairs whose two prompts have different numbers of tokens; None if the report is about
            prompts and not pairs.

    Example:
        asked = [Prompt.from_strings("The capital of France is", {"right": "Paris"}, model)]
        frame = tokenization_report(asked, model).to_dataframe()
    """

    prompts: tuple[PromptReport, ...]
    unequal: tuple[int, ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each prompt."""
        return tuple(len(prompt.tokens) for prompt in self.prompts)

    @property
    def colliding(self) -> tuple[int, ...]:
        """Indices of the prompts in which two categories share a token."""
        return tuple(i for i, prompt in enumerate(self.prompts) if prompt.collisions)

    def __str__(self) -> str:
        lengths = Counter(self.lengths)
        shown = ", ".join(f"{length} tokens: {count}" for length, count in sorted(lengths.items())[:12])
        lines = [f"{len(self.prompts)} prompts ({shown}{', …' if len(lengths) > 12 else ''})"]
        if self.unequal is not None:
            lines.append(f"pairs whose prompts differ in length: {_some(self.unequal)}")
        lines.append(f"prompts in which categories share a first token: {_some(self.colliding)}")
        for i in self.colliding[:5]:
            for token, names in self.prompts[i].collisions.items():
                lines.append(f"  {i}: {', '.join(names)} share {token}  ({self.prompts[i].text!r:.80})")
        remarks = Counter(remark for prompt in self.prompts for remark in prompt.remarks)
        lines += [f"{remark}: {count} prompts" for remark, count in remarks.items()]
        first = self.prompts[0]
        lines.append(f"first prompt: {' '.join(map(repr, first.tokens))}")
        lines += [f"  {name}: {', '.join(tokens)}" for name, tokens in first.targets.items()]
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """Make a data frame of the report.

        Columns: `prompt_index`, `prompt`, `length`, `category`, `target_tokens`, `shared_with`.

        Returns:
            One row for each prompt and category.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_dataframe() needs pandas: pip install 'nnterp-prompts[dataframe]'") from error
        rows = []
        for i, prompt in enumerate(self.prompts):
            for name, tokens in prompt.targets.items():
                partners = {
                    other for names in prompt.collisions.values() if name in names for other in names if other != name
                }
                rows.append([i, prompt.text, len(prompt.tokens), name, list(tokens), sorted(partners)])
        return pd.DataFrame(
            rows, columns=["prompt_index", "prompt", "length", "category", "target_tokens", "shared_with"]
        )


def tokenization_report(
    prompts: Sequence[Prompt] | Sequence[PromptPair], tokenizer_or_model: Any
) -> TokenizationReport:
    """Report how prompts and their targets tokenize. No model runs.

    Args:
        prompts: Prompts, or pairs. The report on pairs lists clean, corrupted, clean, corrupted, ...
        tokenizer_or_model: A tokenizer, or a model with one.

    Returns:
        The report, with an entry for each prompt.

    Raises:
        ValueError: There are no prompts.
        TypeError: There are prompts beside pairs, or something else.

    Example:
        asked = [Prompt.from_strings("The capital of France is", {"right": "Paris"}, model)]
        print(tokenization_report(asked, model))
    """
    tokenizer = tokenizer_of(tokenizer_or_model)
    given: list[Prompt | PromptPair] = list(prompts)
    if not given:
        raise ValueError("No prompts were given: pass at least one Prompt or PromptPair.")
    pairs = isinstance(given[0], PromptPair)
    for i, each in enumerate(given):
        if not isinstance(each, PromptPair if pairs else Prompt):
            raise TypeError(f"Item {i} is a {type(each).__name__}; give prompts or pairs, not both.")
    flat: list[Prompt] = []
    for each in given:
        flat += [each.clean, each.corrupted] if isinstance(each, PromptPair) else [each]
    reports = tuple(_report(tokenizer, prompt) for prompt in flat)
    unequal = None
    if pairs:
        unequal = tuple(i for i in range(len(given)) if len(reports[2 * i].tokens) != len(reports[2 * i + 1].tokens))
    return TokenizationReport(reports, unequal)


def _report(tokenizer: Any, prompt: Prompt) -> PromptReport:
    ids = prompt_tokens(tokenizer, prompt.prompt)
    text = prompt_text(tokenizer, prompt.prompt)
    remarks = []
    if ids and is_lone_space(tokenizer, ids[-1]):
        remarks.append("the last token is only a space; most words begin with a space of their own")
    if ids and isinstance(prompt.prompt, str) and ids[-1] in getattr(tokenizer, "all_special_ids", ()):
        remarks.append(f"the last token is special, {tokenizer.convert_ids_to_tokens(ids[-1])!r}")
    return PromptReport(
        tokenizer.decode(ids) if text is None else text,
        tuple(tokenizer.convert_ids_to_tokens(ids)),
        {name: tuple(token_name(tokenizer, t) for t in tokens) for name, tokens in prompt.target_tokens.items()},
        {token_name(tokenizer, token): tuple(names) for token, names in prompt.collisions().items()},
        tuple(remarks),
    )


def _some(indices: tuple[int, ...]) -> str:
    if not indices:
        return "none"
    return f"{len(indices)} ({', '.join(map(str, indices[:10]))}{', …' if len(indices) > 10 else ''})"
