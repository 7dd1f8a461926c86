"""A model's graph, proven on a probe before anything is said of its edges."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nnterp.discovery import probe_ids
from nnterp.errors import Unavailable
from nnterp.huggingface import dtype_of
from nnterp.interventions._attribution import accumulated, head_shares, tolerance
from nnterp.interventions._circuits._edge_runs import EdgeRuns
from nnterp.interventions._circuits._graph import Block, Graph, blocks_of, graph_from
from nnterp.interventions._circuits._projections import columns_of, matrix_of, projections_of
from nnterp.interventions._circuits._readings import Reading, read_run, stream_of, written
from nnterp.interventions._circuits._slopes import Slopes, feeds_of, require_whole
from nnterp.interventions._running import weights_at_rest

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_LENGTH = 6


def graph_of(model: StandardizedTransformer, what: str) -> Graph:
    """The graph of a model; proven once, and kept in `model.proofs`.

    Two random prompts are run: what nodes write adds up to the stream that each input reads; the gradients through all
    inputs of a layer add up to the gradient of the stream that enters it; with all edges kept, a run is the prompt's
    own, and with none, the other prompt's.

    Args:
        model: The model.
        what: The function that needs it, for errors.

    Raises:
        Unavailable: One of these does not hold, or the model is steered or edited; says why.
    """
    model.prepare()
    if model.standing or model._edits:
        raise Unavailable(
            f"{what} is not served while the model is steered or edited: the stream is then no sum of what its parts "
            "add. Call it outside of `with model.steering(...)`."
        )
    module = model._module
    key = ("circuit graph", getattr(module.config, "_attn_implementation", None), dtype_of(module))
    if key not in model.proofs:
        with torch.inference_mode(False), torch.enable_grad(), weights_at_rest(module):
            model.proofs[key] = _prove(model, what)
    graph: Graph = model.proofs[key]
    if any(matrix_of(model, path) is None for path in graph.projections):  # hooked or replaced since
        return replace(graph, columns={})
    return graph


def _prove(model: StandardizedTransformer, what: str) -> Graph:
    special = [i for i in getattr(model.tokenizer, "all_special_ids", ()) if i is not None]
    ids = probe_ids(model._module, model.vocab_size, 2, _LENGTH, seed=21, avoid=special).cpu()
    blocks = blocks_of(model, what)
    projections = [path for block in blocks for path in projections_of(model, block)]
    reading = read_run(model, blocks, ids, gradients=True, projections=projections)
    feeds = feeds_of([(block.layer, block.heads) for block in blocks if block.heads], reading)
    graph = graph_from(model, tuple(_with_bias(model, block, reading) for block in blocks), feeds)
    generator = torch.Generator().manual_seed(22)
    direction = torch.randn(reading.logits.shape[-1], generator=generator).to(reading.logits)
    score = (reading.logits @ direction).sum()
    slopes, worst = Slopes(graph, reading, score).by_input()
    require_whole(model, worst, 5 * tolerance(model), what)
    check_streams(graph, reading, written(graph, reading), what)
    _check_ends(model, graph, ids, what)
    return _with_columns(graph, reading, score, slopes)


def _with_columns(graph: Graph, reading: Reading, score: torch.Tensor, slopes: torch.Tensor) -> Graph:
    """The graph with the columns of projections that give the gradients that autograd gives, `slopes`."""
    short = replace(graph, columns=columns_of(graph, reading))
    if not short.columns:
        return graph
    found, _ = Slopes(short, reading, score).by_input()
    error, size = (t.flatten(2).norm(dim=2).amax(0) for t in (found - slopes, slopes))
    wrong = set()
    for block in graph.blocks:
        own = [i for i in short.columns if graph.inputs[i].layer == block.layer]
        if own and not bool((error[own] <= tolerance(reading.model) * (size[own] + 1e-3 * size[own].max())).all()):
            wrong.add(block.layer)
    return replace(graph, columns={i: c for i, c in short.columns.items() if graph.inputs[i].layer not in wrong})


def _with_bias(model: StandardizedTransformer, block: Block, reading: Reading) -> Block:
    """The block, with the bias of its attention as a node if what it adds is not the same at all positions."""
    if not block.heads:
        return block
    values = (reading.value(n, block.layer).detach() for n in ("attention_head_outputs", "attention_contributions"))
    _, rest = head_shares(model, block.layer, *values)
    return replace(block, bias=float((rest - rest[:1, :1]).abs().max()) > 1e-6 * float(rest.abs().max()))


def check_streams(graph: Graph, reading: Reading, writes: torch.Tensor, what: str) -> None:
    """Raise unless the writes before each input, and constants, add up to the stream that it reads.

    Constants (biases that are not nodes) are the same in all runs, so that differences of runs are compared: those of
    the rows of one batch with its first row.

    Raises:
        Unavailable: They do not.
    """
    blocks = {block.layer: block for block in graph.blocks}
    totals = writes.cumsum(0)
    worst = 0.0
    for own, before in zip(graph.inputs, graph.before, strict=True):
        stream = accumulated(stream_of(reading, blocks[own.layer], own.role).detach())
        whole = totals[before - 1].to(stream)
        error = ((whole - whole[:1]) - (stream - stream[:1])).norm(dim=-1)
        worst = max(worst, float((error / stream.norm(dim=-1).clamp(min=1e-30)).max()))
    if not worst <= (allowed := tolerance(reading.model)):
        raise Unavailable(
            f"{what} is not served for {reading.model.model_class}: what its nodes write does not add up to the stream "
            f"(relative error {worst:.1e}, {allowed:.0e} is rounding)."
        )


def _check_ends(model: StandardizedTransformer, graph: Graph, ids: torch.Tensor, what: str) -> None:
    """Raise unless a run with all edges is the prompt's own, and one without edges the other prompt's."""
    with torch.no_grad():
        readings = [read_run(model, graph.blocks, ids[k : k + 1]) for k in range(2)]
        runs = EdgeRuns(model, graph, ids[:1], readings[1], written(graph, readings[1]))
        found = runs.logits(torch.stack([graph.possible, torch.zeros_like(graph.possible)]))
    expected = torch.stack([reading.logits for reading in readings])
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
    if not error <= (allowed := 5 * tolerance(model)):
        raise Unavailable(
            f"{what} is not served for {model.model_class}: with all edges kept, or with all cut, a run is off from "
            f"the prompt's own by {error:.1e} ({allowed:.0e} is rounding)."
        )
