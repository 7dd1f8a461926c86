"""The tokens of whole answers as they follow their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnterp import StandardizedTransformer
from nnterp.inputs import Row
from nnterp.prompts._errors import TokenizationError
from nnterp.prompts._prompt import Prompt
from nnterp.prompts._questions import Tokens
from nnterp.prompts._tokens import continuations, encode_texts
from nnterp.prompts._words import as_words


def answers_of(
    model: StandardizedTransformer,
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    categories: Sequence[str],
    prefix: str,
) -> list[list[list[Tokens]]]:
    """Return, for each prompt and category, the tokens of each answer. Answers with the same tokens appear once.

    Args:
        model: The model whose tokenizer is used.
        prompts: The prompts.
        rows: Their tokens.
        categories: The categories, in order.
        prefix: Text between a prompt and an answer, if neither has whitespace there.

    Raises:
        ValueError: A prompt has no `target_strings` for a category, or an empty list of them.
        TokenizationError: An answer is empty, has no tokens, or holds text that the tokenizer does not know.
    """
    wanted = [
        _answer_texts(i, prompt, row, categories, prefix)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    pairs = {
        (row.text or "", text): None for row, own in zip(rows, wanted, strict=True) for group in own for text in group
    }
    spelled = _spelled(model.tokenizer, list(pairs))
    found = []
    for i, (prompt, row, own) in enumerate(zip(prompts, rows, wanted, strict=True)):
        before, where = row.text or "", f"Prompt {i} ({prompt.prompt!r:.80})"
        for name, group in zip(categories, own, strict=True):
            for text in group:
                _check_spelling(model.tokenizer, spelled.get((before, text)), text, name, where)
        found.append([list(dict.fromkeys(spelled[before, text] for text in group)) for group in own])
    return found


def _answer_texts(index: int, prompt: Prompt, row: Row, categories: Sequence[str], prefix: str) -> list[list[str]]:
    """Return the answers of each category of one prompt as texts, with what stands between prompt and answer."""
    if prompt.target_strings is None or not set(categories) <= set(prompt.target_strings):
        raise ValueError(
            f"scoring='sequence' scores whole answers, but prompt {index} ({prompt.prompt!r:.80}) has no "
            f"target_strings for all of {list(categories)}. Make prompts with Prompt.from_strings, or pass "
            f"target_strings."
        )
    texts = []
    for name in categories:
        words = as_words(name, prompt.target_strings[name])
        if empty := [word for word in words if not word]:
            raise TokenizationError(
                f"Prompt {index} ({prompt.prompt!r:.80}): the target {name!r} holds {empty[0]!r}, an empty text."
            )
        texts.append([_joined(prompt, row, word, prefix) for word in words])
    return texts


def _joined(prompt: Prompt, row: Row, answer: str, prefix: str) -> str:
    """Return an answer with the prefix in front, unless there is whitespace or the prompt is a chat or token ids."""
    if answer[0].isspace() or not isinstance(prompt.prompt, str) or row.text is None or row.text[-1:].isspace():
        return answer
    return prefix + answer


def _check_spelling(tokenizer: Any, ids: Tokens | None, text: str, category: str, where: str) -> None:
    """Raise if an answer has no tokens, or if the unknown token is among them.

    Raises:
        TokenizationError: It has none, or it is.
    """
    if not ids:
        raise TokenizationError(f"{where}: the answer {text!r} of {category!r} has no tokens.")
    if getattr(tokenizer, "unk_token_id", None) in ids and text.strip() != tokenizer.unk_token:
        raise TokenizationError(f"{where}: the tokenizer does not know all of the answer {text!r} of {category!r}.")


def _spelled(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Tokens]:
    """Map each (prompt, answer) to the answer's tokens.

    These are the tokens that the answer adds to the prompt's. If the prompt's last token changes when the answer
    follows, they are the answer's tokens in the middle of some other text. An answer without tokens is left out.
    """
    befores = {before: None for before, _ in pairs}
    heads = dict(zip(befores, encode_texts(tokenizer, list(befores)), strict=True))
    whole = dict(zip(pairs, encode_texts(tokenizer, [before + answer for before, answer in pairs]), strict=True))
    found: dict[tuple[str, str], Tokens] = {}
    for pair, ids in whole.items():
        head = heads[pair[0]]
        if head and ids[: len(head)] == head and len(ids) > len(head):
            found[pair] = tuple(ids[len(head) :])
    left = [pair for pair in pairs if pair not in found]
    inside = continuations(tokenizer, [answer for _, answer in left])
    found.update({pair: tuple(inside[pair[1]]) for pair in left if pair[1] in inside})
    return found
