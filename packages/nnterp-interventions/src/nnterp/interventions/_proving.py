"""Which shortcuts of a sweep are exact for a model, found by running probes with and without them.

Sharing a prefix needs a cache that holds plain keys and values of every layer (a sliding window counts as plain while
the prompt is shorter than it). Skipping layers needs, in every layer, softmax attention with keys of its own. Where the
structure allows a shortcut, it is taken in a small sweep and the logits are compared with those of plain runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nnterp.discovery import probe_ids
from nnterp.huggingface import cache_argument, dtype_of
from nnterp.inputs import Row
from nnterp.interventions._engine import Cell, Edit, Shortcuts, new_cache, sweep
from nnterp.proofs import Unfit, What, proven

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PROBE_LENGTH = 12
PROBE_LAYERS = 6
SHORTEST_PROBE = 6
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_SHORTCUTS = What("shortcuts", "which shortcuts of a sweep are exact", (Shortcuts,), "nnterp.interventions")


@torch.no_grad()
def proven_shortcuts(model: StandardizedTransformer, remote: Any = False) -> Shortcuts:
    """The shortcuts that are exact for a model; found once, and kept in `model.proofs` and on disk.

    None for remote runs, and none under edits of nnsight or a steering: a skipped layer would be edited once more.
    """
    if remote or model.standing or model._edits or model.num_encoder_layers or model.runs:
        return Shortcuts()
    model.dispatch()
    module = model._module
    key = ("shortcuts", getattr(module.config, "_attn_implementation", None), dtype_of(module), module.training)
    if key not in model.proofs:
        model.proofs[key] = proven(model, _SHORTCUTS, lambda: _prove(model), restore=_required)
    return model.proofs[key]


def _required(stored: Any) -> Shortcuts:
    if not isinstance(stored, Shortcuts):
        raise Unfit(f"it holds a {type(stored).__name__}")
    return stored


def _prove(model: StandardizedTransformer) -> Shortcuts:
    reasons: list[str] = []
    window, plain = _plain_cache(model, reasons)
    length = PROBE_LENGTH if window is None else min(PROBE_LENGTH, window - 1)
    if length < SHORTEST_PROBE:
        plain, length = False, PROBE_LENGTH
        reasons.append(f"its window of {window} positions is too short to try")
    try:
        trials = _Trials(model, length, reasons)
    except Exception as failure:
        return Shortcuts(reasons=(*reasons, f"the probe itself fails: {_said(failure)}"))
    return replace(trials.best(plain), window=window, reasons=tuple(reasons))


class _Trials:
    """A small sweep, run plainly once, with which sets of shortcuts are compared."""

    def __init__(self, model: StandardizedTransformer, length: int, reasons: list[str]) -> None:
        self.model, self.reasons = model, reasons
        self.prompts = [Row(tuple(ids)) for ids in _probe_ids(model, 3, length).tolist()]
        self.prompts[2] = Row(self.prompts[2].ids[: length - 2])
        self.cells = _probe_cells(model, length)
        self.expected = self.logits(Shortcuts(), 2)

    def best(self, plain: bool) -> Shortcuts:
        """The largest set of shortcuts that holds; `plain` says whether the structure allows prefix and skip."""
        padded = self.model.padding_is_exact
        every = Shortcuts(plain, plain, True, plain, True, padded)
        if self.holds(every):
            return every
        best = next((trial for trial in _fewer(plain) if trial == Shortcuts() or self.holds(trial)), Shortcuts())
        if padded and self.holds(trial := replace(best, ragged=True)):
            best = trial
        if best.skip and self.holds(trial := replace(best, join=True)):
            best = trial
        if best.readout and self.holds(trial := replace(best, tail=True)):
            best = trial
        return best

    def holds(self, trial: Shortcuts) -> bool:
        """Whether the sweep gives the same logits with these shortcuts; if not, the reason is noted."""
        if trial.readout and not self.model.readout.proven:
            return False
        # Batches of two rows, so that every probed layer is skipped to; one batch of all, so that rows join and are
        # filled up.
        for batch_size in (2, len(self.cells)) if trial.join or trial.ragged else (2,):
            try:
                error = _error(self.logits(trial, batch_size), self.expected)
            except Exception as failure:
                self.reasons.append(f"{trial.names}: {_said(failure)}")
                return False
            if error > max(1e-4, 8 * torch.finfo(dtype_of(self.model._module)).eps):
                self.reasons.append(f"{trial.names}: off by {error:.1e}")
                return False
        return True

    def logits(self, trial: Shortcuts, batch_size: int) -> torch.Tensor:
        """Logits of all cells, `[cells, vocab]`."""

        def whole(logits: torch.Tensor, _: list[int]) -> dict[str, torch.Tensor]:
            return {"logits": logits}

        options: dict[str, Any] = {"fall_back": False, "batch_size": batch_size, "progress": False}
        return sweep(self.model, self.prompts, self.cells, whole, trial, **options)["logits"]


def _fewer(plain: bool) -> Iterator[Shortcuts]:
    """Sets of prefix, skip and readout, the ones that save most first, each once."""
    sets = [(plain, plain, True), (plain, False, True), (False, plain, True), (False, False, True)]
    sets += [(plain, plain, False), (plain, False, False), (False, False, False)]
    return (Shortcuts(*own) for own in dict.fromkeys(sets))


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure)[:120]}"


def _plain_cache(model: StandardizedTransformer, reasons: list[str]) -> tuple[int | None, bool]:
    """The shortest sliding window, and whether every layer of the model's cache holds plain keys and values."""
    kinds = {block.kind for block in model.anatomy.blocks if block.kind != "attention"}
    side = any(block.self_attn is not None and block.self_attn != block.mixer for block in model.anatomy.blocks)
    if kinds or side:
        named = ", ".join(sorted(kinds)) or "two mixers"
        reasons.append(f"layers of kind {named} keep a state that is no key-value cache")
        return None, False
    name = cache_argument(model._module)
    if name is None:
        reasons.append("its forward takes no cache")
        return None, False
    ids = _probe_ids(model, 1, SHORTEST_PROBE)
    try:
        own = getattr(model._module(input_ids=ids, use_cache=True), name)
        cache = new_cache(model)
        model._module(input_ids=ids, use_cache=True, **{name: cache})
    except Exception as failure:
        reasons.append(f"it does not run on a DynamicCache ({type(failure).__name__}: {str(failure)[:80]})")
        return None, False
    window = None
    for found in (own, cache):
        window, plain = _plain_layers(found, model.num_layers, reasons)
        if not plain:
            return window, False
    return window, True


def _plain_layers(cache: Any, num_layers: int, reasons: list[str]) -> tuple[int | None, bool]:
    """The same of one cache, filled with a prompt of `SHORTEST_PROBE` tokens."""
    if type(cache) is not DynamicCache:
        reasons.append(f"its cache is a {type(cache).__name__}")
        return None, False
    odd = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in PLAIN_LAYERS})
    if odd:
        reasons.append(f"its cache has layers of type {', '.join(odd)}")
        return None, False
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if windows and min(windows) <= SHORTEST_PROBE:
        return min(windows), False
    full = [layer.is_initialized and layer.keys.shape[-2] == SHORTEST_PROBE for layer in cache.layers]
    if len(full) != num_layers or not all(full):
        reasons.append("not every layer keeps keys and values of its own")
        return None, False
    return (min(windows) if windows else None), True


def _probe_ids(model: StandardizedTransformer, prompts: int, length: int) -> torch.Tensor:
    special = [i for i in getattr(model.tokenizer, "all_special_ids", ()) if i is not None]
    return probe_ids(model._module, model.vocab_size, prompts, length, seed=11, avoid=special)


def _probe_cells(model: StandardizedTransformer, length: int) -> list[Cell]:
    """Noise in the residual stream of three prompts, from before the first layer to after the last."""
    run = [layer for layer in range(model.num_layers) if layer not in model.facts.only_with_image]
    count = min(PROBE_LAYERS, len(run))
    layers = sorted({run[round(k * (len(run) - 1) / max(1, count - 1))] for k in range(count)})
    generator = torch.Generator().manual_seed(12)
    noise = torch.randn(model.hidden_size or 1, generator=generator)

    def disturb(stream: torch.Tensor) -> torch.Tensor:
        scale = stream.float().pow(2).mean().sqrt().to(stream.dtype)
        return stream + scale * noise.to(stream.device, stream.dtype)

    middle = (length // 2,)
    cells = [Cell(0, (Edit("layers_input", 0, middle, disturb),)), Cell(1, ())]
    for prompt, own in ((0, layers), (1, layers[::2]), (2, layers[1::2])):
        cells += [Cell(prompt, (Edit("layers_output", layer, middle, disturb),)) for layer in own]
    return cells


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error over the cells; infinite where a number is not finite."""
    scale = expected.norm(dim=-1).clamp(min=1e-30)
    error = ((found - expected).norm(dim=-1) / scale).max().item()
    return error if error == error else float("inf")
