"""The tokens that a vector promotes and demotes when it is read out directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnterp.interventions._results import Result, describe_run, token_bytes_of, vocabulary_of
from nnterp.interventions._vectors._belonging import Belonging

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@torch.no_grad()
def promoted(model: StandardizedTransformer, vector: Belonging, k: int) -> Result:
    """See `SteeringVector.logits`."""
    model.require_no_trace("SteeringVector.logits()")
    vector.check(model)
    model.dispatch()
    stacked = torch.stack(list(vector.directions.values())).to(model._module.dtype)
    both = model.project_on_vocab(torch.stack([stacked, -stacked])).float().cpu()
    logits = (both[0] - both[1]) / 2
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k!r}; give a number of tokens from 1 to {logits.shape[-1]}.")
    (up, up_ids), (down, down_ids) = logits.topk(k), logits.topk(k, largest=False)
    tensors = {"promoted": up, "demoted": down, "promoted_ids": up_ids, "demoted_ids": down_ids}
    vocabulary = vocabulary_of(model, torch.cat([up_ids, down_ids]))
    return Result(
        tensors,
        dict.fromkeys(tensors, ("layers", "rank")),
        {"layers": vector.layers, "rank": tuple(range(k))},
        vocabulary=vocabulary,
        token_bytes=token_bytes_of(model, vocabulary),
        about=describe_run(model, "SteeringVector.logits", k=k, method=vector.method),
    )
