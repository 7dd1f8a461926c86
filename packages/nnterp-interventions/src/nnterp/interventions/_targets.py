"""Target prompts of patchscopes: a prompt and the position at which its hidden state is replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnterp.arguments import listed
from nnterp.indices import integer, integers
from nnterp.inputs import Row


@dataclass
class TargetPrompt:
    """A prompt and the position to patch in it.

    Attributes:
        prompt: The text.
        index_to_patch: Over the prompt's own tokens; negative counts from its last token.

    Example:
        target = TargetPrompt("The capital of Spain is", index_to_patch=-2)
        probabilities = patchscope_lens(model, "Once I lived in France", target)  # [sources, layers, vocab]
    """

    prompt: str
    index_to_patch: int

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise TypeError(f"The prompt of a TargetPrompt is a text, not {self.prompt!r:.80}.")
        self.index_to_patch = integer(self.index_to_patch, "index_to_patch")


@dataclass
class TargetPromptBatch:
    """One target prompt for each source.

    Attributes:
        prompts: The texts.
        index_to_patch: The position to patch in each, `[prompts]`.

    Example:
        batch = TargetPromptBatch.from_target_prompts([TargetPrompt("The capital of Spain is", -2), repeat_prompt()])
        print(batch.index_to_patch.tolist())  # → [-2, -1]
    """

    prompts: list[str]
    index_to_patch: torch.Tensor

    def __post_init__(self) -> None:
        listed = integers(self.index_to_patch, "index_to_patch")
        if not isinstance(listed, list):
            raise TypeError(
                f"index_to_patch is {self.index_to_patch!r:.80}; give a list with one index for each prompt."
            )
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise TypeError(f"prompts is a list of texts, not {self.prompts!r:.80}.")
        if len(self.prompts) != len(listed):
            raise ValueError(f"{len(self.prompts)} target prompts and {len(listed)} positions to patch.")
        self.index_to_patch = torch.tensor(listed, dtype=torch.long, device="cpu")

    @classmethod
    def from_target_prompts(cls, prompts_: Sequence[TargetPrompt]) -> TargetPromptBatch:
        """Make a batch of several target prompts."""
        return cls([p.prompt for p in prompts_], [p.index_to_patch for p in prompts_])  # type: ignore[arg-type]

    @classmethod
    def from_target_prompt(cls, prompt: TargetPrompt, batch_size: int) -> TargetPromptBatch:
        """Make a batch of one target prompt, repeated `batch_size` times."""
        return cls.from_target_prompts([prompt] * batch_size)

    @classmethod
    def from_prompts(
        cls, prompts: str | Sequence[str], index_to_patch: int | Sequence[int] | torch.Tensor
    ) -> TargetPromptBatch:
        """Make a batch of texts, with one position for all or one for each.

        Raises:
            ValueError: The numbers of prompts and positions differ.
            TypeError: The positions are not integers.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        listed: Any = integers(index_to_patch, "index_to_patch")
        return cls(texts, [listed] * len(texts) if isinstance(listed, int) else listed)  # type: ignore[arg-type]

    @staticmethod
    def auto(target_prompt: Any, batch_size: int) -> TargetPromptBatch:
        """Make a batch of a `TargetPrompt` (repeated), a list of them, or a batch (returned unchanged).

        Raises:
            ValueError: `target_prompt` is none of these.
        """
        if isinstance(target_prompt, TargetPromptBatch):
            return target_prompt
        if isinstance(target_prompt, TargetPrompt):
            return TargetPromptBatch.from_target_prompt(target_prompt, batch_size)
        if isinstance(target_prompt, (list, tuple)) and all(isinstance(p, TargetPrompt) for p in target_prompt):
            return TargetPromptBatch.from_target_prompts(target_prompt)
        raise ValueError(
            f"Target prompts are a TargetPrompt, a list of them or a TargetPromptBatch, not {target_prompt!r:.80}. "
            f"Make one with TargetPrompt(text, index_to_patch)."
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> TargetPrompt:
        return TargetPrompt(self.prompts[index], int(self.index_to_patch[index]))

    def __iter__(self) -> Iterator[TargetPrompt]:
        return (self[i] for i in range(len(self)))


WORDS = ("king", "1135", "hello", "river", "paper", "green", "Monday", "teacher")


def repeat_prompt(
    words: Sequence[str] | None = None,
    rel: str = " ",
    sep: str = "\n",
    placeholder: str = "?",
    index_to_patch: int = -1,
) -> TargetPrompt:
    """Make a prompt that repeats words, so that the model also repeats the word whose hidden state is patched in.

    (Ghandeharioun et al., "Patchscopes", 2024, section 4.1: the token identity prompt.)

    Args:
        words: The words that the prompt repeats; eight unrelated ones if None. The paper repeats three, with which
            small models (SmolLM2-135M) do not go on with the pattern.
        rel: Text between a word and its repetition.
        sep: Text between pairs.
        placeholder: The token to patch.
        index_to_patch: The position to patch; by default the last token.

    Returns:
        The prompt, with the position to patch.

    Raises:
        TypeError: A word, `rel`, `sep` or `placeholder` is no text.

    Example:
        print(repr(repeat_prompt(["king", "hello"]).prompt))  # → 'king king\\nhello hello\\n?'
    """
    words = WORDS if words is None else listed(words, "words", "a list of texts")
    for name, texts in (("words", words), ("rel", [rel]), ("sep", [sep]), ("placeholder", [placeholder])):
        if any(not isinstance(text, str) for text in texts):
            raise TypeError(f"repeat_prompt({name}) is text, not {texts!r:.80}.")
    return TargetPrompt(sep.join([*(f"{word}{rel}{word}" for word in words), placeholder]), index_to_patch)


def it_repeat_prompt(
    tokenizer: Any,
    words: Sequence[str] | None = None,
    rel: str = " ",
    sep: str = "\n",
    placeholder: str = "?",
    complete_prompt: bool = True,
    add_user_instr: bool = True,
    use_system_prompt: bool = True,
) -> TargetPrompt:
    """Put `repeat_prompt` in the chat template of an instruction-tuned model.

    Args:
        tokenizer: The model's tokenizer.
        words, rel, sep, placeholder: As in `repeat_prompt`.
        complete_prompt: Begin the assistant's turn with the repeated words, so that the placeholder is the last token.
            If False, the assistant's turn is empty, and the last token is the template's own.
        add_user_instr: Explain the task in a first exchange; the repeated words are then a turn of their own.
        use_system_prompt: Begin with a system message, which some templates do not allow.

    Returns:
        The prompt as text; its last token is patched.

    Raises:
        ValueError: The tokenizer has no chat template.

    Example:
        model.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}"
        print(it_repeat_prompt(model.tokenizer).index_to_patch)  # → -1
        model.tokenizer.chat_template = None
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("This tokenizer has no chat template; use repeat_prompt, which needs none.")
    text = repeat_prompt(words, rel, sep, placeholder).prompt
    task = (
        "Continue each text that you are given by the one word that comes next. Reply with that word and nothing else."
    )
    chat: list[dict[str, str]] = []
    if add_user_instr:
        if use_system_prompt:
            chat.append({"role": "system", "content": "You are a careful assistant."})
        chat += [{"role": "user", "content": task}, {"role": "assistant", "content": "Understood."}]
        chat.append({"role": "user", "content": text})
    elif use_system_prompt:
        chat += [{"role": "system", "content": task}, {"role": "user", "content": text}]
    else:
        chat.append({"role": "user", "content": f"{task}\n\n{text}"})
    if complete_prompt:
        chat.append({"role": "assistant", "content": text})
    how = {"continue_final_message": True} if complete_prompt else {"add_generation_prompt": True}
    whole = tokenizer.apply_chat_template(chat, tokenize=False, **how)
    start = tokenizer.bos_token
    if start and whole.startswith(start) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        whole = whole.removeprefix(start)  # the tokenizer adds it itself
    return TargetPrompt(whole, -1)


def require_last_token(targets: Sequence[Row], at: Sequence[tuple[int, ...]]) -> None:
    """Raise if a state that is written after the last layer cannot reach the prediction of a target prompt.

    Raises:
        ValueError: It is written at an earlier token than the last.
    """
    for i, (target, places) in enumerate(zip(targets, at, strict=True)):
        if len(target) - 1 not in places:
            raise ValueError(
                f"The lens leads to the last layer, after which no token reads another, and target prompt {i} is "
                f"patched at token {places[0]} of {len(target)}: nothing would change. Fit a lens to an earlier layer "
                "(fit_jacobian_lens(to_layer=...)), or patch the last token (index_to_patch=-1)."
            )
