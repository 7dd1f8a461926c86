"""`nnterp.prompts` under its 1.x name, with the 1.x names of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm as auto_tqdm

from nnterp import prompts as _prompts
from nnterp.prompts import Prompt, PromptResults, TokenizationError, next_token_probs_unsqueeze

__all__ = ["Prompt", "TokenizationError", "get_first_tokens", "next_token_probs_unsqueeze", "run_prompts"]


def get_first_tokens(
    words: str | list[str], llm_or_tokenizer: Any, use_hacky_implementation: bool = False
) -> list[int]:
    """Call `nnterp.prompts.get_first_tokens` with the same arguments.

    Returns:
        Token ids, as that function returns them.
    """
    return _prompts.get_first_tokens(words, llm_or_tokenizer, use_hacky_implementation)


def run_prompts(
    nn_model: Any,
    prompts: Sequence[Prompt],
    batch_size: int = 32,
    get_probs_func: Callable[..., torch.Tensor] | None = None,
    func_kwargs: dict[str, Any] | None = None,
    remote: Any = False,
    tqdm: Callable[..., Any] | None = auto_tqdm,
) -> PromptResults:
    """Call `nnterp.prompts.run_prompts` with the same arguments; that function has more options.

    Returns:
        The results, as that function returns them.
    """
    return _prompts.run_prompts(nn_model, prompts, batch_size, get_probs_func, func_kwargs, remote, tqdm)
