"""The first tokens of words: which token a model writes when it begins a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from nnterp.prompts._errors import SharedTokenWarning, TokenizationError
from nnterp.prompts._words import listed
from nnterp.warn import warn

# To see a word's tokens in the middle of a text, it is tokenized after an anchor. Some tokenizers merge an anchor with
# the word or treat it as unknown, so there are several: the first whose own tokens stay the same is used.
_ANCHORS = ("🍐", "(", ":", "\n", "1:", "=")
_SPACES = " ▁Ġ"  # a plain space, SentencePiece's and byte-level BPE's


def tokenizer_of(tokenizer_or_model: Any) -> Any:
    """Return the tokenizer that was given, or the tokenizer of the model that was given.

    Raises:
        TypeError: It is neither a tokenizer nor a model with one.
    """
    if isinstance(tokenizer_or_model, PreTrainedTokenizerBase):
        return tokenizer_or_model
    tokenizer = getattr(tokenizer_or_model, "tokenizer", None)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    raise TypeError(f"A tokenizer or a model with one was expected, not {type(tokenizer_or_model).__name__}.")


def get_first_tokens(
    words: str | Sequence[str], tokenizer_or_model: Any, use_hacky_implementation: bool = False
) -> list[int]:
    """Return the tokens a model can begin each word with: the first token of "word" and the first of " word".

    Each word is tokenized in the middle of a text, because many tokenizers treat the first word of a text specially. A
    word that begins with whitespace is taken as written. A token that is only a space is never returned: if " word"
    begins with one, only "word" counts. Words that begin with the same token are reported by a `SharedTokenWarning`.

    Args:
        words: A word, or a list of words.
        tokenizer_or_model: A tokenizer, or a model with one.
        use_hacky_implementation: Return only the first token of "word" directly after other text. Kept from 1.x.

    Returns:
        Token ids in the order of the words, each once.

    Raises:
        TokenizationError: A word is empty, has no tokens, or is unknown to the tokenizer.
        TypeError: A word is not a text.

    Example:
        print([model.tokenizer.decode(i) for i in get_first_tokens("Paris", model)])  # → ['Paris', ' Paris']
    """
    words = listed(words, "words")
    found = first_tokens(words, tokenizer_of(tokenizer_or_model), bare_only=use_hacky_implementation)
    report_sharing(found, tokenizer_of(tokenizer_or_model))
    return list(dict.fromkeys(token for tokens in found.values() for token in tokens))


def first_tokens(words: Iterable[str], tokenizer: Any, bare_only: bool = False) -> dict[str, list[int]]:
    """Map each word to its first tokens; see `get_first_tokens`."""
    words = list(dict.fromkeys(words))
    for word in words:
        if not isinstance(word, str):
            raise TypeError(
                f"A target is a text, not {word!r}. Give token ids as Prompt(prompt, target_tokens={{...}})."
            )
        if not word.strip(" "):
            raise TokenizationError(f"The target {word!r} is empty or only spaces, so there is no token to track.")
    alone = dict(zip(words, encode_texts(tokenizer, words), strict=True))
    inside = continuations(tokenizer, [form for word in words for form in (word, " " + word)])
    return {word: _of_word(tokenizer, word, alone[word], inside, bare_only) for word in words}


def _of_word(tokenizer: Any, word: str, alone: list[int], inside: dict[str, list[int]], bare_only: bool) -> list[int]:
    """Return the first tokens of one word, given its tokens as a text of its own and inside a text."""
    if bare_only or word[0].isspace():
        forms = [inside.get(word)]
    else:
        spaced = inside.get(" " + word)
        # If a text's first word is written as after a space, the word without a space must be seen inside a text.
        # For all other tokenizers a word alone has the tokens that it has inside a text.
        special_first = bool(alone and spaced and alone[0] == spaced[0])
        forms = [inside.get(word) if special_first else alone, spaced]
    tokens = [form[0] for form in forms if form and not is_lone_space(tokenizer, form[0])]
    if not tokens:
        raise TokenizationError(
            f"The target {word!r} has no first token to track: alone it is {_shown(tokenizer, alone)}, inside a text "
            f"{', '.join(_shown(tokenizer, form or []) for form in forms)}."
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in tokens and word.strip() != tokenizer.unk_token:
        raise TokenizationError(
            f"The target {word!r} begins with {tokenizer.unk_token!r}: the tokenizer does not know it. The probability "
            f"of the unknown token would stand for every unknown word."
        )
    return list(dict.fromkeys(tokens))


def continuations(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """Map each text to its tokens after other text.

    A text is left out if the tokenizer merges it with every anchor.
    """
    found: dict[str, list[int]] = {}
    for anchor in _ANCHORS:
        left = [text for text in dict.fromkeys(texts) if text not in found]
        if not left:
            break
        (before, _), *after = _encode(tokenizer, [anchor, *(anchor + text for text in left)])
        for text, (ids, ends) in zip(left, after, strict=True):
            if not before or ids[: len(before)] != before or len(ids) == len(before):
                continue
            # One unknown token may cover the anchor and the beginning of the text.
            apart = before[-1] != tokenizer.unk_token_id if ends is None else ends[len(before) - 1] <= len(anchor)
            if apart:
                found[text] = ids[len(before) :]
    return found


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    return [ids for ids, _ in _encode(tokenizer, texts)]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[int] | None]]:
    """Return each text's token ids and the character at which each token ends (None for a slow tokenizer)."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        return [(list(ids), None) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [
        (list(ids), [end for _, end in offsets])
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def is_lone_space(tokenizer: Any, token: int) -> bool:
    """Return True if a token consists of spaces only."""
    name = tokenizer.convert_ids_to_tokens(token)
    return name == "<0x20>" or (bool(name) and not name.strip(_SPACES))


def shared_first_tokens(words: Iterable[str], tokenizer_or_model: Any) -> dict[int, list[str]]:
    """Find the tokens that several of the words begin with.

    Args:
        words: The words.
        tokenizer_or_model: A tokenizer, or a model with one.

    Returns:
        Token id → the words that begin with it; only tokens of two words or more.

    Raises:
        TokenizationError: A word is empty, has no tokens, or is unknown to the tokenizer.

    Example:
        print(list(shared_first_tokens(["Paris", "Rome"], model)))  # → []
    """
    return _sharing(first_tokens(words, tokenizer_of(tokenizer_or_model)))


def _sharing(found: dict[str, list[int]]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for word, tokens in found.items():
        for token in tokens:
            owners.setdefault(token, []).append(word)
    return {token: words for token, words in owners.items() if len(words) > 1}


def report_sharing(found: dict[str, list[int]], tokenizer: Any) -> None:
    """Warn about words that begin with the same token."""
    if shared := _sharing(found):
        text = "; ".join(
            f"{', '.join(map(repr, words))} by {token_name(tokenizer, token)}"
            for token, words in list(shared.items())[:5]
        )
        warn(f"Words that begin with the same token: {text}.", SharedTokenWarning)


def token_name(tokenizer: Any, token: int) -> str:
    """Return a token's quoted name and its id, as in "'Paris' (40)"."""
    return f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"


def collision_text(shared: Mapping[int, Sequence[str]], tokenizer: Any) -> str:
    """Say which categories share which tokens, as in "'a', 'b' share 'Paris' (40)"."""
    return "; ".join(
        f"{', '.join(map(repr, names))} share {token_name(tokenizer, token)}" for token, names in shared.items()
    )


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) if ids else "nothing"
