"""Edge attribution: what patching each edge alone would do, estimated from a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.interventions._attribution import accumulated, audited, require_gradients_on
from nnterp.interventions._circuits._chunks import (
    Chunks,
    Scoring,
    both_runs,
    check_lengths,
    ids_of_rows,
    refuse_remote,
)
from nnterp.interventions._circuits._circuit import Circuit, circuit_of, with_audit
from nnterp.interventions._circuits._edge_runs import EdgeRuns
from nnterp.interventions._circuits._graph import Graph
from nnterp.interventions._circuits._proof import graph_of
from nnterp.interventions._circuits._readings import Reading, changes_of, read_run, stream_of, written
from nnterp.interventions._circuits._slopes import Slopes
from nnterp.interventions._metrics import metric_name
from nnterp.interventions._pairs import Direction, Pairs, encode_pairs
from nnterp.interventions._partial import RUN, ids_of, resumed_as
from nnterp.interventions._results import describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, bar, check_batch_size, weights_at_rest, within_memory
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Method = Literal["gradient", "integrated"]
_WHAT = "edge_attribution()"
INPUTS = 64  # whose scores are made in one product
PAIRS, INTO = "pairs", "into"  # of a partial circuit's `about`: the pairs that are done, and metrics of their runs


@plain_defaults()
def edge_attribution(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    metric: Any,
    method: Method = "gradient",
    steps: int = 5,
    direction: Direction = "noising",
    *,
    audit: int = 20,
    by_pair: bool = False,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Circuit | str | Path | None = None,
) -> Circuit:
    """Score every edge of a model: how far patching that edge alone would move the metric, to first order.

    Nodes are the embeddings, every attention head (a mixer without heads is one node), and every MLP; they write into
    the residual stream, and the queries, keys and values of heads, the MLPs and the logits read it. The score of an
    edge is the difference of what the sender writes in both runs, times the gradient of the metric with respect to what
    the receiver reads, through the receiver alone; summed over positions, and the mean over pairs. (Syed et al.,
    "Attribution patching outperforms automated circuit discovery", 2023, EAP; Hanna et al., "Have faith in
    faithfulness", 2024, EAP-IG.)

    Under grouped queries a key-value head has a key and a value input, which its query heads share. In parallel blocks
    the attention and the MLP of a layer do not read each other. Under post-norms what a head writes is its share of
    what the norm makes of the sum, the norm's scale held at its value in the run.

    It costs two forwards, a backward, and vector-Jacobian products through every projection of a head; "integrated" a
    forward and a backward more for each step. The audit costs two forwards for each edge that it recomputes.

    Args:
        model: The model, with its weights here: this does not run remotely.
        clean: A prompt, or a list.
        corrupted: As many prompts, each of as many tokens as its clean one.
        metric: As in `activation_patching`; differentiable.
        method: "gradient" takes the gradient in the run patched into. "integrated" takes the mean of gradients at
            `steps` points between the token embeddings of both runs, at the middle of as many equal parts of the way.
        steps: How many, for "integrated".
        direction: "noising" patches edges of the clean run from the corrupted one, as both papers do; "denoising" the
            reverse.
        audit: How many edges are patched exactly, half of them the strongest ones and the others drawn at random, to
            say how far the scores can be trusted; 0 for none. Each score is compared with a run in which this edge
            alone is patched.
        by_pair: Keep the scores of each pair too.
        seed: Of the random half of the audit.
        batch_size: Pairs of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Refused: it needs the model's weights here.
        resume: The partial circuit of the same call that was cut short (an error's `partial`), or the file it was saved
            to: the pairs that it holds are not run again.

    Returns:
        A `Circuit` of all edges, on the CPU. Its `completeness` says how exactly the scores into an input add up to the
        difference of the stream that it reads times the gradient, and `audit` how the scores compare with exact
        effects.

    Raises:
        ValueError: Prompts do not go in pairs of equally many tokens, the metric is not differentiable, or an argument
            is none of its choices.
        Unavailable: The model's stream is no sum of what its parts add, or something beside the inputs above reads it
            (a gate on heads, per-layer embeddings); says what.
        RemoteModelError: `remote` was given, or the model's weights are on a remote service.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries the circuit of the pairs so far as `error.partial`.

    Example:
        metric = logit_difference(" Paris", " Rome")
        circuit = edge_attribution(model, "The capital of France is", "The capital of Italy is", metric, audit=4)
        figure = circuit.top(100).plot()
    """
    model.require_no_trace(_WHAT)
    refuse_remote(remote, _WHAT)
    check_batch_size(batch_size)
    audit, seed = count(audit, "audit", 0), count(seed, "seed", 0)
    require_gradients_on(_WHAT)
    if method not in ("gradient", "integrated"):
        raise ValueError(f'method is "gradient" or "integrated", not {method!r:.80}.')
    points = count(steps, "steps") if method == "integrated" else 0
    pairs = encode_pairs(model, clean, corrupted, direction)
    check_lengths(pairs)
    graph = graph_of(model, _WHAT)
    about = describe_run(
        model,
        "edge_attribution",
        metric=metric_name(metric),
        method=method,
        steps=points,
        direction=direction,
        prompts=prompt_labels(pairs.clean, model),
        corrupted=prompt_labels(pairs.corrupted, model),
    )
    asked = {
        "prompts": ids_of(pairs.clean, pairs.corrupted),
        "direction": direction,
        "method": method,
        "steps": points,
        "by_pair": bool(by_pair),
    }
    call = Call(model, "edge_attribution", asked, {"metric": metric})
    run = _Edges(model, graph, pairs, metric, points, by_pair)
    run.go_on_from(resumed_as(Circuit, call, resume))
    chunks = Chunks(model, graph, pairs, batch_size)
    with call.keeping(lambda: run.partial(call, about)):
        with bar(len(pairs), "edge attribution", progress) as shown, weights_at_rest(model._module):
            shown.update(len(run.done))
            for chosen in chunks.without(run.done):
                run.all_of(chosen, chunks)
                shown.update(len(chosen))
        circuit = run.circuit(about)
        if audit:
            circuit = with_audit(circuit, _audited(run, circuit, chunks, audit, seed))
    return circuit


class _Edges:
    """The runs of a call of `edge_attribution`.

    Attributes:
        total: The sum of the scores over the pairs that are done, float64 `[inputs, writers]`.
        single: The scores of each pair, float32 `[pairs, inputs, writers]`, NaN where it is not done; None if they are
            not kept.
        into_scores: The metric of the runs patched into, `[pairs]`.
        completeness: See `Circuit`.
        done: Indices of the pairs that are done.
    """

    def __init__(
        self, model: StandardizedTransformer, graph: Graph, pairs: Pairs, metric: Any, points: int, by_pair: bool
    ) -> None:
        self.model, self.graph, self.pairs, self.metric, self.points = model, graph, pairs, metric, points
        self.blocks = {block.layer: block for block in graph.blocks}
        self.total = torch.zeros(graph.possible.shape, dtype=torch.float64)
        self.single = torch.full((len(pairs), *graph.possible.shape), torch.nan) if by_pair else None
        self.into_scores = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
        self.completeness = 0.0
        self.done: set[int] = set()

    def go_on_from(self, earlier: Circuit | None) -> None:
        """Take over the pairs of a partial circuit."""
        if earlier is None:
            return
        done = earlier.about[PAIRS]
        self.done, self.completeness = set(done), earlier.completeness
        self.into_scores[done] = torch.tensor(earlier.about[INTO], dtype=torch.float64)
        self.total[earlier.receivers, earlier.senders] = earlier.scores.double() * len(done)
        if self.single is not None and earlier.by_pair is not None:
            self.single[:, earlier.receivers, earlier.senders] = earlier.by_pair

    def partial(self, call: Call, about: dict[str, Any]) -> Circuit | None:
        """What is computed so far, if a pair is done."""
        done = sorted(self.done)
        own = {PAIRS: done, INTO: self.into_scores[done].tolist(), RUN: call.record}
        return self.circuit({**about, **own}) if done else None

    def circuit(self, about: dict[str, Any]) -> Circuit:
        """The circuit of the pairs that are done."""
        return circuit_of(self.graph, self.total / len(self.done), self.completeness, self.single, about)

    def all_of(self, chosen: list[int], chunks: Chunks) -> None:
        """Score some pairs, in halves if memory runs out."""
        left = [chosen]
        while left:
            some = left.pop()
            if not within_memory(partial(self.some, some), len(some)):
                left += reversed(chunks.halves(some))

    def some(self, chosen: list[int]) -> None:
        """Score some pairs of one length."""
        model, graph, pairs = self.model, self.graph, self.pairs
        ids, others = (ids_of_rows([rows[i] for i in chosen]) for rows in (pairs.into, pairs.source))
        source = read_run(model, graph.blocks, others)
        into = self.with_gradients(ids) if not self.points else read_run(model, graph.blocks, ids)
        clean = source.logits if pairs.denoising else into.logits
        scoring = Scoring(self.metric, model, len(pairs), chosen, clean)
        slopes = self.slopes(ids, source, into, scoring)
        scores = self.scores(changes_of(graph, source, into), slopes, source, into)
        self.into_scores[chosen] = scoring(into.logits).detach().double().cpu()
        if not scores.isfinite().all():
            raise ValueError(
                f"The scores of pairs {chosen} are not finite: load the model in float32, or leave these pairs out."
            )
        self.total += scores.double().sum(0).cpu()
        if self.single is not None:
            self.single[chosen] = scores.float().cpu()
        self.done.update(chosen)

    def slopes(self, ids: torch.Tensor, source: Reading, into: Reading, scoring: Scoring) -> torch.Tensor:
        """The gradient through each input alone, `[pairs, inputs, seq, hidden]`; the mean over steps."""
        if not self.points:
            return self.slopes_in(into, scoring)
        total = ids.new_zeros(0)
        for k in range(self.points):
            part = (k + 0.5) / self.points
            between = into.embeddings + part * (source.embeddings - into.embeddings)
            own = self.slopes_in(self.with_gradients(ids, between), scoring)
            total = own if k == 0 else total.add_(own)
        return total / self.points

    def with_gradients(self, ids: torch.Tensor, embeddings: torch.Tensor | None = None) -> Reading:
        """A run with a graph of gradients."""
        graph = self.graph
        return read_run(self.model, graph.blocks, ids, embeddings, gradients=True, projections=graph.projections)

    def slopes_in(self, reading: Reading, scoring: Scoring) -> torch.Tensor:
        """The same in one run, which was read with gradients."""
        score = scoring(reading.logits).sum()
        if not score.requires_grad:
            raise ValueError(
                "The metric does not depend on the logits through differentiable operations: it was detached, computed "
                "under no_grad, or made of integers (argmax, comparisons)."
            )
        return Slopes(self.graph, reading, score).by_input()[0]

    @torch.no_grad()
    def scores(self, changes: torch.Tensor, slopes: torch.Tensor, source: Reading, into: Reading) -> torch.Tensor:
        """The scores of all edges, `[pairs, inputs, writers]`; notes how complete they are."""
        sent, felt = changes.flatten(2), slopes.flatten(2).to(changes)  # [pairs, writers or inputs, seq × hidden]
        scores = sent.new_zeros(len(sent), *self.graph.possible.shape)
        possible, before = self.graph.possible.to(sent.device), self.graph.before
        for start in range(0, len(before), INPUTS):  # many at a time, because each time all that is sent is read
            some = slice(start, min(start + INPUTS, len(before)))
            most = max(before[some])
            scores[:, some, :most] = (felt[:, some] @ sent[:, :most].mT) * possible[some, :most]
        for alike in self.graph.reading_alike:
            error = self.error(scores[:, alike], felt[:, alike], alike.start, source, into)
            self.completeness = max(self.completeness, error)
        return scores

    def error(self, scores: torch.Tensor, felt: torch.Tensor, own: int, source: Reading, into: Reading) -> float:
        """How far the scores into inputs of one stream are from the difference of that stream times the gradient.

        Relative to the norm of that difference times that of the gradient.

        Args:
            scores: `[pairs, inputs, writers]`.
            felt: The gradients, `[pairs, inputs, seq × hidden]`.
            own: The index of one of the inputs.
            source, into: The two runs.
        """
        layer, role = self.graph.inputs[own].layer, self.graph.inputs[own].role
        streams = (accumulated(stream_of(run, self.blocks[layer], role)) for run in (source, into))
        theirs, mine = (stream.flatten(1).to(felt) for stream in streams)
        moved = theirs - mine
        missing = (scores.sum(-1) - (felt @ moved[..., None])[..., 0]).abs()
        size = moved.norm(dim=-1)[:, None] * felt.norm(dim=-1)
        return float((missing / size.clamp(min=1e-30)).max())


def _audited(run: _Edges, circuit: Circuit, chunks: Chunks, number: int, seed: int) -> Any:
    """Some edges patched exactly, one at a time."""
    edges = circuit.edges
    where = list(zip(circuit.receivers.tolist(), circuit.senders.tolist(), strict=True))

    def exact(indices: list[int]) -> torch.Tensor:
        return _effects(run, [where[i] for i in indices], chunks)

    def labels(i: int) -> dict[str, Any]:
        return {"sender": str(edges[i].sender), "receiver": str(edges[i].receiver)}

    return audited(circuit.scores, exact, labels, number, seed)


def _effects(run: _Edges, edges: Sequence[tuple[int, int]], chunks: Chunks) -> torch.Tensor:
    """What patching each of some edges (input, writer) alone does to the metric, the mean over pairs, `[edges]`."""
    model, graph, pairs = run.model, run.graph, run.pairs
    kept = graph.possible.expand(len(edges), -1, -1).clone()
    for k, edge in enumerate(edges):
        kept[(k, *edge)] = False
    total = torch.zeros(len(edges), dtype=torch.float64)
    for chosen in chunks:
        source, into = both_runs(model, graph, pairs, chosen)
        scoring = Scoring(run.metric, model, len(pairs), chosen, (source if pairs.denoising else into).logits)
        runs = EdgeRuns(model, graph, ids_of_rows([pairs.into[i] for i in chosen]), source, written(graph, source))
        for k, logits in enumerate(runs.logits(kept)):
            total[k] += (scoring(logits).double().cpu() - run.into_scores[chosen]).sum()
    return total / len(pairs)
