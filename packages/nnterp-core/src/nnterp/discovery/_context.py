"""What a model does around its layers, measured on a probe: factors on embeddings and logits, further tables.

These are facts that a reader of activations must know, and that no module's name gives away: what enters the first
layer is often not a row of the embedding table, and what a part returns is often not what it adds to the stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnterp.discovery._fitting import fit
from nnterp.discovery._probe import Probe
from nnterp.discovery._quiet import quiet
from nnterp.discovery._recording import Recording
from nnterp.discovery._residual import ResidualStructure
from nnterp.huggingface import input_embedding, text_config
from nnterp.tensors import same
from nnterp.traced import Readout
from nnterp.wording import ranges

_LATER_TOKENS = re.compile(r"mtp|nextn", re.IGNORECASE)
_LATER_LAYERS = re.compile(r"layers\W*\.?(\d+)")


@dataclass(frozen=True)
class ContextFact:
    """One thing that a model does around its layers.

    Attributes:
        name: What it is: "embedding multiplier", "positions", "embedding path", "streams", "residual multiplier",
            "stream multiplier", "logit multiplier", "logit softcap", "per-layer embeddings", "further embeddings" or
            "multi-token prediction".
        text: One sentence.
        number: The factor, cap or count, as measured; None where it is not one number.
        layers: The layers that it is about; empty for a fact of the whole model.
    """

    name: str
    text: str
    number: float | None = None
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def find_context(probe: Probe, residual: Sequence[ResidualStructure], readout: Readout) -> tuple[ContextFact, ...]:
    """The facts of a model whose residual structure and readout are proven; runs the plain module once on the probe."""
    with quiet(probe.module):
        paths = [path for path, _ in probe.module.named_modules() if path]
        recording = probe.record(modules=paths)
    return (
        *_embedding(probe, recording, readout),
        *_tables(probe, recording),
        *_residual(probe, residual),
        *_logits(readout),
        *_later_tokens(probe),
    )


def _embedding(probe: Probe, recording: Recording, readout: Readout) -> Iterator[ContextFact]:
    """How the stream that enters the first layer is made of the rows of the embedding table."""
    table: Any = getattr(input_embedding(probe.module), "weight", None)
    stream, first = recording.given(probe.anatomy.blocks[0].path), recording.call(probe.anatomy.blocks[0].path)
    if table is None or stream is None or first is None or table.device.type == "meta":
        return
    rows = torch.nn.functional.embedding(probe.ids.to(table.device), table).to(stream.device)
    streams, rest = divmod(stream.numel(), rows.numel())
    if streams > 1 and not rest and not readout.layout.extra:
        yield ContextFact("streams", f"the layers carry {streams} residual streams side by side.", streams)
    entering = _as_rows(stream, rows)
    if entering is None:
        yield ContextFact("embedding path", _between(probe, recording, first.began))
        return
    moved = fit(entering[0] - entering[1], [rows[0] - rows[1]], per_channel=False)
    if moved.error > probe.tolerance * 10 or not moved.whole:
        yield ContextFact("embedding path", _between(probe, recording, first.began))
        return
    factor = float(moved.scales[0])
    if abs(factor - 1) > 1e-4:
        root = math.sqrt(rows.shape[-1])
        which = f" (the square root of {rows.shape[-1]})" if abs(factor - root) < 1e-3 * root else ""
        own = probe.anatomy.embed_tokens
        made = None if own is None else recording.made(own)
        inside = made is not None and made.shape == rows.shape and same(made, rows * factor, 10 * probe.tolerance)
        where = "token_embeddings has the factor" if inside else "token_embeddings is before the factor"
        text = f"what enters the first layer is {factor:.6g}{which} times a row of the embedding table; {where}."
        yield ContextFact("embedding multiplier", text, factor)
    if not same(entering, rows * factor, 10 * probe.tolerance):
        yield ContextFact(
            "positions", "a vector of the position alone is added to the embedding before the first layer."
        )


def _as_rows(stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """What enters the first layer as `[batch, seq, hidden]`: of several equal streams the first; None if it is none."""
    batch, seq, width = rows.shape
    if stream.shape == (batch * seq, width):
        return stream.view(rows.shape)
    if stream.shape == (seq, batch, width):
        return stream.transpose(0, 1)
    if stream.shape == rows.shape:
        return stream
    if stream.dim() == 4 and stream.shape[-1] == width and stream.numel() % rows.numel() == 0:
        axis = 0 if stream.shape[1:] == rows.shape else 2
        return stream.select(axis, 0) if stream.select(axis, 0).shape == rows.shape else None
    return None


def _between(probe: Probe, recording: Recording, began: int) -> str:
    """The modules that run between the embedding and the first layer, in words."""
    own = probe.anatomy.embed_tokens
    embedded = None if own is None else recording.call(own)
    since = 0 if embedded is None else embedded.ended
    tokens = probe.ids.numel()
    paths = [
        path
        for path, (call, *_) in recording.calls.items()
        if since < call.began and call.ended and call.ended < began and call.stream_out is not None
        if call.stream_out.is_floating_point() and call.stream_out.numel() >= tokens * 8
        if "rotary" not in path
    ]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    how = f"rows pass through {', '.join(outer)} first" if outer else "the model's own code changes it first"
    return f"what enters the first layer is no multiple of a row of the embedding table: {how}."


def _tables(probe: Probe, recording: Recording) -> Iterator[ContextFact]:
    """Tables that the tokens index beside the embedding."""
    layers, own = probe.anatomy.num_layers, input_embedding(probe.module)
    for path, (call, *_) in recording.calls.items():
        module: Any = probe.module.get_submodule(path)
        table, made = getattr(module, "weight", None), call.stream_out
        if module is own or not isinstance(module, torch.nn.Embedding) or table is None or made is None:
            continue
        looked_up = made.shape[:-1] == probe.ids.shape and table.dim() == 2 and int(probe.ids.max()) < len(table)
        if not looked_up or made.shape[-1] != table.shape[-1] or table.device.type == "meta":
            continue
        rows = torch.nn.functional.embedding(probe.ids.to(table.device), table).to(made)
        if fit(made, [rows], per_channel=False).error > 10 * probe.tolerance:  # indexed by something else
            continue
        width = made.numel() // probe.ids.numel()
        if (
            width % layers == 0
            and width // layers < width
            and not any(path.startswith(b.path) for b in probe.anatomy.blocks)
        ):
            each = width // layers
            text = f"{path} gives every token {each} numbers for each of the {layers} layers, beside the stream."
            yield ContextFact("per-layer embeddings", text, width // layers)
        else:
            yield ContextFact(
                "further embeddings", f"{path} gives every token {width} numbers beside its embedding.", width
            )


def _residual(probe: Probe, residual: Sequence[ResidualStructure]) -> Iterator[ContextFact]:
    """Factors on what the parts of the layers return, and on the stream itself."""
    found: dict[str, dict[int, float | None]] = {}
    for layer, structure in zip(probe.anatomy.blocks, residual, strict=False):
        parts = [part for part in (structure.mixer, structure.mlp, structure.other) if part is not None]
        addends = [(term.path.removeprefix(f"{layer.path}."), term.scale) for part in parts for term in part.terms]
        streams = [("", structure.stream_scale)] if structure.kind != "unknown" else []
        for path, scale in (*addends, *streams):
            factor = None if isinstance(scale, torch.Tensor) else round(scale, 5)
            if factor != 1.0:
                found.setdefault(path, {})[layer.index] = factor
    for path, factors in found.items():
        different = list(dict.fromkeys(factors.values()))
        by = ", ".join("one factor per channel" if factor is None else f"{factor:.6g}" for factor in different)
        where = f"layers {ranges(tuple(factors))}" + (f" (of {len(different)} factors)" if len(different) > 1 else "")
        number = different[0] if len(different) == 1 else None
        if path:
            name, text = "residual multiplier", f"{where} add {by} times the output of {path} to the stream."
        else:
            name, text = "stream multiplier", f"{where} multiply the stream that enters them by {by}."
        yield ContextFact(name, text, number, tuple(factors))


def _logits(readout: Readout) -> Iterator[ContextFact]:
    """What the certificate proved of the way from the head to the logits."""
    if readout.way != "chain":
        return
    if readout.chain.scale != 1.0:
        text = f"the logits are {readout.chain.scale:.6g} times what the head returns."
        yield ContextFact("logit multiplier", text, readout.chain.scale)
    if readout.chain.softcap is not None:
        cap = readout.chain.softcap
        yield ContextFact("logit softcap", f"the logits are {cap:g} · tanh(logits / {cap:g}).", cap)


def _later_tokens(probe: Probe) -> Iterator[ContextFact]:
    """Heads that predict later tokens: built and unused, declared, or in checkpoints and left out when they load."""
    module, layers = probe.module, probe.anatomy.num_layers
    built = [path for path, _ in module.named_modules() if _LATER_TOKENS.search(path.rpartition(".")[2])]
    config = text_config(module.config)
    declared = {
        name: value
        for name, value in vars(config).items()
        if _LATER_TOKENS.search(name) and type(value) is int and value > 0
    }
    left_out = [
        str(pattern)
        for owner in type(module).__mro__
        for pattern in vars(owner).get("_keys_to_ignore_on_load_unexpected") or ()
    ]
    patterns = [
        p for p in dict.fromkeys(left_out) if _LATER_TOKENS.search(p) or _LATER_LAYERS.search(p.replace("\\", ""))
    ]
    if built:
        text = f"{', '.join(built[:3])} predict tokens after the next one; they are not part of the layers."
        yield ContextFact("multi-token prediction", text, len(built))
    elif declared or patterns:
        said = [f"{name}={value}" for name, value in declared.items()] + [f"weights called {p}" for p in patterns]
        text = (
            f"its checkpoints may hold heads that predict tokens after the next one ({', '.join(said)}); transformers "
            f"does not build them, so this model has its {layers} layers alone."
        )
        yield ContextFact("multi-token prediction", text, next(iter(declared.values()), None))
