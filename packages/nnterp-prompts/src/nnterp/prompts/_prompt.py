"""A prompt and the tokens to track after it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nnterp.prompts._errors import CollisionError, SharedTokenWarning
from nnterp.prompts._tokens import first_tokens, token_name, tokenizer_of

Text = str | list[dict[str, str]] | list[int]


@dataclass
class Prompt:
    """A prompt with the tokens to track in the model's next-token distribution after it.

    Attributes:
        prompt: A text, chat messages (a list of {"role", "content"}; put through the tokenizer's chat template), or
            token ids.
        target_tokens: For each category its token ids; the category's probability is their sum.
        target_strings: For each category what the tokens stand for: an answer or several. `scoring="sequence"` scores
            these.
        metadata: Anything else known of the prompt, such as its row of a table; becomes columns of a data frame.
    """

    prompt: Text
    target_tokens: dict[str, list[int]]
    target_strings: dict[str, str | list[str]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_strings(
        cls,
        prompt: Text,
        target_strings: dict[str, str | list[str]] | list[str] | str,
        tokenizer: Any,
        *,
        distinct: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A prompt whose targets are the first tokens of words, see `get_first_tokens`.

        Args:
            prompt: As the attribute.
            target_strings: A word, several words, or a dict of categories of these; without categories the category is
                called "target".
            tokenizer: A tokenizer, or a model with one.
            distinct: Refuse categories that begin with the same token; otherwise they are reported by a
                `SharedTokenWarning`.
            metadata: As the attribute.

        Raises:
            TokenizationError: A word is empty, has no tokens, or is unknown to the tokenizer.
            CollisionError: `distinct`, and two categories share a token.
        """
        tokenizer = tokenizer_of(tokenizer)
        categories: dict[str, Any] = (
            dict(target_strings) if isinstance(target_strings, Mapping) else {"target": target_strings}
        )
        words = {name: as_words(name, answers) for name, answers in categories.items()}
        tokens = first_tokens([word for group in words.values() for word in group], tokenizer)
        made = cls(
            prompt,
            {name: list(dict.fromkeys(t for word in group for t in tokens[word])) for name, group in words.items()},
            categories,
            dict(metadata or {}),
        )
        if shared := made.collisions():
            message = f"Of the targets of {prompt!r:.80}: {collision_text(shared, tokenizer)}."
            if distinct:
                raise CollisionError(f"{message} They were to be distinct: choose other words, or drop distinct=True.")
            warnings.warn(message, SharedTokenWarning, stacklevel=2)
        return made

    def collisions(self, ignore_targets: str | Sequence[str] | None = None) -> dict[int, list[str]]:
        """The tokens that several categories share, each with those categories."""
        ignored = _names(ignore_targets)
        owners: dict[int, list[str]] = {}
        for name, tokens in self.target_tokens.items():
            if name not in ignored:
                for token in dict.fromkeys(tokens):
                    owners.setdefault(token, []).append(name)
        return {token: names for token, names in owners.items() if len(names) > 1}

    def has_no_collisions(self, ignore_targets: str | Sequence[str] | None = None) -> bool:
        """Whether no token is tracked twice, categories in `ignore_targets` left aside."""
        ignored = _names(ignore_targets)
        tokens = [t for name, group in self.target_tokens.items() if name not in ignored for t in group]
        return len(tokens) == len(set(tokens))

    def get_target_probs(self, probs: torch.Tensor, layer: int | None = None) -> dict[str, torch.Tensor]:
        """Each category's probability in given distributions.

        Args:
            probs: `[batch, layers, vocab]`, or `[batch, vocab]`.
            layer: One layer; all if None.

        Returns:
            `[batch, layers]` for each category, on the CPU; `[batch]` for one layer, or where `probs` has none.

        Raises:
            ValueError: `probs` has another number of axes, or a target is outside the vocabulary.
        """
        if probs.dim() not in (2, 3):
            raise ValueError(
                f"probs has shape {list(probs.shape)}; [batch, layers, vocab] or [batch, vocab] was expected."
            )
        if layer is not None:
            if probs.dim() == 2:
                raise ValueError(
                    f"layer={layer} was asked for, but probs of shape {list(probs.shape)} has no axis of layers."
                )
            probs = probs[:, layer]
        return {name: sum_of_tokens(probs, tokens).cpu() for name, tokens in self.target_tokens.items()}

    @torch.no_grad()
    def run(self, nn_model: Any, get_probs: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each category's probability after this prompt.

        Args:
            nn_model: The model.
            get_probs: `(model, prompts) → [prompts, layers, vocab]` (or `[prompts, vocab]`), such as `logit_lens`. A
                function that declares `reduces_targets` is given the targets and returns no vocabulary.

        Returns:
            `[1, layers]` (or `[1]`) for each category, on the CPU.
        """
        if reduces_targets(get_probs):
            targets = [[list(dict.fromkeys(tokens)) for tokens in self.target_tokens.values()]]
            values = get_probs(nn_model, [self.prompt], targets=targets)
            return {name: values[..., i].cpu() for i, name in enumerate(self.target_tokens)}
        return self.get_target_probs(get_probs(nn_model, self.prompt))


def reduces_targets(get_probs: Callable[..., Any]) -> bool:
    """Whether a function takes `targets=` and sums over them itself, so that the vocabulary never leaves the model.

    A function declares it by an attribute `reduces_targets = True`; `functools.partial` objects are looked through.
    """
    while hasattr(get_probs, "func") and not hasattr(get_probs, "reduces_targets"):
        get_probs = get_probs.func
    return bool(
        getattr(inspect.unwrap(get_probs), "reduces_targets", False) or getattr(get_probs, "reduces_targets", False)
    )


def sum_of_tokens(probs: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Sum over distinct tokens of the last axis, `[..., vocab]` → `[...]`.

    Raises:
        ValueError: A token is outside the vocabulary.
    """
    wanted = list(dict.fromkeys(tokens))
    if wanted and not 0 <= min(wanted) <= max(wanted) < probs.shape[-1]:
        raise ValueError(f"Target tokens {wanted} are not all in a vocabulary of {probs.shape[-1]} tokens.")
    return probs[..., torch.tensor(wanted, dtype=torch.long, device=probs.device)].sum(-1)


def as_words(category: str, answers: Any) -> list[str]:
    """The answers of one category as a list.

    Raises:
        ValueError: There are none.
        TypeError: They are no texts.
    """
    words = [answers] if isinstance(answers, str) else list(answers)
    if not words:
        raise ValueError(f"The target {category!r} is empty: give it at least one word.")
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"The target {category!r} holds {words!r:.80}; words are texts.")
    return words


def collision_text(shared: Mapping[int, Sequence[str]], tokenizer: Any) -> str:
    """Collisions in words: which categories share which tokens."""
    return "; ".join(
        f"{', '.join(map(repr, names))} share {token_name(tokenizer, token)}" for token, names in shared.items()
    )


def _names(ignore_targets: str | Sequence[str] | None) -> set[str]:
    return {ignore_targets} if isinstance(ignore_targets, str) else set(ignore_targets or ())
