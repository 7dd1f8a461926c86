"""`Prompt`: a prompt with the tokens to track after it. `PromptPair`: a clean and a corrupted prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.indices import read_index
from nnterp.prompts._errors import CollisionError, SharedTokenWarning
from nnterp.prompts._ids import ids_of_categories, token_ids
from nnterp.prompts._missing import warn_of_missing, without_broken
from nnterp.prompts._probabilities import check_probabilities, reduces_targets, sum_of_tokens
from nnterp.prompts._tokens import collision_text, first_tokens, tokenizer_of
from nnterp.prompts._words import as_words
from nnterp.warn import warn

Text = str | list[dict[str, str]] | list[int]


@dataclass
class Prompt:
    """A prompt with the tokens to track in the model's next-token distribution after it.

    Attributes:
        prompt: A text, token ids, or chat messages (a list of {"role", "content"} dicts, which go through the
            tokenizer's chat template).
        target_tokens: The token ids of each category. The category's probability is the sum over them.
        target_strings: The answer or answers that each category stands for; `scoring="sequence"` scores these.
        metadata: Anything else known about the prompt, such as its row of a table. Its keys become columns of a data
            frame.

    Raises:
        TypeError: `target_tokens` is not a dict of lists of integers.
        ValueError: A token id is negative.

    Example:
        prompt = Prompt.from_strings("The capital of France is", {"right": "Paris", "wrong": ["Rome", "Oslo"]}, model)
        print(run_prompts(model, [prompt])["right"].item() > 0.9)  # → True
    """

    prompt: Text
    target_tokens: dict[str, list[int]]
    target_strings: dict[str, str | list[str]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.target_tokens, Mapping):
            raise TypeError(
                f"target_tokens is {self.target_tokens!r:.80} ({type(self.target_tokens).__name__}); give a dict that "
                f"maps each category to its token ids. Prompt.from_strings takes words."
            )
        self.target_tokens = {
            name: token_ids(tokens, f"The target {name!r}") for name, tokens in self.target_tokens.items()
        }

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
        """Make a prompt that tracks the first tokens of words; see `get_first_tokens`.

        Args:
            prompt: As the attribute `prompt`.
            target_strings: A word, a list of words, or a dict that maps each category to a word or a list of words.
                Without a dict there is one category, called "target".
            tokenizer: A tokenizer, or a model with one.
            distinct: Raise if two categories share a token. If False, they are reported by a `SharedTokenWarning`.
            metadata: As the attribute `metadata`.

        Raises:
            TokenizationError: A word is empty, has no tokens, or is unknown to the tokenizer.
            CollisionError: `distinct=True`, and two categories share a token.
            TypeError: `metadata` is no mapping.
        """
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"metadata is a dict, not {metadata!r:.80}.")
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
            message = f"In the prompt {prompt!r:.80}, {collision_text(shared, tokenizer)}."
            if distinct:
                raise CollisionError(f"{message} Choose other words, or drop distinct=True.")
            warn(message, SharedTokenWarning)
        return made

    def collisions(self, ignore_targets: str | Sequence[str] | None = None) -> dict[int, list[str]]:
        """Find the tokens that several categories share.

        Args:
            ignore_targets: A category, or several, to leave out.

        Returns:
            Token id → the names of the categories that share it.
        """
        ignored = _names(ignore_targets)
        owners: dict[int, list[str]] = {}
        for name, tokens in self.target_tokens.items():
            if name not in ignored:
                for token in dict.fromkeys(tokens):
                    owners.setdefault(token, []).append(name)
        return {token: names for token, names in owners.items() if len(names) > 1}

    def has_no_collisions(self, ignore_targets: str | Sequence[str] | None = None) -> bool:
        """Check that no token is listed twice, in one category or in two.

        Args:
            ignore_targets: A category, or several, to leave out.

        Returns:
            True if none is.
        """
        ignored = _names(ignore_targets)
        tokens = [t for name, group in self.target_tokens.items() if name not in ignored for t in group]
        return len(tokens) == len(set(tokens))

    def get_target_probs(self, probs: torch.Tensor, layer: int | None = None) -> dict[str, torch.Tensor]:
        """Return the sum over each category's tokens in the distributions given.

        Args:
            probs: `[batch, layers, vocab]` or `[batch, vocab]`. Not checked: logits give sums of logits.
            layer: The layer to read; all layers if None.

        Returns:
            `{category: [batch, layers]}`, or `{category: [batch]}` for one layer or for `probs` without layers. On the
            CPU, in the dtype of `probs`. NaN for distributions that hold NaN or infinite values; a
            `MissingScoresWarning` counts the prompts with such distributions.

        Raises:
            ValueError: `probs` has another number of axes, or a target is outside the vocabulary.
            IndexError: There is no such layer.
            TypeError: `probs` is no tensor, or `layer` no integer.
        """
        if not isinstance(probs, torch.Tensor):
            raise TypeError(f"probs is a tensor, [batch, layers, vocab] or [batch, vocab], not {type(probs).__name__}.")
        if probs.dim() not in (2, 3):
            raise ValueError(
                f"probs has shape {list(probs.shape)}; [batch, layers, vocab] or [batch, vocab] was expected."
            )
        if layer is not None:
            if probs.dim() == 2:
                raise ValueError(
                    f"layer={layer} was asked for, but probs of shape {list(probs.shape)} has no axis of layers."
                )
            probs = probs[:, read_index(layer, probs.shape[1], "layer", "layers")]
        probs = without_broken(probs)
        warn_of_missing(probs[..., 0].isnan(), "Their probabilities are NaN.")
        return {
            name: sum_of_tokens(probs, tokens, f"The target {name!r}").cpu()
            for name, tokens in self.target_tokens.items()
        }

    @torch.no_grad()
    def run(self, nn_model: Any, get_probs: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a function on this prompt and return the probability of each category.

        Args:
            nn_model: The model.
            get_probs: A function `(model, prompts) → [prompts, layers, vocab]` or `[prompts, vocab]`, such as
                `logit_lens`. A function with the attribute `reduces_targets = True` is also given `targets`, and
                returns their probabilities instead of the vocabulary.

        Returns:
            `{category: [1, layers]}` or `{category: [1]}`, on the CPU, in the dtype of what the function returned.

        Raises:
            ValueError: The function returned something else than probabilities, or a target is outside the vocabulary.
        """
        with plain_defaults():
            if reduces_targets(get_probs):
                size = getattr(nn_model, "vocab_size", None)
                targets = [[list(ids) for ids in ids_of_categories(self.target_tokens, size).values()]]
                values = get_probs(nn_model, [self.prompt], targets=targets)
                values = check_probabilities(get_probs, values, 1, len(self.target_tokens)).cpu()
                warn_of_missing(values.isnan().any(-1), "Its probabilities are NaN.")
                return {name: values[..., i] for i, name in enumerate(self.target_tokens)}
            return self.get_target_probs(check_probabilities(get_probs, get_probs(nn_model, self.prompt), 1, None))


@dataclass(frozen=True)
class PromptPair:
    """A clean prompt, and a corrupted one whose right answer is another.

    Both track the same two categories: "clean" holds the answer to the clean prompt, "corrupted" the answer to the
    corrupted one.

    Example:
        table = [{"country": "France", "capital": "Paris"}, {"country": "Italy", "capital": "Rome"}]
        other = ["country", "capital"]  # taken from the next row
        pair = pairs_from_table("The capital of {country} is", table, "{capital}", model, corrupted=other)[0]
        print(pair.corrupted.prompt)  # → The capital of Italy is
    """

    clean: Prompt
    corrupted: Prompt

    def __iter__(self) -> Iterator[Prompt]:
        return iter((self.clean, self.corrupted))


def _names(ignore_targets: str | Sequence[str] | None) -> set[str]:
    return {ignore_targets} if isinstance(ignore_targets, str) else set(ignore_targets or ())
