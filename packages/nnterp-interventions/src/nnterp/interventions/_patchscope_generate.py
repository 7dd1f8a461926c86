"""Patchscopes that generate: the model continues a prompt into which a hidden state is written."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.generation import check_generation, sequences_of
from nnterp.indices import Indices, integer
from nnterp.inputs import Row, encode
from nnterp.interventions._engine import Edit, Passing
from nnterp.interventions._layers import layers_of
from nnterp.interventions._running import bar, within_memory
from nnterp.interventions._states import last_states
from nnterp.interventions._targets import TargetPrompt
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.positions import resolve

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@takes_nnsight_models
@plain_defaults()
@torch.no_grad()
def patchscope_generate(
    model: StandardizedTransformer,
    prompts: Any,
    target_patch_prompt: TargetPrompt,
    max_length: int = 50,
    layers: Indices = None,
    remote: bool = False,
    max_batch_size: int = 32,
    *,
    progress: bool | None = None,
    **generation: Any,
) -> dict[int, torch.Tensor]:
    """Generate from a target prompt in which one hidden state is replaced by a source prompt's.

    Args:
        model: The model.
        prompts: The sources: a text or a list.
        target_patch_prompt: The prompt that is continued, and the position to patch in it.
        max_length: The most new tokens to generate.
        layers: The layer or layers to patch, each once; all if None.
        remote: Run on a remote service.
        max_batch_size: Rows of a batch; there is one row for each source and layer.
        progress: Show a progress bar; with None, only if the work lasts.
        **generation: Passed to HuggingFace's `generate`.

    Returns:
        For each layer the token ids of the target prompt and of what was generated, int64 `[sources, length]`, on the
        CPU, padded on the right where a row ended before others.

    Raises:
        IndexError: There is no such layer, or the target prompt has no such position.
        InsideTraceError: Called inside a trace of the same model.
    """
    model.require_no_trace("patchscope_generate()")
    if not isinstance(target_patch_prompt, TargetPrompt):
        raise TypeError(
            f"target_patch_prompt is a TargetPrompt(text, index_to_patch), not {target_patch_prompt!r:.80}."
        )
    if integer(max_batch_size, "max_batch_size") < 1:
        raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}.")
    check_generation(max_length, generation, "max_length")
    chosen, sources = list(dict.fromkeys(layers_of(model, layers))), encode(model, prompts)
    (target,) = encode(model, target_patch_prompt.prompt)
    at = resolve(model, target, int(target_patch_prompt.index_to_patch), "the target prompt")
    latents = last_states(model, sources, chosen, "layers_output", remote, "auto", False)
    cells = [(k, source) for k in range(len(chosen)) for source in range(len(sources))]
    made: dict[tuple[int, int], torch.Tensor] = {}
    limit, start = max_batch_size, 0

    def step(some: list[tuple[int, int]]) -> None:
        edits: dict[int, list[tuple[int, Edit]]] = {}
        for row, (k, source) in enumerate(some):
            edit = Edit("layers_output", chosen[k], at, latents[k, source])
            edits.setdefault(chosen[k], []).append((row, edit))
        written = _generate(model, target, len(some), edits, {"max_new_tokens": max_length, **generation}, remote)
        made.update({cell: row.cpu() for cell, row in zip(some, written, strict=True)})

    with bar(len(cells), "patchscope", progress) as shown:
        while start < len(cells):
            some = cells[start : start + limit]
            if not within_memory(partial(step, some), len(some)):
                limit = max(1, len(some) // 2)
                continue
            start += len(some)
            shown.update(len(some))
    filler = getattr(model.tokenizer, "pad_token_id", None) or 0
    return {
        layer: torch.nn.utils.rnn.pad_sequence([made[k, s] for s in range(len(sources))], True, filler)
        for k, layer in enumerate(chosen)
    }


def _generate(
    model: StandardizedTransformer,
    target: Row,
    rows: int,
    edits: dict[int, list[tuple[int, Edit]]],
    generation: dict[str, Any],
    remote: bool,
) -> torch.Tensor:
    """Generate from `rows` copies of the target, with edits (pairs of row and edit) by layer: `[rows, length]`."""
    ids = torch.tensor([target.ids] * rows)
    encoding, size = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (rows, len(target))
    with model.generate(encoding, remote=remote, **generation) as tracer:
        for layer in sorted(edits):
            Passing(model).write(("layers_output", layer), edits[layer], size, 0)
        written = tracer.result.save()
    return sequences_of(written)
