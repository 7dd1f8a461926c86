"""Settings of a generation that functions with one answer for each prompt can serve."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from nnterp.indices import integer
from nnterp.wording import nearest


def check_generation(max_new_tokens: Any, settings: Mapping[str, Any]) -> None:
    """Raise for settings that do not give one answer to each prompt.

    Args:
        max_new_tokens: The most new tokens.
        settings: Keyword arguments for HuggingFace's `generate`.

    Raises:
        TypeError: The number of tokens is no integer.
        ValueError: It is not positive, or several answers or beams were asked for.
    """
    if integer(max_new_tokens, "max_new_tokens") < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    for setting in ("num_return_sequences", "num_beams"):
        if (settings.get(setting) or 1) != 1:
            raise ValueError(
                f"{setting}={settings[setting]}: each prompt has one answer here. Give a prompt several times for "
                "several answers, or call model.generate() yourself."
            )


def refuse_misspelt(settings: Iterable[str], function: Callable[..., Any], known: Container[str] = ()) -> None:
    """Raise for settings of a generation that look like a misspelt argument of the function that they were given to.

    Args:
        settings: The names of what the function's `**` took.
        function: The function.
        known: Names that are settings, however near they are to an argument.

    Raises:
        TypeError: There is one; names the argument.
    """
    arguments = [name for name in inspect.signature(function).parameters if name != "self"]
    for name in settings:
        if name not in known and (near := nearest(name, arguments)):
            raise TypeError(f"{function.__name__}() has no argument {name}.{near}")


def settings_of_generate() -> Container[str]:
    """The names of what HuggingFace's `generate` takes, and of the settings that its config holds."""
    from transformers import GenerationConfig, GenerationMixin  # here, because it takes long to import

    return {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}


def sequences_of(answer: Any) -> Any:
    """Token ids `[rows, seq]` of what `generate` returns, which is an object with `return_dict_in_generate=True`."""
    return getattr(answer, "sequences", answer)
