"""Which columns of which projection make each head's query, key or value: a short way back from a head to the stream.

What leaves a projection is a matrix times what enters it, so that the gradient through one head's columns is a product
with these columns alone. Autograd would multiply with the whole matrix for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nnterp.interventions._circuits._graph import HEAD_INPUTS, Block, Columns, Graph
from nnterp.interventions._circuits._readings import Reading
from nnterp.values import Site

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def matrix_of(model: StandardizedTransformer, path: str) -> torch.Tensor | None:
    """The matrix of a projection, `[out, in]`; None if the module is more than a matrix and a bias."""
    module = model._module.get_submodule(path)
    if not isinstance(module, (nn.Linear, Conv1D)) or type(module) not in (nn.Linear, Conv1D):
        return None
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or type(weight) is not nn.Parameter or weight.device.type == "meta":
        return None
    if module._forward_hooks or module._forward_pre_hooks:  # weights that are fetched when it runs
        return None
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def projections_of(model: StandardizedTransformer, block: Block) -> list[str]:
    """Paths of the linear modules inside the attention of one layer."""
    attention = model.anatomy.blocks[block.layer].self_attn
    if not block.heads or attention is None or attention.path is None:
        return []
    inside = model._module.get_submodule(attention.path).named_modules(prefix=attention.path)
    return [path for path, module in inside if type(module) in (nn.Linear, Conv1D)]


def columns_of(graph: Graph, reading: Reading) -> dict[int, Columns]:
    """For the inputs of a layer whose heads are made of columns of their own, these columns; by index of the input.

    Args:
        graph: The graph.
        reading: A run read with gradients.
    """
    found: dict[int, Columns] = {}
    for block in graph.blocks:
        paths = [path for path in reading.projections if path in projections_of(reading.model, block)]
        own = _of_layer(graph, reading, block, paths) if paths else {}
        marked: dict[str, list[int]] = {}
        for path, columns in own.values():
            marked.setdefault(path, []).extend(columns)
        if all(len(set(columns)) == len(columns) for columns in marked.values()):
            found.update(own)
    return found


def _of_layer(graph: Graph, reading: Reading, block: Block, paths: list[str]) -> dict[int, Columns]:
    outputs = [reading.tensors[Site(path, "output")] for path in paths]
    found: dict[int, Columns] = {}
    for role, value in HEAD_INPUTS.items():
        made = reading.value(value, block.layer)
        for head, i in enumerate(graph.inputs_of[block.layer, role]):
            score = (made[:, :, head].float() ** 2).sum()
            slopes = torch.autograd.grad(score, outputs, retain_graph=True, allow_unused=True)
            touched = [
                Columns(path, tuple((slope.flatten(0, -2) != 0).any(0).nonzero()[:, 0].tolist()))
                for path, slope in zip(paths, slopes, strict=True)
                if slope is not None and bool(slope.any())
            ]
            if len(touched) != 1 or matrix_of(reading.model, touched[0].path) is None:
                return {}
            found[i] = touched[0]
    return found


def through_columns(
    reading: Reading, columns: Mapping[int, Columns], slopes: Mapping[str, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """The gradient of what enters the projections through single inputs, by index of the input.

    Args:
        reading: The run.
        columns: Those of the inputs.
        slopes: Path → the gradient of what the projection returns.
    """
    found = {}
    for i, (path, own) in columns.items():
        matrix, slope = matrix_of(reading.model, path), slopes[path]
        assert matrix is not None
        index = torch.tensor(own, device=slope.device)
        entering = reading.tensors[Site(path, "input")]
        found[i] = (slope[..., index] @ matrix[index].to(slope)).view(entering.shape)
    return found
