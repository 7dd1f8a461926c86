"""Patchscopes that generate: the model continues a prompt into which a hidden state is written."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.deprecation import renamed
from nnterp.generation import check_generation, refuse_misspelt, sequences_of, settings_of_generate
from nnterp.indices import Indices, integer
from nnterp.inputs import Row, encode, pad
from nnterp.interventions._engine import Edit, Passing
from nnterp.interventions._fitted import Lens
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import bar, within_memory
from nnterp.interventions._states import last_states
from nnterp.interventions._targets import TargetPrompt
from nnterp.interventions._through import require_lens, source_layers, written_states
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.positions import resolve
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@renamed(removed_in="3.0", prompts="source_prompts", max_length="max_new_tokens", max_batch_size="batch_size")
@takes_nnsight_models
@plain_defaults()
@torch.no_grad()
def patchscope_generate(
    model: StandardizedTransformer,
    source_prompts: Any,
    target_patch_prompt: TargetPrompt,
    max_new_tokens: int = 50,
    layers: Indices = None,
    remote: bool = False,
    batch_size: int = 32,
    *,
    lens: Lens | None = None,
    progress: bool | None = None,
    resume: Resume = None,
    **generation: Any,
) -> dict[int, torch.Tensor]:
    """Generate from a target prompt in which one hidden state is replaced by a source prompt's.

    Args:
        model: The model.
        source_prompts: A text or a list. The names of 1.x, `prompts=`, `max_length=` and `max_batch_size=`, work with a
            warning.
        target_patch_prompt: The prompt that is continued, and the position to patch in it.
        max_new_tokens: The most new tokens to generate.
        layers: The layer or layers to patch, each once; all if None.
        remote: Run on a remote service.
        batch_size: Rows of a batch; there is one row for each source and layer.
        lens: A fitted lens, as in `patchscope_lens`: the state of each of `layers` goes through its map, and is written
            to the layer that the map leads to. With it, `layers` are those that it has a map for if None. With a lens
            to the last layer, the target prompt has to be patched at its last token: the first new token is then what
            `logit_lens(lens=lens)` reads, and the later ones are continued from the prompt's own states.
        progress: Show a progress bar; with None, only if the work lasts.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.
        **generation: Passed to HuggingFace's `generate`.

    Returns:
        For each of `layers`, the token ids of the target prompt and of what was generated, int64 `[sources, length]`,
        on the CPU, padded on the right where a row ended before others.

    Raises:
        ValueError: The lens is of another model, or leads to the last layer while an earlier token is patched; or
            a decoder's start token is another in the model's config than in its generation config.
        KeyError: The lens has no map for a layer.
        TypeError: `lens` is no lens.
        IndexError: There is no such layer, or the target prompt has no such position.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: -1 where its
        `done` is False.

    Example:
        ids = patchscope_generate(model, "Once I lived in France", repeat_prompt(), max_new_tokens=3, layers=0)[0]
        print(model.tokenizer.decode(ids[0]))
    """
    model.require_no_trace("patchscope_generate()")
    if not isinstance(target_patch_prompt, TargetPrompt):
        raise TypeError(
            f"target_patch_prompt is a TargetPrompt(text, index_to_patch), not {target_patch_prompt!r:.80}."
        )
    if integer(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    refuse_misspelt(generation, patchscope_generate, known=settings_of_generate())
    check_generation(max_new_tokens, generation)
    chosen, sources = list(dict.fromkeys(source_layers(model, layers, lens))), encode(model, source_prompts)
    (target,) = encode(model, target_patch_prompt.prompt)
    at = resolve(model, target, int(target_patch_prompt.index_to_patch), "the target prompt")
    require_lens(model, lens, chosen, [target], [at], remote)
    given = {name: value for name, value in generation.items() if not callable(value)}
    asked = {"prompts": ids_of(sources, [target]), "position": at, "layers": chosen, "max_new_tokens": max_new_tokens}
    asked |= {} if lens is None else {"lens": lens}
    call = Call(model, "patchscope_generate", {**asked, "generation": given})
    earlier = resumed(call, resume)
    states = last_states(model, sources, chosen, "layers_output", remote, "auto", False)
    latents, written_to = written_states(lens, states, chosen)
    cells = [(k, source) for k in range(len(chosen)) for source in range(len(sources))]
    made = {} if earlier is None else _made(earlier)
    finished = frozenset(made)
    limit, start = batch_size, 0

    def step(some: list[tuple[int, int]]) -> None:
        edits: dict[int, list[tuple[int, Edit]]] = {}
        for row, (k, source) in enumerate(some):
            edit = Edit("layers_output", written_to[k], at, latents[k, source])
            edits.setdefault(written_to[k], []).append((row, edit))
        written = _generate(model, target, len(some), edits, {"max_new_tokens": max_new_tokens, **generation}, remote)
        made.update({cell: row.cpu() for cell, row in zip(some, written, strict=True)})

    with (
        bar(len(cells), "patchscope", progress) as shown,
        call.keeping(lambda: _partial(model, call, made, prompt_labels(sources, model), chosen) if made else None),
    ):
        while start < len(cells):
            some = cells[start : start + limit]
            if not finished.issuperset(some) and not within_memory(partial(step, some), len(some)):
                limit = max(1, len(some) // 2)
                continue
            start += len(some)
            shown.update(len(some))
    filler = getattr(model.tokenizer, "pad_token_id", None) or 0
    return {
        layer: torch.nn.utils.rnn.pad_sequence([made[k, s] for s in range(len(sources))], True, filler)
        for k, layer in enumerate(chosen)
    }


def _partial(
    model: StandardizedTransformer,
    call: Call,
    made: dict[tuple[int, int], torch.Tensor],
    prompts: tuple[str, ...],
    layers: list[int],
) -> Result | None:
    """What is generated so far, `tokens` `[layers, prompts, tokens]`, -1 after the end of each row."""
    longest = max(len(row) for row in made.values())
    tokens = torch.full((len(layers), len(prompts), longest), -1)
    done = torch.zeros(len(layers), len(prompts), dtype=torch.bool)
    for cell, row in made.items():
        tokens[cell][: len(row)], done[cell] = row, True
    labels = {"layers": tuple(layers), "prompts": prompts, "tokens": tuple(range(longest))}
    whole = Result(
        {"tokens": tokens},
        {"tokens": ("layers", "prompts", "tokens")},
        labels,
        about=describe_run(model, call.function),
    )
    return unfinished(call, lambda: whole, done, ("layers", "prompts"))


def _made(earlier: Result) -> dict[tuple[int, int], torch.Tensor]:
    """The rows that an earlier call had generated, by layer and source."""
    cells = [(k, s) for k, s in earlier[DONE].nonzero().tolist()]
    return {cell: earlier["tokens"][cell][earlier["tokens"][cell] >= 0] for cell in cells}


def _generate(
    model: StandardizedTransformer,
    target: Row,
    rows: int,
    edits: dict[int, list[tuple[int, Edit]]],
    generation: dict[str, Any],
    remote: bool,
) -> torch.Tensor:
    """Generate from `rows` copies of the target, with edits (pairs of row and edit) by layer: `[rows, length]`."""
    ids, size = torch.tensor([target.ids] * rows), (rows, len(target))
    encoding = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if target.encoder is not None:  # the ids are the decoder's
        encoding = pad(model, [target] * rows).encoding
    with model.generate(encoding, remote=remote, **generation) as tracer:
        for layer in sorted(edits):
            Passing(model).write(("layers_output", layer), edits[layer], size, 0)
        written = tracer.result.save()
    sequences = sequences_of(written)
    if target.encoder is not None and not torch.equal(sequences[:, : len(target)].cpu(), ids):
        begun = sequences[0, : len(target) + 1].tolist()
        raise ValueError(
            f"The target prompt's decoder ids are {list(target.ids)}, and generate() begins with {begun}: it puts the "
            "generation config's decoder_start_token_id before them, so that positions count otherwise. Give the "
            "model's config the same one."
        )
    return sequences
