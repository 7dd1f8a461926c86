"""`attribution_graph`: features of transcoders, and the direct effects between them in one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.errors import RemoteModelError, Unavailable
from nnterp.inputs import encode
from nnterp.interventions._attribution import softcap_of, tolerance
from nnterp.interventions._graphs._collecting import Collecting
from nnterp.interventions._graphs._graph import AttributionGraph
from nnterp.interventions._graphs._replaced import Ends
from nnterp.interventions._graphs._runs import held_kinds, run
from nnterp.interventions._graphs._sites import sites_of
from nnterp.interventions._graphs._sources import sources_of
from nnterp.interventions._graphs._targets import logits_of
from nnterp.interventions._results import describe_run
from nnterp.interventions._running import BatchSize, check_batch_size
from nnterp.positions import Positions, resolve

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

WHAT = "attribution_graph()"


@plain_defaults()
def attribution_graph(
    model: StandardizedTransformer,
    transcoders: Any,
    prompt: Any,
    targets: Any = None,
    *,
    max_logits: int = 10,
    probability: float = 0.95,
    max_features: int = 4096,
    errors_at: Positions | None = None,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
) -> AttributionGraph:
    """Which features of a prompt act on which, and on what the model predicts.

    Each feed-forward is replaced by its transcoder and an error, so that the model still computes what it computes.
    With attention patterns and the scales of norms held still at their values in the run, what a feature is given is
    linear in what is written before it: other features, the errors, the token embeddings, and biases. An edge is one
    such share: the source's activation times its decoder row, through the residual stream and frozen attention, along
    the target's encoder row (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models",
    "Constructing an attribution graph"; transcoders: Dunefsky et al. 2024, "Transcoders find interpretable LLM feature
    circuits"). Skip transcoders' linear path is a part of the direct effects.

    Logits are differences from the mean logit of all tokens, at the last token, before a softcap
    (`about["softcap"]`). The stream entering the first layer stands for the token embeddings: positions that are
    embedded are part of it.

    **The sum is proven for every node**: incoming edges, biases (of decoders, attention, norms) and what is left out
    add up to its pre-activation or logit; `sum_error` is the largest error relative to the largest of these. A graph
    which does not sum up is refused.

    Costs one forward pass of the prompt, one of a batch of `batch_size` copies of it, and one backward pass of that
    batch for each `batch_size` of features and logits: `about["cost"]` counts them. The memory of a backward pass does
    not depend on the number of features. The graph has `nodes` squared numbers; while features are chosen, there
    are `max_features` times all active features.

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        graph = attribution_graph(model, transcoders, "The capital of Japan is", max_features=50)
        figure = graph.prune().plot()

    Args:
        model: The model; its weights are here.
        transcoders: Layer → `Dictionary`, a list with one for each layer, or a `CrossLayerTranscoder`. Each reads and
            writes the values that it names (`mlps_input[i]` and `mlps_output[i]` if it names none). All that a
            feed-forward without one adds is an error.
        prompt: One text, or anything of one prompt that `nnterp.inputs.encode` takes.
        targets: A token (an id, or a text that is one token), a difference `(correct, wrong)` of two tokens or lists of
            tokens, or a list of these, each a logit node. With None, the likeliest tokens.
        max_logits, probability: With `targets=None`: the likeliest tokens until they have this probability together,
            and at most so many.
        max_features: Most features that become nodes. If more are active, those of most influence are chosen, as far as
            is known while rows are computed. The effects of the others are in `left_out`; `left_out_share` says how
            much that is.
        errors_at: Positions whose feed-forwards are all error. Most transcoders were not trained on the first token:
            0 leaves out its features.
        batch_size: Copies of the prompt in a backward pass; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Refused: gradients are taken here.

    Returns:
        An `AttributionGraph`: `edges` `[nodes, nodes]`, row by target, and tensors `[nodes]`, on the CPU, float32
        (float64 for a float64 model).

    Raises:
        TypeError, ValueError: An argument is not as said above, or a transcoder does not fit its layer, or no feature
            is active.
        Unavailable: The model's attention patterns or norms cannot be held still, a feed-forward cannot be replaced, or
            the sums do not hold; says why and where.
        RemoteModelError: `remote` was given.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries as `error.partial` the graph of the features that
        were done.
    """
    model.require_no_trace(WHAT)
    check_batch_size(batch_size)
    count(max_logits, "max_logits")
    count(max_features, "max_features")
    if not isinstance(probability, (int, float)) or not 0 < probability <= 1:
        raise ValueError(f"probability is above 0 and at most 1, not {probability!r:.40}.")
    if remote:
        raise RemoteModelError(
            f"{WHAT[:-1]}remote=...) is refused: gradients are taken beside the model. Load it here."
        )
    model.prepare()
    if model.standing or model._edits:
        raise ValueError(f"{WHAT} attributes the model as it is: call it outside of `with model.steering(...)`.")
    (row,) = _one(encode(model, prompt))
    ids = torch.tensor(row.ids)
    masked = torch.ones(len(ids), dtype=torch.bool)
    if errors_at is not None:
        masked[list(resolve(model, row, errors_at, "errors_at"))] = False
    held_kinds(model)
    sites = sites_of(model, transcoders, WHAT)
    with torch.no_grad():
        seen = run(model, sites, ids[None], lambda *_: None)
    assert seen.logits is not None
    sources = sources_of(sites, seen, masked)
    if not len(sources.features):
        raise ValueError(f"{WHAT}: no feature of {len(sites.replaced)} transcoders is active in this prompt.")
    ends_at = logits_of(model, targets, seen.logits[0], max_logits, probability)
    ends = Ends(model, ends_at.targets, seen.values[sites.leaving][0, -1], seen.logits[0], WHAT)
    arguments = {"max_features": max_features, "errors_at": errors_at, "max_logits": max_logits}
    about = describe_run(
        model, "attribution_graph", prompt=prompt, targets=targets, probability=probability, **arguments
    )
    about["softcap"] = softcap_of(model.readout)
    about["num_layers"] = model.num_layers
    about["errors_at"] = (~masked).nonzero()[:, 0].tolist()
    about["logits"] = [ends_at.targets.ids.tolist(), ends_at.targets.weights.tolist()]
    work = Collecting(model, sites, ids, masked, sources, ends, ends_at, about)
    allowed = tolerance(model)
    try:
        work.collect(max_features, batch_size, progress)
    except BaseException as error:
        if work.rows:
            error.partial = work.graph()  # type: ignore[attr-defined]
            error.add_note(f"What {WHAT} had computed is in this exception's `partial`: a graph with fewer features.")
        raise
    if not (worst := work.worst()) <= allowed:
        raise Unavailable(
            f"{WHAT} is not served for {model.model_class} on this prompt: the direct effects on {work.worst_target()} "
            f"and biases do not add up to it (relative error {worst:.1e}, {allowed:.0e} is rounding). Something else "
            "reads or writes the stream, or is not linear with patterns and norms held still."
        )
    return work.graph()


def _one(rows: list[Any]) -> list[Any]:
    if len(rows) != 1:
        raise ValueError(f"{WHAT} makes the graph of one prompt; there are {len(rows)}. Call it for each.")
    return rows
