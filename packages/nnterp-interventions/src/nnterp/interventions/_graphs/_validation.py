"""What a graph says that steering its features does, beside what it does in runs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.errors import RemoteModelError
from nnterp.interventions._attribution import Targets, Unembedding, accumulated
from nnterp.interventions._graphs._graph import AttributionGraph, Wanted, indices_of
from nnterp.interventions._graphs._node import GraphNode
from nnterp.interventions._graphs._replaced import Ends
from nnterp.interventions._graphs._runs import Seen
from nnterp.interventions._graphs._sites import sites_of
from nnterp.interventions._graphs._sources import encoders, sources_of
from nnterp.interventions._graphs._steered import Steered
from nnterp.interventions._results import describe_run
from nnterp.progress import bar

if TYPE_CHECKING:
    import pandas

    from nnterp import StandardizedTransformer

WHAT = "validate_graph()"
Measured = Literal["frozen", "model"]


@dataclass(frozen=True, eq=False, repr=False)
class GraphValidation:
    """Changes that steering features makes, as a graph predicts them and as runs show them.

    Attributes:
        steered: For each intervention the features that were steered together.
        factor: What their activations were multiplied by.
        nodes: The features and logits of the graph.
        predicted: What the graph predicts of each node's pre-activation or logit: the change, `[interventions, nodes]`.
        frozen: What it is in the local replacement model: transcoders and constant errors in place of feed-forwards,
            patterns and the scales of norms those of the unedited run.
        model: What it is in the model itself, where everything is computed anew.
        about: Model, versions, function and arguments.

        All are float32 on the CPU; NaN where a node is steered itself or is no feature of a later layer.

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        graph = attribution_graph(model, transcoders, "The capital of Japan is", max_features=50)
        validate_graph(model, transcoders, graph).correlation("model")  # of predicted with measured changes
    """

    steered: tuple[tuple[GraphNode, ...], ...]
    factor: float
    nodes: tuple[GraphNode, ...]
    predicted: torch.Tensor
    frozen: torch.Tensor
    model: torch.Tensor
    about: dict[str, Any] = field(default_factory=dict)

    def correlation(self, measured: Measured = "frozen", of: Literal["logit", "feature"] = "logit") -> float:
        """Correlate predicted and measured changes of logits, or of features of later layers.

        Args:
            measured: In the local replacement model, or in the model itself.
            of: The kind of node.

        Returns:
            Pearson's correlation, from −1 to 1, computed in float64.

        Raises:
            ValueError: There are fewer than two changes to compare.
        """
        a, b = self.changes(measured, of)
        if len(a) < 2:
            raise ValueError(f"There are {len(a)} changes of {of}s to correlate; steer more features.")
        a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
        return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-300))

    def changes(self, measured: Measured, of: Literal["logit", "feature"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather predicted and measured changes of all nodes of a kind, over all interventions.

        Returns:
            Predicted and measured changes, `[changes]` each, float32 on the CPU; those not predicted are left out.

        Raises:
            ValueError: `measured` or `of` is none of those named.
        """
        if measured not in ("frozen", "model"):
            raise ValueError(f'measured is "frozen" or "model", not {measured!r:.40}.')
        if of not in ("logit", "feature"):
            raise ValueError(f'of is "logit" or "feature", not {of!r:.40}.')
        which = torch.tensor([node.kind == of for node in self.nodes])
        found = getattr(self, measured)
        here = which & ~self.predicted.isnan()
        return self.predicted[here], found[here]

    def __repr__(self) -> str:
        measures: tuple[Measured, ...] = ("frozen", "model")
        kinds: tuple[Literal["logit", "feature"], ...] = ("logit", "feature")
        parts = [
            f"{of}s {self.correlation(measured, of):.3f} ({measured})"
            for measured in measures
            for of in kinds
            if len(self.changes(measured, of)[0]) >= 2
        ]
        many = f"{len(self.steered)} interventions, factor {self.factor:g}"
        return f"GraphValidation({many}; correlations: {', '.join(parts) or 'too few changes'})"

    def to_dataframe(self) -> pandas.DataFrame:
        """Make a table of the changes.

        Returns:
            A row for each intervention and node: steered, node, kind, predicted, frozen, model.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        rows = [
            {
                "steered": " + ".join(map(str, own)),
                "node": str(node),
                "kind": node.kind,
                "predicted": float(self.predicted[i, j]),
                "frozen": float(self.frozen[i, j]),
                "model": float(self.model[i, j]),
            }
            for i, own in enumerate(self.steered)
            for j, node in enumerate(self.nodes)
            if not bool(self.predicted[i, j].isnan())
        ]
        return pandas.DataFrame(rows, columns=["steered", "node", "kind", "predicted", "frozen", "model"])


@plain_defaults()
def validate_graph(
    model: StandardizedTransformer,
    transcoders: Any,
    graph: AttributionGraph,
    features: Sequence[Wanted | Sequence[Wanted]] | None = None,
    *,
    factor: float = 0.0,
    n: int = 10,
    progress: bool | None = None,
    remote: Any = False,
) -> GraphValidation:
    """Steer features of a graph, and compare what the graph predicts with what happens.

    The activation of a feature, or of several together (a supernode), is set to `factor` times what it was. The graph
    predicts changes along its edges; activations fall to 0 and no lower. They are measured twice: in the local
    replacement model, where patterns and the scales of norms are those of the unedited run and feed-forwards are
    transcoders with constant errors; and in the model itself, to whose feed-forward's output the change of the feature
    times its decoder row is added. (Ameisen et al. 2025, Circuit Tracing, "Validating attribution graph hypotheses with
    interventions".) In the replacement model, a change differs from the prediction only through features that are no
    nodes, features that switch on, and activation functions that jump. In the model itself, attention changes too.

    Costs two forward passes, and two for each intervention.

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        graph = attribution_graph(model, transcoders, "The capital of Japan is", max_features=50)
        frame = validate_graph(model, transcoders, graph, ["L0 F206 @3"]).to_dataframe()

    Args:
        model: The model that the graph was made of.
        transcoders: Those that it was made with.
        graph: The graph, whole or pruned.
        features: What is steered: features by name or index, or lists of features that are steered together. With
            None, the `n` of most influence on the logits.
        factor: What activations are multiplied by; 0 ablates.
        n: How many, with `features=None`.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Refused: norms are held still beside the model.

    Returns:
        A `GraphValidation`: `predicted`, `frozen` and `model` are `[interventions, nodes]`, float32 on the CPU.

    Raises:
        TypeError: `factor` is not a number.
        KeyError, ValueError: The graph has no such feature, or was made of another model or with other transcoders.
        Unavailable: The model cannot be frozen; as `attribution_graph`.
        RemoteModelError: `remote` was given.
        InsideTraceError: Called inside a trace of the same model.
    """
    model.require_no_trace(WHAT)
    if remote:
        raise RemoteModelError(
            f"{WHAT[:-1]}remote=...) is refused: norms are held still beside the model. Load it here."
        )
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"factor is a number, not {factor!r:.40}.")
    model.prepare()
    if model.standing or model._edits:
        raise ValueError(f"{WHAT} needs the model as it is: call it outside of `with model.steering(...)`.")
    if features is None:
        chosen = [[graph.index(node)] for node, _ in graph.top(count(n, "n"))]
    else:
        listed = [features] if isinstance(features, (str, GraphNode)) else features
        chosen = [indices_of(graph, own) for own in listed]
    if not chosen:
        raise ValueError("There is no feature to steer.")
    sites = sites_of(model, transcoders, WHAT)
    masked = torch.ones(len(graph.token_ids), dtype=torch.bool)
    masked[graph.about.get("errors_at", [])] = False
    runs = Steered(model, sites, torch.tensor(graph.token_ids), masked)
    with torch.no_grad():
        plain, held = runs.unedited()
    sources = sources_of(sites, plain, masked)
    _check(graph, sources.features, sources.activations)
    ids, weights = (torch.tensor(own) for own in graph.about["logits"])
    targets = Targets(ids, weights, ids[:, :1], None, True)
    assert plain.logits is not None
    ends = Ends(model, targets, plain.values[sites.leaving][0, -1], plain.logits[0], WHAT)
    readout = Unembedding(model, targets, WHAT)

    def read(seen: Seen, still: bool) -> torch.Tensor:
        return _totals(graph, sites, seen, ends if still else readout)

    before = {True: read(held, True), False: read(plain, False)}
    predicted, found = [], {True: [], False: []}  # type: ignore[var-annotated]
    with bar(len(chosen), "validating the graph", progress) as shown, torch.no_grad():
        for own in chosen:
            values: dict[int, list[tuple[int, int, float]]] = {}
            for i in own:
                node = graph.nodes[i]
                assert node.layer is not None
                values.setdefault(node.layer, []).append(
                    (node.position, int(node.feature or 0), factor * float(node.activation or 0))
                )
            predicted.append(predict(graph, own, factor))
            for still in (True, False):
                after = read(runs.steered(values, still), still) - before[still]
                found[still].append(after.where(~predicted[-1].isnan(), torch.nan))
            shown.update(1)
    about = describe_run(model, "validate_graph", factor=factor)
    return GraphValidation(
        tuple(tuple(graph.nodes[i] for i in own) for own in chosen),
        float(factor),
        graph.nodes,
        torch.stack(predicted),
        torch.stack(found[True]),
        torch.stack(found[False]),
        about,
    )


def predict(graph: AttributionGraph, steered: Sequence[int], factor: float) -> torch.Tensor:
    """What a graph predicts that multiplying activations does to pre-activations and logits, `[nodes]`.

    NaN for what is steered, for features that are in no later layer, and for errors and embeddings.
    """
    relative = torch.zeros(len(graph), dtype=graph.edges.dtype)
    relative[list(steered)] = factor - 1
    change = torch.full_like(relative, float("nan"))
    by_layer: dict[int, list[int]] = {}
    first = min(graph.nodes[i].layer or 0 for i in steered)
    for i in graph.of_kind("feature"):
        layer = graph.nodes[i].layer or 0
        if layer > first and i not in steered:
            by_layer.setdefault(layer, []).append(i)
    for layer in sorted(by_layer):
        rows = by_layer[layer]
        change[rows] = graph.edges[rows] @ relative
        own = torch.tensor([float(graph.nodes[i].activation or 0) for i in rows]).to(relative)
        relative[rows] = (graph.slopes[rows] * change[rows] / own).clamp(min=-1)  # nodes are active: none is 0
    ends = graph.of_kind("logit")
    change[ends] = graph.edges[ends] @ relative
    return change


def _totals(graph: AttributionGraph, sites: Any, seen: Seen, ends: Ends | Unembedding) -> torch.Tensor:
    """Pre-activations and logits of the graph's nodes in a run, `[nodes]`; 0 of others."""
    found = torch.zeros(len(graph), dtype=graph.edges.dtype)
    layers = {own.layer: own for own in sites.layers}
    by_layer: dict[int, list[int]] = {}
    for i in graph.of_kind("feature"):
        by_layer.setdefault(graph.nodes[i].layer or 0, []).append(i)
    for layer, rows in by_layer.items():
        own = layers[layer]
        assert own.dictionary is not None
        vectors, added = encoders(own.dictionary, torch.tensor([graph.nodes[i].feature or 0 for i in rows]))
        x = accumulated(seen.values[own.reads][0]).cpu()[[graph.nodes[i].position for i in rows]]
        found[rows] = (x * vectors).sum(1) + added
    leaving = seen.values[sites.leaving][0, -1]
    rows = graph.of_kind("logit")
    if isinstance(ends, Ends):
        found[rows] = ends.vectors @ accumulated(leaving).cpu() + ends.biases
    else:
        found[rows] = ends.logits(leaving.expand(len(rows), -1), torch.arange(len(rows))).cpu().to(found)
    return found


def _check(graph: AttributionGraph, features: torch.Tensor, activations: torch.Tensor) -> None:
    """Raise unless the graph's features are active in this run as they were in the graph's.

    Raises:
        ValueError: They are not.
    """
    now = {tuple(own): value for own, value in zip(features.tolist(), activations.tolist(), strict=True)}
    for i in graph.of_kind("feature"):
        node = graph.nodes[i]
        was, here = float(node.activation or 0), now.get((node.layer, node.position, node.feature), 0.0)
        if abs(here - was) > 1e-2 * max(abs(was), 1e-2):
            raise ValueError(
                f"The graph was made of another model or with other transcoders: {node} has an activation of "
                f"{was:.4g} there and of {here:.4g} here."
            )
