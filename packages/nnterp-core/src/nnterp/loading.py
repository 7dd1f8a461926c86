"""What has to be settled before a model can be loaded: its tokenizer, its attention implementation, its placement."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from nnterp.eager import make_eager


def resolve_tokenizer(
    model: str | nn.Module,
    tokenizer: Any,
    tokenizer_kwargs: dict[str, Any] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Any:
    """The tokenizer to trace with: a copy of the user's, or the one that belongs to the model.

    nnsight pads on the left and sets a pad token on the tokenizer it is given, so the user's own is never handed over.

    Raises:
        ValueError: A loaded module was given without a tokenizer, and does not say where it came from.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    source = tokenizer if tokenizer is not None else model
    if isinstance(source, nn.Module):
        source = getattr(source.config, "_name_or_path", "") or getattr(source, "name_or_path", "")
        if not source:
            raise ValueError(
                f"{type(model).__name__} was given as a loaded module that does not say where it was loaded from, so "
                f"its tokenizer cannot be found. Pass tokenizer=... (a tokenizer, a hub id or a folder)."
            )
    options = dict(tokenizer_kwargs or {})
    if isinstance(source, (str, Path)):
        return AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=trust_remote_code, **options
        )
    if not isinstance(source, PreTrainedTokenizerBase) and not callable(source):
        raise TypeError(f"tokenizer must be a tokenizer, a hub id or a folder, not a {type(source).__name__}.")
    mine = copy.deepcopy(source)
    for name, value in options.items():
        setattr(mine, name, value)
    return mine


def require_eager(model: str | nn.Module, options: dict[str, Any]) -> None:
    """Make `options` (and a loaded module) compute attention the way that has probabilities to read.

    Raises:
        ValueError: `attn_implementation` was also passed, and is not "eager".
    """
    asked = options.get("attn_implementation")
    if asked not in (None, "eager"):
        raise ValueError(
            f"enable_attention_probs=True needs attn_implementation='eager', because {asked!r} never computes the "
            f"probabilities as a tensor; attn_implementation={asked!r} was asked for. Drop one of the two."
        )
    if isinstance(model, nn.Module):
        options.pop("attn_implementation", None)
        make_eager(model)
    else:
        options["attn_implementation"] = "eager"


def prefix_free(tokenizer: Any) -> Any:
    """A copy of a tokenizer that does not put a space before the first word."""
    source = getattr(tokenizer, "name_or_path", "")
    if source:
        return type(tokenizer).from_pretrained(source, add_prefix_space=False)
    mine = copy.deepcopy(tokenizer)
    if hasattr(mine, "add_prefix_space"):
        mine.add_prefix_space = False
    return mine


@contextlib.contextmanager
def reported(reports: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """While the block is open, keep what transformers says of every checkpoint that it loads.

    Args:
        reports: Is given (model, report) for each; a report lists the weights that were "missing_keys",
            "unexpected_keys" and "mismatched_keys".
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_loading_info", False)
        loaded = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        if isinstance(loaded, tuple):
            reports.append(loaded)
        return loaded[0] if isinstance(loaded, tuple) and not wanted else loaded

    PreTrainedModel.from_pretrained = classmethod(watched)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]
