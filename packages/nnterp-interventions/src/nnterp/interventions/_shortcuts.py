"""What a sweep need not compute again in one model: decided by the structure of its cache, then proven by a probe.

A prefix of positions is shared only through transformers' own `DynamicCache` holding plain keys and values of every
layer (a sliding window counts as plain while the prompt is shorter than it). Layers are skipped only where every layer
is softmax attention with keys of its own. Both are then compared with plain forward passes before they are used.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nnterp.devices import input_device
from nnterp.inputs import Row
from nnterp.interventions._edits import Cell, Edit

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PROBE_LENGTH = 12
PROBE_LAYERS = 6
SHORTEST_PROBE = 6
_NAMES = ("prefix", "skip", "readout", "join", "tail", "ragged")
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
_proven: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, Shortcuts]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shortcuts:
    """What may be left out of a cell's run.

    Attributes:
        prefix: Positions before the first edited one come from the key-value cache.
        skip: Layers before the first edited one are skipped.
        readout: The forward pass stops after the last layer, and only what is read is projected on the vocabulary.
        join: Rows that begin at later layers join a running batch there.
        tail: The last feed-forward runs only at the positions that are read.
        ragged: Shorter prompts share a batch with longer ones, filled up on the right, and positions after those that
            are read are left out.
        window: Prompts must be shorter than this for `prefix`.
        reasons: Why something is not taken.
    """

    prefix: bool = False
    skip: bool = False
    readout: bool = False
    join: bool = False
    tail: bool = False
    ragged: bool = False
    window: int | None = None
    reasons: tuple[str, ...] = ()

    def within(self, length: int) -> Shortcuts:
        """What may be taken for prompts of this length."""
        return replace(self, prefix=False) if self.window is not None and length >= self.window else self


def prove(model: StandardizedTransformer) -> Shortcuts:
    """What may be taken for this model, found out once and remembered for as long as its weights are there."""
    module = model._module
    key = (getattr(module.config, "_attn_implementation", None), module.dtype, module.training)
    known = _proven.setdefault(module, {})
    if key not in known:
        known[key] = _prove(model)
    return known[key]


def new_cache(model: StandardizedTransformer) -> DynamicCache:
    """An empty cache as the model would make it."""
    return DynamicCache(config=model._module.config)


def stored(cache: DynamicCache) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of every layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def continued(
    model: StandardizedTransformer,
    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None,
    which: torch.Tensor,
    length: int,
    counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Keywords of a forward pass that goes on after `length` positions of some rows of a cache.

    With `counts`, only so many of the first rows run in each layer; where none does, one passes by.
    """
    assert cache is not None
    copy = new_cache(model)
    one = bool((which == which[0]).all())
    for index, (keys, values) in enumerate(cache):
        own = (which if counts is None else which[: max(1, counts[index])]).to(keys.device)
        if one:  # not copied before the model puts its own keys behind them
            own_keys, own_values = (kept[own[0], :, :length].expand(len(own), -1, -1, -1) for kept in (keys, values))
        else:
            own_keys, own_values = keys[own, :, :length], values[own, :, :length]
        layer = copy.layers[index] if index < len(copy.layers) else None
        if isinstance(layer, DynamicLayer) and type(layer) is DynamicLayer:
            layer.lazy_initialization(own_keys, own_values)
            layer.keys, layer.values = own_keys, own_values
        else:
            copy.update(own_keys, own_values, index)
    return {"past_key_values": copy, "use_cache": True}


def _prove(model: StandardizedTransformer) -> Shortcuts:
    reasons: list[str] = []
    window, plain = _plain_cache(model, reasons)
    length = PROBE_LENGTH if window is None else min(PROBE_LENGTH, window - 1)
    if length < SHORTEST_PROBE:
        plain, length = False, PROBE_LENGTH
        reasons.append(f"its window of {window} positions is too short to try")
    rows = [Row(tuple(ids.tolist())) for ids in _probe_ids(model, 3, length)]
    rows[2] = Row(rows[2].ids[: length - 2])
    cells = _probe_cells(model, length)
    try:
        expected = _logits(model, rows, cells, Shortcuts())
    except Exception as failure:
        return Shortcuts(reasons=(*reasons, f"the probe itself fails: {type(failure).__name__}: {str(failure)[:120]}"))

    def holds(trial: Shortcuts) -> bool:
        if trial.readout and not model.readout.proven:
            return False
        # Two rows a batch, so that every layer that is tried is skipped to; all, so that they join and are filled up.
        for batch_size in (2, len(cells)) if trial.join or trial.ragged else (2,):
            try:
                error = _error(_logits(model, rows, cells, trial, batch_size), expected)
            except Exception as failure:
                reasons.append(f"{_named(trial)}: {type(failure).__name__}: {str(failure)[:120]}")
                return False
            if error > max(1e-4, 8 * torch.finfo(model._module.dtype).eps):
                reasons.append(f"{_named(trial)}: off by {error:.1e}")
                return False
        return True

    padded = model.padding_is_exact
    whole = Shortcuts(plain, plain, True, plain, True, padded)
    if holds(whole):
        return replace(whole, window=window, reasons=tuple(reasons))
    trials = [(plain, plain, True), (plain, False, True), (False, plain, True), (False, False, True)]
    trials += [(plain, plain, False), (plain, False, False), (False, False, False)]
    best = next((t for own in dict.fromkeys(trials) if (t := Shortcuts(*own)) == Shortcuts() or holds(t)), Shortcuts())
    for name in ("ragged", "join", "tail"):
        trial = replace(best, **{name: True})  # type: ignore[arg-type]
        if {"ragged": padded, "join": best.skip, "tail": best.readout}[name] and holds(trial):
            best = trial
    return replace(best, window=window, reasons=tuple(reasons))


def _named(trial: Shortcuts) -> str:
    names = [name for name in _NAMES if getattr(trial, name)]
    return " and ".join(names)


def _plain_cache(model: StandardizedTransformer, reasons: list[str]) -> tuple[int | None, bool]:
    """The shortest sliding window, and whether the cache that the model fills is plain in every layer."""
    kinds = {block.kind for block in model.anatomy.blocks if block.kind != "attention"}
    side = any(block.self_attn is not None and block.self_attn != block.mixer for block in model.anatomy.blocks)
    if kinds or side:
        reasons.append(
            f"layers of kind {', '.join(sorted(kinds)) or 'two mixers'} keep a state that is no key-value cache"
        )
        return None, False
    if "past_key_values" not in inspect.signature(model._module.forward).parameters:
        reasons.append("its forward takes no past_key_values")
        return None, False
    ids = _probe_ids(model, 1, SHORTEST_PROBE).to(input_device(model._module))
    try:
        own = model._module(input_ids=ids, use_cache=True).past_key_values
        cache = new_cache(model)
        model._module(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as failure:
        reasons.append(f"it does not run on a DynamicCache ({type(failure).__name__}: {str(failure)[:80]})")
        return None, False
    for found in (own, cache):
        if type(found) is not DynamicCache:
            reasons.append(f"its cache is a {type(found).__name__}")
            return None, False
        odd = sorted({type(layer).__name__ for layer in found.layers if type(layer) not in _PLAIN})
        if odd:
            reasons.append(f"its cache has layers of type {', '.join(odd)}")
            return None, False
        full = [layer.is_initialized and layer.keys.shape[-2] == SHORTEST_PROBE for layer in found.layers]
        windows = [layer.sliding_window for layer in found.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        if windows and min(windows) <= SHORTEST_PROBE:
            return min(windows), False
        if len(full) != model.num_layers or not all(full):
            reasons.append("not every layer keeps keys and values of its own")
            return None, False
    return (min(windows) if windows else None), True


def _probe_ids(model: StandardizedTransformer, rows: int, length: int) -> torch.Tensor:
    """Random ids of ordinary tokens, the same on every machine."""
    config = model._module.config
    owners = [config, *(c for name in ("text_config", "decoder") if (c := getattr(config, name, None)) is not None)]
    special = {i for i in getattr(model.tokenizer, "all_special_ids", ()) if i is not None}
    for owner in owners:
        settings = owner.to_dict() if hasattr(owner, "to_dict") else {}
        special |= {v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    ordinary = torch.tensor([i for i in range(min(model.vocab_size or 256, 4096)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(11)
    return ordinary[torch.randint(len(ordinary), (rows, length), generator=generator)]


def _probe_cells(model: StandardizedTransformer, length: int) -> list[Cell]:
    """Noise in the residual stream of three prompts, from before the first layer to after the last."""
    count = min(PROBE_LAYERS, model.num_layers)
    layers = sorted({round(k * (model.num_layers - 1) / max(1, count - 1)) for k in range(count)})
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


def _logits(
    model: StandardizedTransformer, rows: list[Row], cells: list[Cell], trial: Shortcuts, batch_size: int = 2
) -> torch.Tensor:
    from nnterp.interventions._sweep import sweep

    def whole(logits: torch.Tensor, _: list[int]) -> dict[str, torch.Tensor]:
        return {"logits": logits}

    return sweep(model, rows, cells, whole, shortcuts=trial, batch_size=batch_size, progress=False)["logits"]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a row; infinite where a number is not finite."""
    scale = expected.norm(dim=-1).clamp(min=1e-30)
    error = ((found - expected).norm(dim=-1) / scale).max().item()
    return error if error == error else float("inf")
