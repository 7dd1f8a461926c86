"""Patchscopes: what a hidden state says when it is put into another prompt (Ghandeharioun et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.errors import ShapeError
from nnterp.inputs import Batch, Row, encode
from nnterp.interventions._edits import Cell, Edit
from nnterp.interventions._lens import Reduction, layers_of
from nnterp.interventions._passing import Passing
from nnterp.interventions._results import Result, describe_run, prompt_labels, vocabulary_of
from nnterp.interventions._running import BatchSize, bar, forward_flags, in_batches, within_memory
from nnterp.interventions._sweep import sweep
from nnterp.interventions._targets import TargetPrompt, TargetPromptBatch, repeat_prompt
from nnterp.positions import resolve

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Targets = TargetPromptBatch | Sequence[TargetPrompt] | TargetPrompt | None


@dataclass(frozen=True, eq=False, repr=False)
class PatchscopeResult(Result):
    """The most probable tokens after each target prompt: `top_probs` and `top_ids` `[prompts, layers, top]`."""

    figure: ClassVar[str] = "patchscope"


def patchscope_lens(
    model: StandardizedTransformer,
    source_prompts: Any = None,
    target_patch_prompts: Targets = None,
    layers: int | Sequence[int] | None = None,
    latents: torch.Tensor | None = None,
    remote: bool = False,
    *,
    layer_to_patch: int | Sequence[int] | None = None,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> torch.Tensor:
    """Next-token probabilities of a target prompt, one of its tokens taken over by a source prompt's hidden state.

    For each source and layer, the output of the layer at `index_to_patch` of the target prompt is replaced by the
    output of the same layer at the source's last token. (Ghandeharioun et al., "Patchscopes", 2024, section 3.)

    Args:
        model: The model.
        source_prompts: A text or a list; anything that `nnterp.inputs.encode` takes.
        target_patch_prompts: One `TargetPrompt` for all sources, or one for each; `repeat_prompt()` if None.
        layers: The layer or layers to patch; all if None.
        latents: `[layers, sources, hidden]`, put in instead of hidden states of source prompts.
        remote: Run on a remote service.
        layer_to_patch: Another name of `layers`.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.

    Returns:
        `[sources, layers, vocab]`, float32, on the CPU.

    Raises:
        ValueError: Neither or both of `source_prompts` and `latents` were given, or numbers do not match.
        IndexError: There is no such layer, or a target prompt has no such position (its tokens are shown).
        ShapeError: `latents` is not `[layers, sources, hidden]`.
        InsideTraceError: Called inside a trace of the same model.
    """
    _, found = _patchscope(
        model,
        "patchscope_lens()",
        source_prompts,
        target_patch_prompts,
        _one_of(layers, layer_to_patch),
        latents,
        remote,
        Reduction(probs=True),
        batch_size,
        progress,
    )
    return found["probs"]


def patchscope_table(
    model: StandardizedTransformer,
    source_prompts: Any,
    target_patch_prompts: Targets = None,
    layers: int | Sequence[int] | None = None,
    *,
    top_k: int = 5,
    remote: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> PatchscopeResult:
    """`patchscope_lens`, reduced inside the model to the `top_k` most probable tokens, with labels.

    Returns:
        `top_probs` and `top_ids`, `[prompts, layers, top]`.
    """
    reduction = Reduction(top_k=top_k)
    rows, found = _patchscope(
        model,
        "patchscope_table()",
        source_prompts,
        target_patch_prompts,
        layers,
        None,
        remote,
        reduction,
        batch_size,
        progress,
    )
    axes = ("prompts", "layers", "top")
    labels = {
        "prompts": prompt_labels(rows, model),
        "layers": tuple(layers_of(model, layers)),
        "top": tuple(range(top_k)),
    }
    targets = repeat_prompt() if target_patch_prompts is None else target_patch_prompts
    tensors = {name: found[name] for name in ("top_probs", "top_ids")}
    return PatchscopeResult(
        tensors,
        dict.fromkeys(tensors, axes),
        labels,
        vocabulary=vocabulary_of(model, tensors["top_ids"]),
        about=describe_run(model, "patchscope_table", target_patch_prompts=repr(targets), top_k=top_k),
    )


@torch.no_grad()
def patchscope_generate(
    model: StandardizedTransformer,
    prompts: Any,
    target_patch_prompt: TargetPrompt,
    max_length: int = 50,
    layers: int | Sequence[int] | None = None,
    remote: bool = False,
    max_batch_size: int = 32,
    *,
    progress: bool | None = None,
    **generation: Any,
) -> dict[int, torch.Tensor]:
    """Let the model write on from a target prompt in which one token is taken over by a source's hidden state.

    Args:
        model: The model.
        prompts: The sources: a text or a list.
        target_patch_prompt: The prompt that is continued, and the position to patch in it.
        max_length: How many new tokens are generated at most.
        layers: The layer or layers to patch; all if None.
        remote: Run on a remote service.
        max_batch_size: Sources times layers that are generated at a time.
        progress: Show a progress bar; with None, only if the work lasts.
        **generation: Passed to HuggingFace's `generate`.

    Returns:
        For each layer `[sources, length]`: ids of the target prompt and of what was generated, on the CPU, filled up
        where a row ended before others of its batch.

    Raises:
        IndexError: There is no such layer, or the target prompt has no such position.
        InsideTraceError: Called inside a trace of the same model.
    """
    model.require_no_trace("patchscope_generate()")
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}.")
    chosen, rows = layers_of(model, layers), encode(model, prompts)
    (target,) = encode(model, target_patch_prompt.prompt)
    at = resolve(model, target, int(target_patch_prompt.index_to_patch), "the target prompt")
    latents = last_states(model, rows, chosen, "layers_output", remote, "auto", False)
    cells = [(k, source) for k in range(len(chosen)) for source in range(len(rows))]
    made: dict[tuple[int, int], torch.Tensor] = {}
    limit, start = max_batch_size, 0

    def step(some: list[tuple[int, int]]) -> None:
        ids = torch.tensor([target.ids] * len(some))
        edits: dict[int, list[tuple[int, Edit]]] = {}
        for row, (k, source) in enumerate(some):
            edit = Edit("layers_output", chosen[k], at, latents[k, source])
            edits.setdefault(chosen[k], []).append((row, edit))
        encoding, size = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (len(some), len(target))
        with model.generate(encoding, max_new_tokens=max_length, remote=remote, **generation) as tracer:
            for layer in sorted(edits):
                Passing(model).write(("layers_output", layer), edits[layer], size, 0)
            written = tracer.result.save()
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
        layer: torch.nn.utils.rnn.pad_sequence([made[k, s] for s in range(len(rows))], True, filler)
        for k, layer in enumerate(chosen)
    }


def patch_object_attn_lens(
    model: StandardizedTransformer,
    source_prompts: Any,
    target_prompts: Any,
    attn_idx_patch: int,
    num_patches: int = 5,
    *,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: bool = False,
) -> torch.Tensor:
    """Next-token probabilities of target prompts whose attention reads a source's last token in place of one of theirs.

    For each layer, the input of the attention of that layer and of the ones after it, `num_patches` in all, is replaced
    at `attn_idx_patch` by the input of the same attention at the source's last token.

    Args:
        model: The model.
        source_prompts: A text or a list: one for all targets, or one for each.
        target_prompts: A text or a list.
        attn_idx_patch: The position to patch, over each target's own tokens; negative counts from its last token.
        num_patches: How many layers are patched at a time.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on a remote service.

    Returns:
        `[targets, layers, vocab]`, float32, on the CPU: for each first patched layer.

    Raises:
        ValueError: There are several sources and another number of targets, or `num_patches` is not positive.
        IndexError: A target prompt has no such position (its tokens are shown).
        Unavailable: A layer of the model has no attention.
        InsideTraceError: Called inside a trace of the same model.
    """
    model.require_no_trace("patch_object_attn_lens()")
    if num_patches < 1:
        raise ValueError(f"num_patches must be at least 1, not {num_patches}.")
    sources, targets = encode(model, source_prompts), encode(model, target_prompts)
    if len(sources) not in (1, len(targets)):
        raise ValueError(f"{len(sources)} sources for {len(targets)} targets; give one source, or one for each target.")
    at = [resolve(model, row, attn_idx_patch, f"target prompt {i}") for i, row in enumerate(targets)]
    layers = list(range(model.num_layers))
    states = last_states(model, sources, layers, "attentions_input", remote, batch_size, False)
    cells = []
    for i in range(len(targets)):
        source = i if len(sources) > 1 else 0
        for layer in layers:
            patched = range(layer, min(model.num_layers, layer + num_patches))
            edits = tuple(Edit("attentions_input", other, at[i], states[other, source]) for other in patched)
            cells.append(Cell(i, edits))
    reduction = Reduction(probs=True)
    found = sweep(
        model,
        targets,
        cells,
        lambda logits, _: reduction(logits, torch.zeros(len(logits), dtype=torch.long)),
        remote=remote,
        batch_size=batch_size,
        progress=progress,
        what="attention patchscope",
    )
    return found["probs"].unflatten(0, (len(targets), len(layers)))


@torch.no_grad()
def last_states(
    model: StandardizedTransformer,
    rows: Sequence[Row],
    layers: Sequence[int],
    name: str,
    remote: bool,
    batch_size: BatchSize,
    progress: bool | None,
) -> torch.Tensor:
    """A value of layers at each prompt's own last token, `[layers, prompts, hidden]`, where the model computes it."""
    model.prepare(remote)
    flags, order = forward_flags(model), sorted(set(layers))
    kept: list[torch.Tensor | None] = [None] * len(rows)

    def step(batch: Batch) -> None:
        count, last = torch.arange(len(batch)), batch.last
        with model.trace(batch.encoding, remote=remote, **flags) as tracer:
            states, passing = [], Passing(model)
            for layer in order:
                tensor = passing.read((name, layer))
                states.append(tensor[count.to(tensor.device), last.to(tensor.device)])
            stacked = torch.stack([state.to(states[-1].device) for state in states], dim=1).save()
            tracer.stop()
        for k, i in enumerate(batch.indices):
            kept[i] = stacked[k]

    in_batches(model, rows, batch_size, step, "sources", progress)
    whole = torch.stack([state for state in kept if state is not None], dim=1)
    return whole[[order.index(layer) for layer in layers]]


def _patchscope(
    model: StandardizedTransformer,
    function: str,
    source_prompts: Any,
    target_patch_prompts: Targets,
    layers: int | Sequence[int] | None,
    latents: torch.Tensor | None,
    remote: bool,
    reduction: Reduction,
    batch_size: BatchSize,
    progress: bool | None,
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    model.require_no_trace(function)
    if (source_prompts is None) == (latents is None):
        raise ValueError(f"{function}: give either source_prompts or latents, to say what is patched in.")
    chosen = layers_of(model, layers)
    sources = [] if source_prompts is None else encode(model, source_prompts)
    if latents is not None:
        latents = torch.stack(list(latents)) if not isinstance(latents, torch.Tensor) else latents
        expected = [len(chosen), latents.shape[1] if latents.dim() > 1 else 1, model.hidden_size]
        if list(latents.shape) != expected:
            raise ShapeError(
                f"latents has shape {list(latents.shape)}; it must be [layers, sources, hidden], here "
                f"[{len(chosen)}, sources, {model.hidden_size}]."
            )
    count = len(sources) if latents is None else latents.shape[1]
    batch = TargetPromptBatch.auto(repeat_prompt() if target_patch_prompts is None else target_patch_prompts, count)
    if len(batch) != count:
        raise ValueError(f"{len(batch)} target prompts for {count} sources; give one target prompt, or one per source.")
    encoded = encode(model, list(batch.prompts))
    at = [
        resolve(model, row, int(index), f"target prompt {i}")
        for i, (row, index) in enumerate(zip(encoded, batch.index_to_patch, strict=True))
    ]
    if latents is None:
        latents = last_states(model, sources, chosen, "layers_output", remote, batch_size, False)
    targets = list({row.ids: row for row in encoded}.values())
    place = {row.ids: i for i, row in enumerate(targets)}
    cells = [
        Cell(place[encoded[source].ids], (Edit("layers_output", layer, at[source], latents[k, source]),))
        for source in range(count)
        for k, layer in enumerate(chosen)
    ]
    found = sweep(
        model,
        targets,
        cells,
        lambda logits, _: reduction(logits, torch.zeros(len(logits), dtype=torch.long)),
        remote=remote,
        batch_size=batch_size,
        progress=progress,
        what="patchscope",
    )
    return sources, {name: tensor.unflatten(0, (count, len(chosen))) for name, tensor in found.items()}


def _one_of(
    layers: int | Sequence[int] | None, layer_to_patch: int | Sequence[int] | None
) -> int | Sequence[int] | None:
    if layers is not None and layer_to_patch is not None:
        raise ValueError("layers and layer_to_patch are two names of one argument; give one of them.")
    return layers if layer_to_patch is None else layer_to_patch
