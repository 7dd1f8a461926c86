"""What tokenizes how, and what collides: a look at a set of prompts before it is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnterp.prompts._prompt import Prompt, Text
from nnterp.prompts._templates import PromptPair
from nnterp.prompts._tokens import is_lone_space, token_name, tokenizer_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PromptReport:
    """One prompt of a report.

    Attributes:
        text: Its text, chat template applied.
        tokens: Names of its tokens, special tokens included.
        targets: For each category the names of the tokens that are tracked.
        collisions: Names of tokens that several categories share, each with those categories.
        remarks: What may not be meant: a last token that is only a space, or that is special.
    """

    text: str
    tokens: tuple[str, ...]
    targets: dict[str, tuple[str, ...]]
    collisions: dict[str, tuple[str, ...]]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class TokenizationReport:
    """How a set of prompts and their targets tokenize; print it, or take its data frame.

    Attributes:
        prompts: One report each.
        unequal: Of pairs, the indices of those whose two prompts differ in their number of tokens; None for prompts.
    """

    prompts: tuple[PromptReport, ...]
    unequal: tuple[int, ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Each prompt's number of tokens."""
        return tuple(len(prompt.tokens) for prompt in self.prompts)

    @property
    def colliding(self) -> tuple[int, ...]:
        """Indices of prompts in which categories share a token."""
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
        """One row per prompt and category.

        Columns: `prompt_index`, `prompt`, `length`, `category`, `target_tokens`, `shared_with`.

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
    """How prompts (or pairs, as clean, corrupted, clean, ...) and their targets tokenize. Runs no model.

    Raises:
        ValueError: There are no prompts.
    """
    tokenizer = tokenizer_of(tokenizer_or_model)
    given: list[Prompt | PromptPair] = list(prompts)
    if not given:
        raise ValueError("No prompts were given: pass at least one Prompt or PromptPair.")
    pairs = isinstance(given[0], PromptPair)
    flat: list[Prompt] = []
    for each in given:
        flat += [each.clean, each.corrupted] if isinstance(each, PromptPair) else [each]
    reports = tuple(_report(tokenizer, prompt) for prompt in flat)
    unequal = None
    if pairs:
        unequal = tuple(i for i in range(len(given)) if len(reports[2 * i].tokens) != len(reports[2 * i + 1].tokens))
    return TokenizationReport(reports, unequal)


def prompt_tokens(tokenizer: Any, prompt: Text) -> list[int]:
    """Token ids of a prompt of any kind, as the model reads them."""
    text = prompt_text(tokenizer, prompt)
    if text is None:
        return list(prompt)  # type: ignore[arg-type]
    return list(tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"])


def prompt_text(tokenizer: Any, prompt: Text) -> str | None:
    """Its text, chat template applied; None for token ids."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], int):
        return None
    continues = prompt[-1]["role"] == "assistant"  # type: ignore[index]
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )


def _report(tokenizer: Any, prompt: Prompt) -> PromptReport:
    ids = prompt_tokens(tokenizer, prompt.prompt)
    text = prompt_text(tokenizer, prompt.prompt)
    remarks = []
    if ids and is_lone_space(tokenizer, ids[-1]):
        remarks.append("the last token is only a space, which most words already hold at their beginning")
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
