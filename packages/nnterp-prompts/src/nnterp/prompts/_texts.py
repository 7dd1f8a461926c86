"""Prompts of every kind (text, chat messages, token ids) as text and as tokens, without a model."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.prompts._prompt import Text


def prompt_text(tokenizer: Any, prompt: Text) -> str | None:
    """Return the prompt's text, after the chat template if it is a chat; None for token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, torch.Tensor) or (prompt and isinstance(prompt[0], int)):
        return None
    continues = prompt[-1]["role"] == "assistant"  # type: ignore[index]
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )


def prompt_tokens(tokenizer: Any, prompt: Text) -> list[int]:
    """Return the token ids that the model reads for a prompt of any kind, special tokens included."""
    text = prompt_text(tokenizer, prompt)
    if text is None:
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    return list(tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"])
