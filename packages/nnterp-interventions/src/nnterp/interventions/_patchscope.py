"""Patchscopes: hidden states are read by writing them into another prompt (Ghandeharioun et al., 2024)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.errors import ShapeError
from nnterp.inputs import Row, encode
from nnterp.interventions._engine import Cell, Edit, Reduce, sweep
from nnterp.interventions._layers import layers_of
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._reduction import Reduction
from nnterp.interventions._results import Result, describe_run, prompt_labels, vocabulary_of
from nnterp.interventions._running import BatchSize
from nnterp.interventions._states import last_states
from nnterp.interventions._targets import TargetPrompt, TargetPromptBatch, repeat_prompt
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.positions import resolve

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Targets = TargetPromptBatch | Sequence[TargetPrompt] | TargetPrompt | None


@dataclass(frozen=True, eq=False, repr=False)
class PatchscopeResult(Result):
    """The most probable tokens after each target prompt: `top_probs` and `top_ids` `[prompts, layers, top]`."""

    figure: ClassVar[str] = "patchscope"


@takes_nnsight_models
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
    """Next-token probabilities of a target prompt in which one hidden state is replaced by a source prompt's.

    For each source and layer, the output of the layer at `index_to_patch` of the target prompt is replaced by the
    output of the same layer at the source's last token. (Ghandeharioun et al., "Patchscopes", 2024, section 3.)

    Args:
        model: The model.
        source_prompts: A text or a list; anything that `nnterp.inputs.encode` takes.
        target_patch_prompts: One `TargetPrompt` for all sources, or one for each; `repeat_prompt()` if None.
        layers: The layer or layers to patch; all if None.
        latents: Hidden states to write in, `[layers, sources, hidden]`, instead of those of source prompts: the k-th is
            written to the k-th of `layers`; surplus ones are not used.
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


@takes_nnsight_models
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

    Args:
        model, source_prompts, target_patch_prompts, layers, remote, batch_size, progress: As in `patchscope_lens`.
        top_k: Number of most probable tokens to keep.

    Returns:
        `top_probs` and `top_ids`, `[prompts, layers, top]`, on the CPU.
    """
    reduction = Reduction(top_k=top_k)
    sources, found = _patchscope(
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
        "prompts": prompt_labels(sources, model),
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


@takes_nnsight_models
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
    """Next-token probabilities of target prompts whose attention reads a source's last token at one position.

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
        `[targets, layers, vocab]`, float32, on the CPU; the layer is the first one that is patched.

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
    at = [resolve(model, target, attn_idx_patch, f"target prompt {i}") for i, target in enumerate(targets)]
    layers = layers_of(model, None)
    states = last_states(model, sources, layers, "attentions_input", remote, batch_size, False)
    cells = []
    for i in range(len(targets)):
        source = i if len(sources) > 1 else 0
        for k in range(len(layers)):
            patched = range(k, min(len(layers), k + num_patches))
            edits = tuple(Edit("attentions_input", layers[p], at[i], states[p, source]) for p in patched)
            cells.append(Cell(i, edits))
    found = sweep(
        model,
        targets,
        cells,
        _reducing(Reduction(probs=True)),
        proven_shortcuts(model, remote),
        remote=remote,
        batch_size=batch_size,
        progress=progress,
        what="attention patchscope",
    )
    return found["probs"].unflatten(0, (len(targets), len(layers)))


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
    """The encoded sources, and for each tensor of `reduction` `[sources, layers, ...]`."""
    model.require_no_trace(function)
    if (source_prompts is None) == (latents is None):
        raise ValueError(f"{function}: give either source_prompts or latents, to say what is patched in.")
    chosen = layers_of(model, layers)
    sources = [] if source_prompts is None else encode(model, source_prompts)
    latents = None if latents is None else _checked_latents(model, latents, chosen)
    count = len(sources) if latents is None else latents.shape[1]
    targets, at = _encode_targets(model, target_patch_prompts, count)
    if latents is None:
        latents = last_states(model, sources, chosen, "layers_output", remote, batch_size, False)
    distinct = list({target.ids: target for target in targets}.values())
    place = {target.ids: i for i, target in enumerate(distinct)}
    cells = [
        Cell(place[targets[source].ids], (Edit("layers_output", layer, at[source], latents[k, source]),))
        for source in range(count)
        for k, layer in enumerate(chosen)
    ]
    found = sweep(
        model,
        distinct,
        cells,
        _reducing(reduction),
        proven_shortcuts(model, remote),
        remote=remote,
        batch_size=batch_size,
        progress=progress,
        what="patchscope",
    )
    return sources, {name: tensor.unflatten(0, (count, len(chosen))) for name, tensor in found.items()}


def _checked_latents(model: StandardizedTransformer, latents: Any, layers: list[int]) -> torch.Tensor:
    """Latents as one tensor, one for each layer to patch.

    Raises:
        ShapeError: It is not `[layers, sources, hidden]`.
    """
    latents = latents if isinstance(latents, torch.Tensor) else torch.stack(list(latents))
    if latents.dim() != 3 or len(latents) < len(layers) or latents.shape[2] != model.hidden_size:
        raise ShapeError(
            f"latents has shape {list(latents.shape)}; it must be [layers, sources, hidden], here "
            f"[{len(layers)}, sources, {model.hidden_size}]."
        )
    if len(latents) > len(layers) and layers != list(range(len(layers))):
        warnings.warn(
            f"latents has {len(latents)} layers for {len(layers)} to patch. As in nnterp 1.x, the first is written to "
            f"layer {layers[0]}, the next to the next layer asked for, and the rest is not used. To write each layer's "
            "own, pass latents[layers].",
            stacklevel=4,
        )
    return latents[: len(layers)]


def _encode_targets(
    model: StandardizedTransformer, given: Targets, count: int
) -> tuple[list[Row], list[tuple[int, ...]]]:
    """One target prompt for each of `count` sources, and the position to patch in each.

    Raises:
        ValueError: Their numbers do not match.
        IndexError: A target prompt has no such position.
    """
    batch = TargetPromptBatch.auto(repeat_prompt() if given is None else given, count)
    if len(batch) != count:
        raise ValueError(f"{len(batch)} target prompts for {count} sources; give one target prompt, or one per source.")
    targets = encode(model, list(batch.prompts))
    at = [
        resolve(model, target, int(index), f"target prompt {i}")
        for i, (target, index) in enumerate(zip(targets, batch.index_to_patch, strict=True))
    ]
    return targets, at


def _reducing(reduction: Reduction) -> Reduce:
    """A reduction without targets as the `reduce` of a sweep."""
    return lambda logits, _: reduction(logits, torch.zeros(len(logits), dtype=torch.long))


def _one_of(
    layers: int | Sequence[int] | None, layer_to_patch: int | Sequence[int] | None
) -> int | Sequence[int] | None:
    if layers is not None and layer_to_patch is not None:
        raise ValueError("layers and layer_to_patch are two names of one argument; give one of them.")
    return layers if layer_to_patch is None else layer_to_patch
