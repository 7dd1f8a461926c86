"""Weights under which every part of a model shows in its logits.

The default initialisation (normal, standard deviation 0.02) leaves a residual stream in which no layer, cap, scale or
position can be told from its absence. Here every parameter is redrawn by its shape and by what the model's own
initialisation put there: zeros are offsets, ones are scales, noise is a linear map. A few parameters of state
spaces and the like are listed below: they are drawn from a range of their own, or kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._special_cases import LOUD_ROWS

GAIN = 1.3  # of a linear map; activations stay of order one through its nonlinearity
# Of an affine map back to the residual stream, in architectures without gates. It is smaller because what the map adds
# to all tokens alike (the mean of the activation, attention to the same tokens) would otherwise drown the differences.
OUTPUT_GAIN = 0.65
_OUTPUTS = ("output.dense.weight", "out_proj.weight", "out_lin.weight", "fc2.weight", "lin2.weight", "c_proj.weight")
ROUTER_GAIN = 2.0
STEP_GAIN = 0.6  # of x_proj: step size, input and output maps of a selective state space, which multiply one another
LOGIT_STD = 3.0
SCALE_STD = 0.3
OFFSET_STD = 0.1

# Parameters with a range of their own: (low, high) of a uniform draw.
_RANGES = {
    "A_log": (-2.5, 0.5),  # state decay exp(-dt * exp(A_log)): from a token to dozens of tokens of memory
    "dt_bias": (-1.5, 0.5),  # softplus(dt_bias) is the step size
    "dt_proj.bias": (-1.5, 0.5),
    "dt_proj_bias": (-1.5, 0.5),
    "qk_norm.temp": (1.0, 2.0),  # a factor on the keys that is initialised to zero
}

# Parameters whose own initialisation is already visible and whose valid range is narrow.
_KEPT = (
    "time_decay",
    "time_mix_key",
    "time_mix_value",
    "time_mix_receptance",
    "recurrent_param",
    "alpha_n",
    "alpha_p",
    "lambda_q1",
    "lambda_q2",
    "lambda_k1",
    "lambda_k2",
)


@torch.no_grad()
def make_loud(model: nn.Module, seed: int) -> None:
    """Redraw the parameters of `model` in place; buffers and the global random state stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    ends = _Ends.of(model)
    modules = dict(model.named_modules())
    row = LOUD_ROWS.get(model.config.get_text_config().model_type, {})
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf in _KEPT or "sinusoid" in type(module).__name__.lower():
            continue
        bounds = next((b for suffix, b in _RANGES.items() if name.endswith(suffix)), None)
        if bounds is not None:
            value = torch.rand(parameter.shape, generator=generator) * (bounds[1] - bounds[0]) + bounds[0]
        else:
            value = _scaled(torch.randn(parameter.shape, generator=generator), name, parameter, module, ends)
        value *= next((factor for suffix, factor in row.items() if name.endswith(suffix)), 1.0)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            value[module.padding_idx] = 0  # as initialisation leaves it; some types set it again when they are loaded
        parameter.copy_(value)


@dataclass(frozen=True)
class _Ends:
    """Where the model begins and ends.

    Attributes:
        head_weight: The weight of the unembedding, which may be that of the embedding.
        width: Width of the embedding.
        embedding_std: Standard deviation of embeddings of that width, positions and segments included: they are added
            to one another, so that with tied weights all are as small as the head's.
    """

    head_weight: Any
    width: int
    embedding_std: float

    @classmethod
    def of(cls, model: nn.Module) -> _Ends:
        head_weight = getattr(model.get_output_embeddings(), "weight", None)
        embedding = model.get_input_embeddings()
        assert embedding is not None
        width = embedding.weight.shape[-1]
        tied = embedding.weight is head_weight
        return cls(head_weight, width, LOGIT_STD / math.sqrt(width) if tied else 1.0)


def _scaled(noise: torch.Tensor, name: str, parameter: torch.Tensor, module: nn.Module, ends: _Ends) -> torch.Tensor:
    """Standard normal `noise` scaled for the job of the parameter; what the job is shows in its initialisation."""
    leaf = name.rpartition(".")[2]
    if parameter is ends.head_weight:
        return noise * (LOGIT_STD / math.sqrt(parameter.shape[-1]))
    if isinstance(module, nn.Embedding):
        return noise * (ends.embedding_std if parameter.shape[-1] == ends.width else 1.0)
    if bool((parameter == 1).all()) and "1P" not in type(module).__name__:  # LayerNorm1P adds the one itself
        return 1 + SCALE_STD * noise
    if parameter.ndim == 1 or "bias" in leaf:
        is_scale = "norm" in type(module).__name__.lower() and leaf == "weight"
        return noise * (SCALE_STD if is_scale else OFFSET_STD)
    return noise * (_gain(module, name) / math.sqrt(_fan_in(module, parameter)))


def _gain(module: nn.Module, name: str) -> float:
    if "router" in type(module).__name__.lower() or name.endswith((".gate.weight", ".router.weight")):
        return ROUTER_GAIN
    if name.endswith(_OUTPUTS) and getattr(module, "bias", None) is not None:
        return OUTPUT_GAIN
    return STEP_GAIN if "x_proj" in name else GAIN


def _fan_in(module: nn.Module, parameter: torch.Tensor) -> float:
    shape = parameter.shape
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return math.prod(shape[1:])
    if type(module).__name__ == "Conv1D":  # the transposed linear map of GPT-2
        return shape[0]
    if type(module).__name__.endswith("Experts"):  # [experts, out, in], or [experts, in, out]: the mean serves both
        return math.sqrt(shape[-1] * shape[-2])
    if type(module).__name__ == "XLNetRelativeAttention":  # [hidden, heads, head]
        return shape[0]
    return shape[-1]
