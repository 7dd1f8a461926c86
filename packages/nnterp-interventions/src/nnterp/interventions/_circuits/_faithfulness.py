"""Faithfulness: how much of a behaviour is left when all edges outside of a circuit are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.arguments import count, listed
from nnterp.defaults import plain_defaults
from nnterp.interventions._circuits._chunks import (
    Chunks,
    Scoring,
    both_runs,
    check_lengths,
    ids_of_rows,
    refuse_remote,
)
from nnterp.interventions._circuits._circuit import Circuit
from nnterp.interventions._circuits._connected import random_circuit
from nnterp.interventions._circuits._edge_runs import EdgeRuns
from nnterp.interventions._circuits._graph import Graph
from nnterp.interventions._circuits._proof import graph_of
from nnterp.interventions._circuits._readings import written
from nnterp.interventions._metrics import metric_name
from nnterp.interventions._pairs import Pairs, encode_pairs, gap_between
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import AUTO_ROWS, BatchSize, bar, check_batch_size
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_WHAT = "faithfulness()"


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Result):
    """The metric when only edges of a circuit are kept: `metric` `[sizes]`, the mean over pairs, and of random ones.

    `by_prompt` `[prompts, sizes]` and `random_by_prompt` `[controls, prompts, sizes]` are those of single pairs,
    `clean` and `corrupted` `[prompts]` of the unedited runs, and `edges` `[sizes]` says how many edges were kept: those
    on a path from the embeddings to the logits. Sizes are fractions of the model's edges.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        circuit = edge_attribution(model, clean, corrupted, metric, audit=0)
        found = faithfulness(model, circuit, clean, corrupted, metric, sizes=[0.1, 1], controls=1)
        print(round(float(found.normalized[-1]), 3))  # → 1.0
    """

    figure: ClassVar[str] = "faithfulness"

    @property
    def normalized(self) -> torch.Tensor:
        """The metric rescaled so that the corrupted runs have 0 and the clean runs 1, float32 `[sizes]` on the CPU.

        NaN if both have the same metric, up to rounding (1e-6 of the larger one).
        """
        return self._rescaled(self["metric"])

    @property
    def normalized_random(self) -> torch.Tensor:
        """The same of the random circuits, float32 `[controls, sizes]` on the CPU."""
        return self._rescaled(self["random"])

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under the normalised curve over the fraction of edges.

        By trapezoids between the sizes; higher is better. (Mueller et al., "MIB: a mechanistic interpretability
        benchmark", 2025, section 4.)
        """
        return self._area(self.normalized)

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between the normalised curve and 1; lower is better (same source)."""
        return self._area((1 - self.normalized).abs())

    def _rescaled(self, metric: torch.Tensor) -> torch.Tensor:
        clean, corrupted = self["clean"].mean(), self["corrupted"].mean()
        return (metric - corrupted) / gap_between(clean, corrupted)

    def _area(self, curve: torch.Tensor) -> float:
        sizes = torch.tensor(self.labels["sizes"], dtype=torch.float64)
        order = sizes.argsort()
        return float(torch.trapezoid(curve.double()[order], sizes[order]))

    def __repr__(self) -> str:
        curve = ", ".join(
            f"{size:g}: {own:.2f}" for size, own in zip(self.labels["sizes"], self.normalized, strict=True)
        )
        return f"Faithfulness({curve}; CPR {self.cpr:.3f}, CMD {self.cmd:.3f}; {self.about.get('model', '')})"


@plain_defaults()
def faithfulness(
    model: StandardizedTransformer,
    circuit: Circuit,
    clean: Any,
    corrupted: Any,
    metric: Any,
    sizes: Sequence[float] | float = MIB_SIZES,
    controls: int = 3,
    *,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
) -> Faithfulness:
    """The metric of clean runs in which every edge outside of a circuit is taken from the corrupted run.

    Each head's query, key and value, each MLP and the logits read a stream of their own: what was written in the
    corrupted run, and along the circuit's edges what the sender writes in this run, which is recomputed as the run
    goes. Nothing is estimated. (Wang et al., "Interpretability in the wild", 2022; edges as in Hanna et al., "Have
    faith in faithfulness", 2024.)

    A run costs as many rows of a batch as there are inputs of one layer that keep different edges: one for the whole
    circuit, at most three for each head and one more.

    Args:
        model: The model, with its weights here: this does not run remotely.
        circuit: Scored edges of this model, such as `edge_attribution` returns; each size keeps the strongest.
        clean: A prompt, or a list; best others than the circuit was found on.
        corrupted: As many prompts, each of as many tokens as its clean one.
        metric: As in `activation_patching`.
        sizes: Fractions of the model's edges, from 0 to 1; of the edges kept, those on no path from the embeddings to
            the logits are cut too.
        controls: How many random circuits of as many edges, all on such paths, are run at each size.
        seed: Of the random circuits.
        batch_size: Pairs of a batch; "auto" lets memory decide.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Refused: it needs the model's weights here.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: the prompts that it holds are not run again.

    Returns:
        A `Faithfulness`, float32 on the CPU, with `cpr` and `cmd`.

    Raises:
        ValueError: Prompts do not go in pairs of equally many tokens, the circuit is of another model or has fewer
            edges than a size asks for, a size is no fraction, or the metric is not finite.
        Unavailable: As for `edge_attribution`.
        RemoteModelError: `remote` was given, or the model's weights are on a remote service.
        InsideTraceError: Called inside a trace of the same model.
        TypeError: `circuit` is no circuit.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN for the
        prompts whose `done` is False.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        circuit = edge_attribution(model, clean, corrupted, metric, audit=0)
        figure = faithfulness(model, circuit, clean, corrupted, metric, sizes=[0.1, 1], controls=1).plot()
    """
    model.require_no_trace(_WHAT)
    refuse_remote(remote, _WHAT)
    check_batch_size(batch_size)
    if not isinstance(circuit, Circuit):
        raise TypeError(f"A Circuit was expected, such as edge_attribution() returns, not {circuit!r:.80}.")
    controls, seed = count(controls, "controls", 0), count(seed, "seed", 0)
    pairs = encode_pairs(model, clean, corrupted, "noising")
    check_lengths(pairs)
    graph = graph_of(model, _WHAT)
    check_model(model, graph, circuit)
    numbers = _sizes(circuit, sizes)
    own = [circuit.top(n).kept for _, n in numbers]
    kept = [own]
    for control in range(controls):
        parts = (graph.writers, graph.inputs, graph.possible)
        kept.append([random_circuit(*parts, int(mask.sum()), seed + control) for mask in own])
    asked = {
        "prompts": ids_of(pairs.clean, pairs.corrupted),
        "sizes": [size for size, _ in numbers],
        "edges": [mask.flatten().nonzero()[:, 0] for masks in kept for mask in masks],
        "controls": controls,
        "seed": seed,
    }
    call = Call(model, "faithfulness", asked, {"metric": metric})
    run = _Faithfulness(model, graph, pairs, metric, kept, resumed(call, resume))
    about = describe_run(
        model,
        "faithfulness",
        metric=metric_name(metric),
        edges=circuit.total,
        seed=seed,
        corrupted=prompt_labels(pairs.corrupted, model),
        circuit={name: circuit.about.get(name) for name in ("function", "arguments")},
    )

    def result() -> Faithfulness:
        return run.result([size for size, _ in numbers], [int(mask.sum()) for mask in own], about)

    with (
        bar(len(pairs), "faithfulness", progress) as shown,
        call.keeping(lambda: unfinished(call, result, run.done, ("prompts",))),
    ):
        shown.update(int(run.done.sum()))
        for chosen in Chunks(model, graph, pairs, batch_size).without(run.done.nonzero()[:, 0].tolist()):
            run.some(chosen, AUTO_ROWS if isinstance(batch_size, str) else batch_size)
            shown.update(len(chosen))
    return result()


def check_model(model: StandardizedTransformer, graph: Graph, circuit: Circuit) -> None:
    """Raise unless a circuit's nodes and inputs are those of a model.

    Raises:
        ValueError: They are not; names the first that differs.
    """
    for what, here, there in (
        ("nodes", graph.writers, circuit.writers),
        ("inputs", graph.inputs, circuit.inputs),
    ):
        if here != there:
            odd = next((str(b) for a, b in zip(here, there, strict=False) if a != b), "")
            raise ValueError(
                f"The circuit is of another model ({circuit.about.get('model')}): it has {len(there)} {what}"
                f"{f', among them {odd},' if odd else ''} and {model.model_class} has {len(here)}."
            )


def _sizes(circuit: Circuit, sizes: Any) -> list[tuple[float, int]]:
    """Each size with its number of edges."""
    given = [sizes] if isinstance(sizes, (int, float)) else listed(sizes, "sizes", "fractions of the model's edges")
    found = []
    for size in given:
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size <= 1:
            raise ValueError(
                f"sizes are fractions of the model's {circuit.total} edges, from 0 to 1, not {size!r:.80}."
            )
        number = math.floor(size * circuit.total + 1e-9)
        if number > len(circuit) + circuit.dropped:
            raise ValueError(
                f"The circuit has {len(circuit)} of the model's {circuit.total} edges, and the size {size:g} asks for "
                f"{number}. Pass the whole circuit that edge_attribution() returned, or sizes up to "
                f"{len(circuit) / circuit.total:.3g}."
            )
        found.append((float(size), number))
    if not found:
        raise ValueError("sizes is empty; give a fraction of the model's edges, or several.")
    return found


class _Faithfulness:
    """The runs of a call of `faithfulness`.

    Attributes:
        kept: The edges of the circuit at each size, and those of each control.
        scores: The metric, `[1 + controls, pairs, sizes]`.
        ends: That of the clean and the corrupted runs, `[2, pairs]`.
        done: Which pairs are done, `[pairs]`.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        graph: Graph,
        pairs: Pairs,
        metric: Any,
        kept: list[list[torch.Tensor]],
        earlier: Result | None,
    ) -> None:
        self.model, self.graph, self.pairs, self.metric, self.kept = model, graph, pairs, metric, kept
        self.scores = torch.full((len(kept), len(pairs), len(kept[0])), torch.nan)
        self.ends = torch.full((2, len(pairs)), torch.nan)
        self.done = torch.zeros(len(pairs), dtype=torch.bool)
        if earlier is not None:
            self.scores = torch.cat([earlier["by_prompt"][None], earlier["random_by_prompt"]])
            self.ends = torch.stack([earlier["clean"], earlier["corrupted"]])
            self.done = earlier[DONE].clone()

    @torch.no_grad()
    def some(self, chosen: list[int], rows: int) -> None:
        """All circuits in some pairs of one length."""
        corrupted, clean = both_runs(self.model, self.graph, self.pairs, chosen)
        scoring = Scoring(self.metric, self.model, len(self.pairs), chosen, clean.logits)
        for end, reading in enumerate((clean, corrupted)):
            self.ends[end, chosen] = scoring(reading.logits).float().cpu()
        ids = ids_of_rows([self.pairs.into[i] for i in chosen])
        runs = EdgeRuns(self.model, self.graph, ids, corrupted, written(self.graph, corrupted), rows)
        for k, kept in enumerate(self.kept):
            for size, logits in enumerate(runs.logits(torch.stack(kept))):
                self.scores[k, chosen, size] = scoring(logits).float().cpu()
        if not (self.scores[:, chosen].isfinite().all() and self.ends[:, chosen].isfinite().all()):
            raise ValueError(
                f"The metric of pairs {chosen} is not finite, in an unedited run or in one with edges cut. Take "
                "another metric, load the model in float32, or leave these pairs out."
            )
        self.done[chosen] = True

    def result(self, sizes: list[float], edges: list[int], about: dict[str, Any]) -> Faithfulness:
        """The result; NaN for pairs that are not done."""
        self.scores[:, ~self.done], self.ends[:, ~self.done] = torch.nan, torch.nan
        return Faithfulness(
            {
                "metric": self.scores[0].nanmean(0),
                "by_prompt": self.scores[0],
                "random": self.scores[1:].nanmean(1),
                "random_by_prompt": self.scores[1:],
                "clean": self.ends[0],
                "corrupted": self.ends[1],
                "edges": torch.tensor(edges),
            },
            {
                "metric": ("sizes",),
                "by_prompt": ("prompts", "sizes"),
                "random": ("controls", "sizes"),
                "random_by_prompt": ("controls", "prompts", "sizes"),
                "clean": ("prompts",),
                "corrupted": ("prompts",),
                "edges": ("sizes",),
            },
            {
                "sizes": tuple(sizes),
                "prompts": prompt_labels(self.pairs.clean, self.model),
                "controls": tuple(range(len(self.kept) - 1)),
            },
            about=about,
        )
