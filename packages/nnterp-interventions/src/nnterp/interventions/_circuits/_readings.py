"""What is read of a run: the streams that inputs read, what every node writes, and the graph of gradients between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp.errors import Unavailable
from nnterp.inputs import forward_flags
from nnterp.interventions._attribution import accumulated, head_shares
from nnterp.interventions._circuits._graph import HEAD_INPUTS, Block, Graph
from nnterp.interventions._engine import Key, rows_of
from nnterp.traced import Place
from nnterp.values import Site, get_label, gradient_reads, reads, when

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass
class Reading:
    """Values of one run of a batch of prompts of equal length.

    Attributes:
        model: The model.
        size: Rows and positions of the batch.
        tensors: The model's own tensors, by place.
        logits: At the last position, `[rows, vocab]`, float32.
        embeddings: The token embeddings, as the model has them.
        projections: Paths of the modules whose inputs and outputs are among the tensors.
    """

    model: StandardizedTransformer
    size: tuple[int, int]
    tensors: dict[Place, torch.Tensor]
    logits: torch.Tensor
    embeddings: torch.Tensor
    projections: tuple[str, ...] = ()
    shown: dict[Key, torch.Tensor] = field(default_factory=dict)

    def value(self, name: str, layer: int) -> torch.Tensor:
        """A value, `[rows, seq, ...]`."""
        key = (name, layer)
        if key not in self.shown:
            places, combine = reads(self.model, self.model.place(name, layer))
            made = combine([self.tensors[place] for place in places])
            self.shown[key] = rows_of(made, *self.size, get_label(name))
        return self.shown[key]

    def roots(self, name: str, layer: int) -> list[torch.Tensor]:
        """The model's own tensors with respect to which the gradient of a value is taken."""
        places, _ = gradient_reads(self.model, self.model.place(name, layer), f"{name}[{layer}]")
        return [self.tensors[place] for place in places]

    def slope(self, name: str, layer: int, slopes: Sequence[torch.Tensor]) -> torch.Tensor:
        """The gradient of a value, `[rows, seq, ...]`, from those of its `roots`."""
        _, combine = gradient_reads(self.model, self.model.place(name, layer), f"{name}[{layer}]")
        return rows_of(combine(list(slopes)), *self.size, get_label(name))


def keys_of(blocks: Sequence[Block], head_inputs: bool) -> list[Key]:
    """The values of a run that are read.

    Args:
        blocks: The layers.
        head_inputs: Whether queries, keys and values are among them.
    """
    keys: list[Key] = []
    for block in blocks:
        names = ["layers_input"]
        if block.heads:
            names += [*HEAD_INPUTS.values()] if head_inputs else []
            names += ["attention_head_outputs", "attention_contributions"]
        names += ["mixer_contributions"] * block.mixer
        names += ["layers_mid"] * (block.mlp == "mid") + ["mlp_contributions"] * bool(block.mlp)
        keys += [(name, block.layer) for name in names]
    return [*keys, ("layers_output", blocks[-1].layer)]


def read_run(
    model: StandardizedTransformer,
    blocks: Sequence[Block],
    ids: torch.Tensor,
    embeddings: torch.Tensor | None = None,
    gradients: bool = False,
    projections: Sequence[str] = (),
) -> Reading:
    """Run prompts of equal length and read what the graph needs.

    Args:
        model: The model.
        blocks: Its layers.
        ids: `[rows, seq]`.
        embeddings: Token embeddings to write, `[rows, seq, hidden]`; None to leave them as they are.
        gradients: Whether a graph of gradients is kept; it begins at the token embeddings.
        projections: Paths of modules whose inputs and outputs are read too; those that do not run are left out.
    """
    keys = keys_of(blocks, gradients)
    sources = [reads(model, model.place(*key))[0] for key in keys]
    roots: set[Place] = set()
    if gradients:
        for name, layer in _differentiated(keys):
            sources.append(gradient_reads(model, model.place(name, layer), f"{name}[{layer}]")[0])
            roots.update(sources[-1])
    projections = tuple(path for path in projections if _runs(model, path))
    sources.append([Site(path, side) for path in projections for side in ("input", "output")])
    roots.update(sources[-1])
    try:
        order = sorted({place for some in sources for place in some}, key=lambda place: when(model, place))
    except (KeyError, TypeError) as error:
        raise Unavailable(f"{model.model_class}: in which order its values are computed is not known.") from error
    names, inputs = [str(place) for place in order], {"input_ids": ids, **forward_flags(model)}
    begin, label, readout = model.place("token_embeddings"), "token_embeddings", model.readout.proven
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), model.trace(inputs) as tracer:
        start = begin.read(model, label)
        own = start.detach().clone().save()
        if gradients or embeddings is not None:
            given = start if embeddings is None else embeddings.to(start).view(start.shape)
            # A copy, because a model may edit it in place.
            begin.write(model, given.detach().requires_grad_(gradients).clone(), label)
        seen: list[Any] = []
        for place, name in zip(order, names, strict=True):
            tensor = place.read(model, name)
            if gradients and not tensor.requires_grad:
                tensor.requires_grad_(True)
            seen.append(tensor if place in roots else tensor.clone())  # a model may add to it in place (Falcon)
        nnsight.save(seen)
        if readout:
            tracer.stop()
        else:
            logits = model.logits[:, -1].float().save()
    reading = Reading(model, (ids.shape[0], ids.shape[1]), dict(zip(order, seen, strict=True)), own, own, projections)
    if readout:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            logits = model.project_on_vocab(reading.value("layers_output", blocks[-1].layer)[:, -1]).float()
    reading.logits = logits
    return reading


def _runs(model: StandardizedTransformer, path: str) -> bool:
    """Whether it is known when a module runs."""
    try:
        return all(when(model, Site(path, side)) is not None for side in ("input", "output"))
    except (KeyError, TypeError):
        return False


def _differentiated(keys: Sequence[Key]) -> list[Key]:
    """The values whose gradients are taken."""
    own = {"layers_input", "layers_mid", "layers_output", *HEAD_INPUTS.values()}
    return [key for key in keys if key[0] in own]


@torch.no_grad()
def written(graph: Graph, reading: Reading) -> torch.Tensor:
    """What each node writes in a run, `[writers, rows, seq, hidden]`, float32 (float64 in a float64 model).

    Raises:
        Unavailable: The heads' shares do not add up to what an attention adds.
    """
    parts = [reading.value("layers_input", graph.blocks[0].layer).detach()[None]]
    for block in graph.blocks:
        parts += written_by(graph, block, reading)
    device = parts[0].device
    return torch.cat([accumulated(part).to(device) for part in parts])


@torch.no_grad()
def changes_of(graph: Graph, source: Reading, into: Reading) -> torch.Tensor:
    """What each node writes in one run less what it writes in another, `[rows, writers, seq, hidden]`, as `written`.

    Raises:
        Unavailable: The heads' shares do not add up to what an attention adds.
    """
    first = [accumulated(own.value("layers_input", graph.blocks[0].layer).detach()) for own in (source, into)]
    found = first[0].new_empty(len(first[0]), len(graph.writers), *first[0].shape[1:])
    found[:, 0] = first[0] - first[1]
    start = 1
    for block in graph.blocks:
        for theirs, own in zip(written_by(graph, block, source), written_by(graph, block, into), strict=True):
            found[:, start : start + len(own)] = (accumulated(theirs) - accumulated(own)).movedim(0, 1)
            start += len(own)
    return found


def written_by(graph: Graph, block: Block, reading: Reading) -> list[torch.Tensor]:
    """What the nodes of one layer write, in the order of the graph's writers, `[nodes, rows, seq, hidden]` each."""
    parts = []
    if block.heads:
        heads, whole = (reading.value(n, block.layer) for n in ("attention_head_outputs", "attention_contributions"))
        parts += attention_parts(reading.model, block, heads, whole)
    for here, name in ((block.mixer, "mixer_contributions"), (bool(block.mlp), "mlp_contributions")):
        if here:
            parts.append(reading.value(name, block.layer).detach()[None])
    return parts


def attention_parts(
    model: StandardizedTransformer, block: Block, heads: torch.Tensor, whole: torch.Tensor
) -> list[torch.Tensor]:
    """What each head writes, and what the bias does where that is a node: `[nodes, rows, seq, hidden]` each."""
    shares, rest = head_shares(model, block.layer, heads.detach().contiguous(), whole.detach())
    return [shares.movedim(2, 0), *([rest[None]] if block.bias else [])]


def stream_of(reading: Reading, block: Block, role: str) -> torch.Tensor:
    """The stream that inputs of a role read in one layer, `[rows, seq, hidden]`."""
    if role == "logits":
        return reading.value("layers_output", block.layer)
    return reading.value("layers_mid" if role == "mlp" and block.mlp == "mid" else "layers_input", block.layer)
