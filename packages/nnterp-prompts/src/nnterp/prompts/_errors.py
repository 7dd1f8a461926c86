"""Errors and warnings about prompts and targets."""

from __future__ import annotations

from nnterp.errors import NnterpError


class TokenizationError(NnterpError, ValueError):
    """A word has no token to track: it is empty, or the tokenizer does not know it.

    Example:
        try:
            get_first_tokens("", model)
        except TokenizationError as error:
            print(error)
    """


class CollisionError(NnterpError, ValueError):
    """`distinct=True` was passed, and two categories share a token (or an answer).

    Example:
        try:
            Prompt.from_strings(prompts[0], {"right": "Paris", "wrong": "Paris"}, model, distinct=True)
        except CollisionError as error:
            print("Paris" in str(error))  # → True
    """


class MissingScoresWarning(UserWarning):
    """Prompts have no score, because the model's logits or a function's probabilities are NaN or infinite.

    Example:
        import warnings

        warnings.simplefilter("error", MissingScoresWarning)  # stop at a model that gives NaN
    """


class SharedTokenWarning(UserWarning):
    """Different words begin with the same token, so the model's next token cannot tell them apart.

    Example:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SharedTokenWarning)
            Prompt.from_strings(prompts[0], {"right": "Paris", "wrong": "Paris"}, model)
        print(caught[0].category is SharedTokenWarning)  # → True
    """
