"""Patchscopes: hidden states are read by writing them into another prompt (Ghandeharioun et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.arguments import count, listed
from nnterp.defaults import plain_defaults
from nnterp.deprecation import renamed
from nnterp.errors import ShapeError
from nnterp.indices import Indices
from nnterp.inputs import Row, encode
from nnterp.interventions._engine import Cell, Edit, Kept, Reduce, sweep
from nnterp.interventions._fitted import Lens
from nnterp.interventions._layers import layers_of
from nnterp.interventions._partial import Resume, cells_of, ids_of, kept_of, resumed, unfinished
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._reduction import Reduction
from nnterp.interventions._results import Result, describe_run, prompt_labels, token_bytes_of, vocabulary_of
from nnterp.interventions._running import BatchSize
from nnterp.interventions._states import last_states
from nnterp.interventions._targets import TargetPrompt, TargetPromptBatch, repeat_prompt
from nnterp.interventions._through import require_lens, source_layers, written_states
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.positions import resolve
from nnterp.resuming import Call
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Targets = TargetPromptBatch | Sequence[TargetPrompt] | TargetPrompt | None


@dataclass(frozen=True, eq=False, repr=False)
class PatchscopeResult(Result):
    """The most probable tokens after each target prompt: `top_probs` and `top_ids` `[prompts, layers, top]`.

    Example:
        read = patchscope_table(model, "The capital of France", repeat_prompt(), top_k=1)
        print(read.vocabulary[read["top_ids"][0, 0, 0].item()])  # → France
    """

    figure: ClassVar[str] = "patchscope"


@takes_nnsight_models
@plain_defaults()
def patchscope_lens(
    model: StandardizedTransformer,
    source_prompts: Any = None,
    target_patch_prompts: Targets = None,
    layers: Indices = None,
    latents: torch.Tensor | None = None,
    remote: bool = False,
    *,
    layer_to_patch: Indices = None,
    lens: Lens | None = None,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    resume: Resume = None,
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
        lens: A fitted lens: the state of each of `layers` goes through its map, and is written to the layer that the
            map leads to, `lens.maps_to`, instead of to its own. (The paper's mapping f between a source layer and
            another target layer.) `fit_jacobian_lens(to_layer=...)` makes one. With it, `layers` are those that it has
            a map for if None. What is written after the last layer can be seen at its own position only, so a lens
            to the last layer is for target prompts that are patched at their last token, where the result is that of
            `logit_lens(lens=lens)` whatever the prompt.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        `[sources, layers, vocab]`, float32, on the CPU.

    Raises:
        ValueError: Neither or both of `source_prompts` and `latents` were given, numbers do not match, or the lens is
            of another model, or leads to the last layer while an earlier token is patched.
        KeyError: The lens has no map for a layer.
        TypeError: `lens` is no lens.
        IndexError: There is no such layer, or a target prompt has no such position (its tokens are shown).
        ShapeError: `latents` is not `[layers, sources, hidden]`.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` is False.

    Example:
        probabilities = patchscope_lens(model, "The capital of France", repeat_prompt())  # [sources, layers, vocab]
        print(model.tokenizer.decode(probabilities[0, 0].argmax()))  # → France
    """
    layers = _one_of(layers, layer_to_patch)
    reduction = Reduction(probs=True)
    run = _Patchscope(model, "patchscope_lens", source_prompts, target_patch_prompts, layers, latents, remote, lens)
    return run.found(reduction, {"reduction": "probs"}, resume, batch_size, progress)["probs"]


@takes_nnsight_models
@plain_defaults()
def patchscope_table(
    model: StandardizedTransformer,
    source_prompts: Any,
    target_patch_prompts: Targets = None,
    layers: Indices = None,
    *,
    top_k: int = 5,
    lens: Lens | None = None,
    remote: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    resume: Resume = None,
) -> PatchscopeResult:
    """`patchscope_lens`, reduced inside the model to the `top_k` most probable tokens, with labels.

    Args:
        model, source_prompts, target_patch_prompts, layers, lens: As in `patchscope_lens`.
        remote, batch_size, progress, resume: As in `patchscope_lens`.
        top_k: Number of most probable tokens to keep.

    Returns:
        `top_probs` and `top_ids`, `[prompts, layers, top]`, on the CPU.

    Example:
        read = patchscope_table(model, "The capital of France", repeat_prompt(), top_k=1)
    """
    top_k = count(top_k, "top_k", 1, model.vocab_size)
    run = _Patchscope(model, "patchscope_table", source_prompts, target_patch_prompts, layers, None, remote, lens)
    found = run.found(Reduction(top_k=top_k), {"top_k": top_k}, resume, batch_size, progress)
    targets = repeat_prompt() if target_patch_prompts is None else target_patch_prompts
    through = {} if lens is None else {"lens": lens.kind, "fitted_on": lens.origin.model, "maps_to": lens.maps_to}
    about = describe_run(model, "patchscope_table", target_patch_prompts=repr(targets), top_k=top_k, **through)
    return labelled(model, {name: found[name] for name in ("top_probs", "top_ids")}, run.labels(), about)


@renamed(removed_in="3.0", target_prompts="target_patch_prompts")
@takes_nnsight_models
@plain_defaults()
def patch_object_attn_lens(
    model: StandardizedTransformer,
    source_prompts: Any,
    target_patch_prompts: Any,
    attn_idx_patch: int,
    num_patches: int = 5,
    *,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: bool = False,
    resume: Resume = None,
) -> torch.Tensor:
    """Next-token probabilities of target prompts whose attention reads a source's last token at one position.

    For each layer, the input of the attention of that layer and of the ones after it, `num_patches` in all, is replaced
    at `attn_idx_patch` by the input of the same attention at the source's last token.

    Args:
        model: The model.
        source_prompts: A text or a list: one for all targets, or one for each.
        target_patch_prompts: A text or a list; the older name `target_prompts=` warns.
        attn_idx_patch: The position to patch, over each target's own tokens; negative counts from its last token.
        num_patches: How many layers are patched at a time.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on a remote service.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        `[targets, layers, vocab]`, float32, on the CPU; the layer is the first one that is patched.

    Raises:
        ValueError: There are several sources and another number of targets, or `num_patches` is not positive.
        IndexError: A target prompt has no such position (its tokens are shown).
        Unavailable: A layer of the model has no attention.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` is False.

    Example:
        source, target = "Once I lived in France", "The capital of Spain is"
        probabilities = patch_object_attn_lens(model, source, target, attn_idx_patch=-2, num_patches=3)
        print(list(probabilities.shape) == [1, model.num_layers, model.vocab_size])  # → True
    """
    model.require_no_trace("patch_object_attn_lens()")
    num_patches = count(num_patches, "num_patches")
    sources, targets = encode(model, source_prompts), encode(model, target_patch_prompts)
    if len(sources) not in (1, len(targets)):
        raise ValueError(f"{len(sources)} sources for {len(targets)} targets; give one source, or one for each target.")
    at = [resolve(model, target, attn_idx_patch, f"target prompt {i}") for i, target in enumerate(targets)]
    layers = layers_of(model, None)
    asked = {"prompts": ids_of(sources, targets), "positions": at, "num_patches": num_patches}
    call = Call(model, "patch_object_attn_lens", asked)
    kept = kept_of(resumed(call, resume))
    states = last_states(model, sources, layers, "attentions_input", remote, batch_size, False)
    cells = []
    for i in range(len(targets)):
        source = i if len(sources) > 1 else 0
        for k in range(len(layers)):
            patched = range(k, min(len(layers), k + num_patches))
            edits = tuple(Edit("attentions_input", layers[p], at[i], states[p, source]) for p in patched)
            cells.append(Cell(i, edits))
    labels = {"prompts": prompt_labels(targets, model), "layers": tuple(layers)}
    with call.keeping(lambda: partial_grid(model, call, kept, labels)):
        sweep(
            model,
            targets,
            cells,
            _reducing(Reduction(probs=True)),
            proven_shortcuts(model, remote),
            remote=remote,
            batch_size=batch_size,
            progress=progress,
            what="attention patchscope",
            kept=kept,
        )
    return kept.results["probs"].unflatten(0, (len(targets), len(layers)))


class _Patchscope:
    """The runs of a patchscope: each source and layer written into its target prompt.

    Attributes:
        sources: The source prompts; empty if latents were given.
        layers: The layers that states are taken from, and written to if there is no lens.
        count: Number of sources.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        function: str,
        source_prompts: Any,
        target_patch_prompts: Targets,
        layers: Indices,
        latents: torch.Tensor | None,
        remote: bool,
        lens: Lens | None,
    ) -> None:
        model.require_no_trace(f"{function}()")
        if (source_prompts is None) == (latents is None):
            raise ValueError(f"{function}(): give either source_prompts or latents, to say what is patched in.")
        self.model, self.function, self.remote = model, function, remote
        self.lens = lens
        self.layers = source_layers(model, layers, lens)
        self.sources = [] if source_prompts is None else encode(model, source_prompts)
        self.latents = None if latents is None else _checked_latents(model, latents, self.layers)
        self.count = len(self.sources) if self.latents is None else self.latents.shape[1]
        self.targets, self.at = _encode_targets(model, target_patch_prompts, self.count)
        require_lens(model, lens, self.layers, self.targets, self.at, remote)

    def found(
        self, reduction: Reduction, kind: dict[str, Any], resume: Resume, batch_size: BatchSize, progress: bool | None
    ) -> dict[str, torch.Tensor]:
        """For each tensor of `reduction`, which `kind` describes, `[sources, layers, ...]`."""
        model, remote = self.model, self.remote
        asked = {"prompts": ids_of(self.sources, self.targets), "positions": self.at, "layers": self.layers, **kind}
        asked |= {} if self.lens is None else {"lens": self.lens}
        call = Call(model, self.function, {**asked, "latents": self.latents})
        kept = kept_of(resumed(call, resume))
        latents = self.latents
        if latents is None:
            latents = last_states(model, self.sources, self.layers, "layers_output", remote, batch_size, False)
        latents, written = written_states(self.lens, latents, self.layers)
        distinct = list({target.identity: target for target in self.targets}.values())
        place = {target.identity: i for i, target in enumerate(distinct)}
        cells = [
            Cell(
                place[self.targets[source].identity],
                (Edit("layers_output", layer, self.at[source], latents[k, source]),),
            )
            for source in range(self.count)
            for k, layer in enumerate(written)
        ]
        with call.keeping(lambda: partial_grid(model, call, kept, self.labels())):
            sweep(
                model,
                distinct,
                cells,
                _reducing(reduction),
                proven_shortcuts(model, remote),
                remote=remote,
                batch_size=batch_size,
                progress=progress,
                what="patchscope",
                kept=kept,
            )
        return {name: tensor.unflatten(0, (self.count, len(self.layers))) for name, tensor in kept.results.items()}

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """Labels of the sources and layers."""
        sources = prompt_labels(self.sources, self.model) if self.sources else tuple(range(self.count))
        return {"prompts": sources, "layers": tuple(self.layers)}


_LAST = {"probs": "vocabulary", "top_probs": "top", "top_ids": "top"}


def labelled(
    model: StandardizedTransformer,
    tensors: dict[str, torch.Tensor],
    labels: dict[str, tuple[Any, ...]],
    about: dict[str, Any],
) -> PatchscopeResult:
    """Tensors `[prompts, layers, top]` or `[prompts, layers, vocabulary]` with labels."""
    last = {_LAST[name]: tuple(range(tensor.shape[-1])) for name, tensor in tensors.items()}
    vocabulary = vocabulary_of(model, tensors["top_ids"]) if "top_ids" in tensors else {}
    return PatchscopeResult(
        dict(tensors),
        {name: ("prompts", "layers", _LAST[name]) for name in tensors},
        {**labels, **last},
        vocabulary=vocabulary,
        about=about,
        token_bytes=token_bytes_of(model, vocabulary),
    )


def partial_grid(
    model: StandardizedTransformer, call: Call, kept: Kept, labels: dict[str, tuple[Any, ...]]
) -> PatchscopeResult | None:
    """The cells of prompts and layers that are computed so far; None if there are none."""
    if not kept.done:
        return None
    tensors, done = cells_of(kept, len(labels["prompts"]), len(labels["layers"]))
    whole = labelled(model, tensors, labels, describe_run(model, call.function))
    return unfinished(call, lambda: whole, done, ("prompts", "layers"), kept)


def _checked_latents(model: StandardizedTransformer, latents: Any, layers: list[int]) -> torch.Tensor:
    """Latents as one tensor, one for each layer to patch.

    Raises:
        ShapeError: It is not `[layers, sources, hidden]`.
    """
    if not isinstance(latents, torch.Tensor):
        parts = listed(latents, "latents", "a tensor [layers, sources, hidden], or a list of one for each layer")
        if not parts or any(not isinstance(part, torch.Tensor) or part.shape != parts[0].shape for part in parts):
            raise TypeError("latents is a tensor [layers, sources, hidden], or a list of tensors of one shape.")
        latents = torch.stack(parts)
    if latents.dim() != 3 or len(latents) < len(layers) or latents.shape[2] != model.hidden_size:
        raise ShapeError(
            f"latents has shape {list(latents.shape)}; it must be [layers, sources, hidden], here "
            f"[{len(layers)}, sources, {model.hidden_size}]."
        )
    if len(latents) > len(layers) and layers != list(range(len(layers))):
        warn(
            f"latents has {len(latents)} layers for {len(layers)} to patch. As in nnterp 1.x, the first is written to "
            f"layer {layers[0]}, the next to the next layer asked for, and the rest is not used. To write each layer's "
            "own, pass latents[layers]."
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


def _one_of(layers: Indices, layer_to_patch: Indices) -> Indices:
    if layers is not None and layer_to_patch is not None:
        raise ValueError("layers and layer_to_patch are two names of one argument; give one of them.")
    return layers if layer_to_patch is None else layer_to_patch
