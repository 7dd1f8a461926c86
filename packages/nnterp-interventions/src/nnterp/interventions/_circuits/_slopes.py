"""The gradient of a metric with respect to what each input of the graph reads, through that input alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._attribution import accumulated
from nnterp.interventions._circuits._graph import HEAD_INPUTS, Columns, Graph
from nnterp.interventions._circuits._projections import through_columns
from nnterp.interventions._circuits._readings import Reading
from nnterp.values import Site

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


class Slopes:
    """Gradients in one run that was read with `gradients=True`.

    The gradient with respect to a query, key or value of one head is pulled back through its projection and the norm
    to the stream, all other heads at zero; that with respect to what an MLP adds, through the MLP. Where the graph
    knows the columns of a projection that make a head, it is multiplied with these alone.

    Args:
        graph: The graph.
        reading: The run.
        score: What is differentiated, one number.
    """

    def __init__(self, graph: Graph, reading: Reading, score: torch.Tensor) -> None:
        self.graph, self.reading = graph, reading
        wanted = [("layers_output", graph.blocks[-1].layer)]
        for block in graph.blocks:
            wanted += [("layers_input", block.layer)]
            wanted += [(value, block.layer) for role, value in HEAD_INPUTS.items() if self.whole(block.layer, role)]
        roots = [reading.roots(*key) for key in wanted]
        leaving = [reading.tensors[Site(path, "output")] for path in graph.projections]
        flat = [root for own in roots for root in own] + leaving
        slopes = torch.autograd.grad(score, flat, retain_graph=True, allow_unused=True)
        made = iter([torch.zeros_like(root) if g is None else g for root, g in zip(flat, slopes, strict=True)])
        self.total = {
            key: reading.slope(*key, [next(made) for _ in own]) for key, own in zip(wanted, roots, strict=True)
        }
        self.leaving = dict(zip(graph.projections, made, strict=True))

    def whole(self, layer: int, role: str) -> bool:
        """Whether heads of a role are pulled back through the whole projection."""
        own = self.graph.inputs_of.get((layer, role), [])
        return bool(own) and own[0] not in self.graph.columns

    def by_input(self) -> tuple[torch.Tensor, float]:
        """The gradients through each input alone, and how far they are from the whole gradient.

        Returns:
            `[rows, inputs, seq, hidden]`, float32; and the largest relative error, over layers, of: the gradient of the
            stream entering a layer is that of the stream leaving it and those through the layer's inputs.
        """
        found: dict[int, torch.Tensor] = {}
        worst = 0.0
        last = self.graph.blocks[-1].layer
        leaving = self.total["layers_output", last]
        (own,) = self.graph.inputs_of[last, "logits"]
        found[own] = accumulated(leaving)
        for block in reversed(self.graph.blocks):
            layer, passed = block.layer, accumulated(leaving)
            if block.mlp:
                (own,) = self.graph.inputs_of[layer, "mlp"]
                stream = "layers_mid" if block.mlp == "mid" else "layers_input"
                found[own] = self.pulled("mlp_contributions", layer, leaving, stream)
                mixed = passed + found[own] if block.mlp == "mid" else passed
                passed = passed + found[own]
            else:
                mixed = passed
            if block.mixer:
                (own,) = self.graph.inputs_of[layer, "mixer"]
                found[own] = self.pulled("mixer_contributions", layer, mixed, "layers_input")
                passed = passed + found[own]
            for own, slope in self.of_heads(layer):
                found[own] = slope
                passed = passed + slope
            leaving = self.total["layers_input", layer]
            size = accumulated(leaving).norm()
            worst = max(worst, float((passed.to(leaving.device) - leaving).norm() / size.clamp(min=1e-30)))
        whole = found[0].new_empty(len(found[0]), len(self.graph.inputs), *found[0].shape[1:])
        for i, slope in found.items():
            whole[:, i] = slope
        return whole, worst

    def of_heads(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The gradients through the queries, keys and values of one layer, each with the index of its input."""
        columns: dict[int, Columns] = {}
        for role, value in HEAD_INPUTS.items():
            for head, own in enumerate(self.graph.inputs_of.get((layer, role), ())):
                if own in self.graph.columns:
                    columns[own] = self.graph.columns[own]
                    continue
                whole = self.total[value, layer]
                cotangent = torch.zeros_like(whole)
                cotangent[:, :, head] = whole[:, :, head]
                yield own, self.pulled(value, layer, cotangent, "layers_input")
        for own, slope in through_columns(self.reading, columns, self.leaving).items():
            entering = self.reading.tensors[Site(columns[own].path, "input")]
            yield own, self.back(entering, layer, slope, "layers_input")

    def pulled(self, value: str, layer: int, cotangent: torch.Tensor, stream: str) -> torch.Tensor:
        """The vector-Jacobian product from a value to the stream of its layer, `[rows, seq, hidden]`, float32."""
        made = self.reading.value(value, layer)
        return self.back(made, layer, cotangent.to(made).reshape(made.shape), stream)

    def back(self, made: torch.Tensor, layer: int, cotangent: torch.Tensor, stream: str) -> torch.Tensor:
        """The same from a tensor of the run."""
        slopes = torch.autograd.grad(made, self.reading.roots(stream, layer), cotangent, retain_graph=True)
        return accumulated(self.reading.slope(stream, layer, slopes))


def require_whole(model: StandardizedTransformer, worst: float, allowed: float, what: str) -> None:
    """Raise unless the gradients through all inputs of a layer made up the whole gradient.

    Raises:
        Unavailable: They did not.
    """
    if not worst <= allowed:
        raise Unavailable(
            f"{what} is not served for {model.model_class}: the gradients through queries, keys, values and MLPs do "
            f"not add up to the gradient of the stream (relative error {worst:.1e}, {allowed:.0e} is rounding). A "
            "layer reads the stream in another way too, such as a gate on its heads."
        )


def feeds_of(graph_heads: Sequence[tuple[int, int]], reading: Reading) -> dict[tuple[int, str], torch.Tensor]:
    """Which heads of queries, keys and values reach which head's output in a run read with gradients.

    Args:
        graph_heads: (layer, heads) of each layer with heads.
        reading: The run.

    Returns:
        (layer, role) → bool `[heads, heads of the queries, keys or values]`.
    """
    found = {}
    for layer, heads in graph_heads:
        outputs = reading.value("attention_head_outputs", layer)
        roots = {role: reading.roots(value, layer) for role, value in HEAD_INPUTS.items()}
        flat = [root for own in roots.values() for root in own]
        rows: dict[str, list[torch.Tensor]] = {role: [] for role in roots}
        for head in range(heads):
            score = (outputs[:, :, head].float() ** 2).sum()
            made = iter(torch.autograd.grad(score, flat, retain_graph=True, allow_unused=True))
            for role, own in roots.items():
                slopes = [torch.zeros_like(root) if g is None else g for root, g in zip(own, made, strict=False)]
                slope = reading.slope(HEAD_INPUTS[role], layer, slopes)
                rows[role].append(slope.abs().sum((0, 1, 3)) > 0)
        found.update({(layer, role): torch.stack(own).cpu() for role, own in rows.items()})
    return found
