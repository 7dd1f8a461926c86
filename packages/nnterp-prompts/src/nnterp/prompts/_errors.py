"""What can go wrong with prompts, and what is saved of a run that broke off."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnterp.prompts._results import PromptResults


class TokenizationError(ValueError):
    """A word has no token to track: it is empty, or the tokenizer does not know it."""


class CollisionError(ValueError):
    """Targets that were to be distinct begin with the same token."""


class SharedTokenWarning(UserWarning):
    """Different words begin with the same token, so that the model's next token cannot tell them apart."""


class IncompleteRunError(RuntimeError):
    """A batch failed; what had been computed before is kept.

    Attributes:
        partial: The `PromptResults` so far, NaN where nothing was computed; `run_prompts(..., resume=partial)` goes on.
    """

    def __init__(self, message: str, partial: PromptResults) -> None:
        super().__init__(message)
        self.partial = partial
