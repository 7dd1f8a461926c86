"""Drift: how far a model's values are from those of the same weights in float32, or of another model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nnterp.certificate import Drift, DriftLine, certify
from nnterp.collection import collect
from nnterp.huggingface import dtype_of
from nnterp.inputs import Row, as_given, encode
from nnterp.memory import require_memory
from nnterp.named_transformer import NamedTransformer
from nnterp.standing import unsteered
from nnterp.table import VALUES
from nnterp.tensors import error_at_positions
from nnterp.values import Support, support

BYTES = 1 << 28  # values of each model that are held at a time
MASKED = -3e4  # attention scores below this are masked; the number put there depends on the dtype
TEXTS = (
    "The Eiffel Tower stands in the city of Paris, and it was built for the world's fair of 1889.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "Water boils at 100 degrees Celsius at sea level, and at less on a mountain.",
    "In the year 1492 three ships sailed west across the Atlantic Ocean.",
    "She opened the letter, read it twice, and put it back without a word.",
    "1, 2, 4, 8, 16, 32, 64, 128, 256",
    "Sehr geehrte Damen und Herren, vielen Dank für Ihre Nachricht.",
)


def drift_of(model: NamedTransformer, against: Any, prompts: Any = None) -> Drift:
    """Measure the drift of a proven model; see `StandardizedTransformer.validate`.

    Args:
        model: The model.
        against: "float32", or another proven model of the same depth and vocabulary, with its weights loaded.
        prompts: As `collect` takes them; `TEXTS` if None.

    Returns:
        The drift of every value that both models have, at every layer, and of the logits. Both models run without
        steering.

    Raises:
        ValueError: `against` is neither, or the model cannot be cast to float32 (quantised, offloaded, edited, or in
            float32 already); says why, and what to do.
        MemoryError: The weights in float32 do not fit; says how much is needed.
        CertificateError: The copy in float32 fails its proof.

    Example:
        >>> drift_of(model, "float32").worst("layers_output").layer
    """
    rows = encode(model, list(TEXTS) if prompts is None else prompts)
    with unsteered(model):
        reference, name = _reference(model, against)
    with unsteered(model), unsteered(reference):
        mine, its = support(model), support(reference)
        left_out: dict[str, str] = {}
        lines = [
            _line(value, layer, a, b)
            for value in VALUES
            if (layers := _shared(value, mine, its, left_out))
            for layer, a, b in _pairs(model, reference, rows, value, layers)
        ]
        found = [pair for _, *pair in _pairs(model, reference, rows, "logits", [-1])]
    (logits, expected), same, divergence = found[0], 0, 0.0
    for a, b in zip(logits, expected, strict=True):
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
        divergence += float((b.exp() * (b - a)).sum())
    positions = sum(len(row) for row in rows)
    lines.append(_line("logits", -1, logits, expected))
    return Drift(name, len(rows), positions, tuple(lines), same / positions, divergence / positions, left_out)


# -- the model that it is compared with --------------------------------------------------------------------------------


def _reference(model: NamedTransformer, against: Any) -> tuple[NamedTransformer, str]:
    if not model.dispatched:
        raise ValueError("validate(against=...) compares numbers, and the weights are not loaded: call dispatch().")
    if isinstance(against, str) and against == "float32":
        return _in_float32(model), "the same weights in float32"
    if not isinstance(against, NamedTransformer):
        raise ValueError(f"against is 'float32' or a StandardizedTransformer, not {against!r:.80}.")
    if not against.dispatched or against.facts.proof != "weights":
        raise ValueError("The model given as against is not proven: load its weights and call its validate() first.")
    for what in ("num_layers", "vocab_size", "hidden_size", "num_heads", "intermediate_size"):
        if getattr(model, what) != getattr(against, what):
            raise ValueError(
                f"The model given as against has {what} {getattr(against, what)}, and this one has "
                f"{getattr(model, what)}: give the same model in another precision."
            )
    return against, f"{against.repo_id or against.model_class} ({_dtype(against._module)})"


def _in_float32(model: NamedTransformer) -> NamedTransformer:
    """A proven copy of a model with the same weights in float32, on the same devices."""
    module = model._module
    instead = "load the model that is to be compared with in its own precision, and pass it as against=."
    if reason := _cannot_be_cast(model):
        raise ValueError(f"{model.model_class} cannot be cast to float32: {reason}; {instead}")
    needed: Counter[torch.device] = Counter()
    for tensor in _tensors(module):
        needed[tensor.device] += tensor.numel() * (4 + tensor.element_size())
    for device, size in needed.items():
        require_memory(size, device, "A copy of the weights in float32", f"Instead, {instead}")
    module = copy.deepcopy(module).float()
    for inner in module.modules():
        config: Any = getattr(inner, "config", None)
        if hasattr(config, "dtype"):
            config.dtype = torch.float32
    reference = NamedTransformer(
        module, model.rename_config, tokenizer=copy.deepcopy(model.tokenizer), task="text-generation"
    )
    certificate, facts = certify(reference)
    certificate.raise_if_failed()
    reference.adopt(facts)
    return reference


def _cannot_be_cast(model: NamedTransformer) -> str:
    module = model._module
    if getattr(module, "hf_quantizer", None) is not None or hasattr(module.config, "quantization_config"):
        return "its weights are quantised"
    if model._edits:
        return "it is edited, and its copy would not be"
    for tensor in _tensors(module):
        if tensor.device.type == "meta":
            return "some of its weights are offloaded"
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"some of its weights are a {type(tensor).__name__}"
    if all(tensor.dtype.itemsize >= 4 for tensor in module.parameters() if tensor.is_floating_point()):
        return f"it computes in {_dtype(module)} already"
    return ""


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _dtype(module: nn.Module) -> str:
    return str(dtype_of(module)).removeprefix("torch.")


# -- comparing ---------------------------------------------------------------------------------------------------------


_BY_CHOICE = "it stands in the order of router_choices, which may differ; mlps_output is compared"
_NOT_COMPARED = {
    "mixer_states": "it belongs to a run with a cache",
    "features": "it is attached",
    "expert_weights": _BY_CHOICE,
    "expert_outputs": _BY_CHOICE,
    "expert_contributions": "it holds every expert for every token; mlps_output is compared",
}


def _shared(value: str, mine: Support, its: Support, left_out: dict[str, str]) -> list[int]:
    """The layers at which both models have a value. If only one of them has it, the reason is put into `left_out`."""
    if value in _NOT_COMPARED:
        if mine[value]:
            left_out[value] = _NOT_COMPARED[value]
        return []
    if VALUES[value].stack == "vision":
        if mine[value]:
            left_out[value] = "it has no positions of a prompt"
        return []
    layers = [layer for layer in mine[value] if layer in its[value]]
    if not layers and (mine[value] or its[value]):
        left_out[value] = "only one of the two models has it"
    return layers


def _pairs(
    model: NamedTransformer, reference: NamedTransformer, rows: list[Row], value: str, layers: list[int]
) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
    """For each layer: the layer, and the value there in both models, one tensor `[positions, ...]` for each prompt.

    One pass reads as many layers as fit in `BYTES`.
    """
    left, at_once = list(layers), 1
    while left:
        now, left = left[:at_once], left[at_once:]
        found = [_read(one, rows, value, now) for one in (model, reference)]
        for i, layer in enumerate(now):
            yield layer, found[0][i], found[1][i]
        size = sum(tensor.numel() * tensor.element_size() for tensor in found[1][0])
        at_once = max(1, BYTES // max(1, size))


def _read(model: NamedTransformer, rows: list[Row], value: str, layers: list[int]) -> list[list[torch.Tensor]]:
    """For each layer (−1: the value is not per layer), the value of each prompt, `[positions, ...]`."""
    chosen = None if layers == [-1] else layers
    collected = collect(model, [as_given(model, row) for row in rows], value, layers=chosen, progress=False)
    pattern = value in VALUES and VALUES[value].is_pattern
    read = []
    if value in VALUES and VALUES[value].of_encoder:
        rows = [row.encoder for row in rows if row.encoder is not None]
    for layer in layers:
        whole = collected[value] if chosen is None else collected[value, layer]
        if pattern:
            whole = whole.transpose(1, 2)  # [prompts, queries, heads, keys]
        read.append([mine[: len(row)] for mine, row in zip(whole, rows, strict=True)])
    return read


def _line(value: str, layer: int, mine: list[torch.Tensor], its: list[torch.Tensor]) -> DriftLine:
    own = None if layer == -1 else layer
    if value == "router_choices":
        errors = torch.cat([_differing(a, b) for a, b in zip(mine, its, strict=True)])
    else:
        a, b = (torch.cat([one.double().flatten(1) for one in prompts]) for prompts in (mine, its))
        if value == "attention_scores":
            hidden = (a < MASKED) & (b < MASKED)
            a, b = a.masked_fill(hidden, 0), b.masked_fill(hidden, 0)
        errors = error_at_positions(a, b)
    return DriftLine(value, own, float(errors.mean()), float(errors.max()))


def _differing(mine: torch.Tensor, its: torch.Tensor) -> torch.Tensor:
    """At each position, the share of the chosen experts that differ, `[positions]`."""
    common = (mine.unsqueeze(-1) == its.unsqueeze(-2)).any(-1).double().mean(-1)
    return 1 - common.flatten(1).mean(-1) if common.dim() > 1 else 1 - common
