"""The logit lens on vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.vllm._errors import raise_first

if TYPE_CHECKING:
    from nnterp.vllm._model import StandardizedVLLM


def logit_lens(model: StandardizedVLLM, prompts: Any) -> torch.Tensor:
    """What each layer's stream predicts after the last token, if the final norm and the head read it.

    Args:
        model: The model.
        prompts: As in `StandardizedTransformer.collect`; vLLM batches them.

    Returns:
        Probabilities `[prompts, layers, vocab]`, on the CPU, in the model's dtype, as
        `nnterp.interventions.logit_lens` returns them (nostalgebraist 2020).

    Raises:
        InsideTraceError: Called inside a trace.

    Example:
        >>> lens = logit_lens(model, ["The capital of France is"])  # [1, layers, vocab]
    """
    model.require_no_trace("logit_lens()")
    with model.edit() as (_, edit):
        lens = read_lens(model)
        lens.save()  # type: ignore[attr-defined]  # every object has it in a trace
    try:
        outputs = model.run(prompts)
    finally:
        edit.clear()
    return torch.stack([saved(output, "lens") for output in outputs])


def read_lens(model: StandardizedVLLM) -> torch.Tensor:
    """Of the running pass, `[layers, vocab]`."""
    last = torch.cat([model.layers_output[i][:, -1] for i in range(model.num_layers)])
    return model.project_on_vocab(last).softmax(-1).cpu()


def saved(output: Any, name: str) -> Any:
    """What an installed block saved for a request.

    Raises:
        Exception: The block raised it.
    """
    raise_first([output])
    return output.saves[name]
