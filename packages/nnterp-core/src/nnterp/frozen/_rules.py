"""What is held still in one call of a function of torch. Every rule gives the function's own numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnterp.frozen._tape import replaying, still

Call = Callable[..., Any]


def through(value: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """The numbers of `value` with the gradient of `line`: nothing is added to the numbers but an exact zero.

    Where constants of another pass are replayed, `line` itself.
    """
    if replaying():
        return line.to(value.dtype)
    return value.detach() + (line - line.detach()).to(value.dtype)


def with_slope(value: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """An activation as the product of what it is given and a factor that is held still: act(x) = x · (act(x)/x).

    Args:
        value: What the activation made.
        given: What it was given, of the same shape. Where it is 0, the factor is 0.
    """
    wide, made = given.detach().double(), value.detach().double()
    factor = torch.where(wide == 0, torch.zeros_like(wide), made / torch.where(wide == 0, torch.ones_like(wide), wide))
    return through(value, given * still(factor.to(given.dtype)))


def detached(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result as a constant."""
    return still(func(*args, **kwargs))


def later_detached(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`std_mean`, `var_mean`: the first result as a constant."""
    scale, mean = func(*args, **kwargs)
    return still(scale), mean


def root(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A power below 1, as a constant: 1/rms is a mean of squares to the power −½. Others are left as they are."""
    power = kwargs.get("exponent", args[1] if len(args) > 1 else 1)
    out = func(*args, **kwargs)
    return still(out) if isinstance(power, (int, float)) and power < 1 else out


def sdpa(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Fused attention with constant queries, keys and mask: the gradient flows through the values alone."""
    still = {"query", "key", "attn_mask"}
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    constant = tuple(_constant(x) if i in (0, 1, 3) else x for i, x in enumerate(args))
    line = func(*constant, **{name: _constant(x) if name in still else x for name, x in kwargs.items()})
    if mask is None or not mask.requires_grad or replaying():
        return line
    return through(func(*args, **kwargs), line)  # torch takes another kernel for a mask with a gradient


def _constant(x: Any) -> Any:
    return still(x) if isinstance(x, torch.Tensor) else x


def layer_norm(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Fused LayerNorm: x − mean(x) is linear and kept, 1/std is a constant."""
    x, shape, weight, bias, eps = _bound(args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"), 1e-5)
    wide = _wide(x)
    dims = tuple(range(-len(shape), 0))
    centred = wide - wide.mean(dims, keepdim=True)
    line = centred * still(torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps))
    return through(func(*args, **kwargs), _affine(line, weight, bias))


def rms_norm(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Fused RMSNorm: 1/rms is a constant."""
    x, shape, weight, eps = _bound(args, kwargs, ("input", "normalized_shape", "weight", "eps"), None)
    wide = _wide(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    line = wide * still(torch.rsqrt(wide.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + eps))
    return through(func(*args, **kwargs), _affine(line, weight, None))


def normalize(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`torch.nn.functional.normalize`: the length is a constant."""
    x, p, dim, eps = _bound(args, kwargs, ("input", "p", "dim", "eps"), 1e-12, p=2.0, dim=1)
    line = x / still(torch.linalg.vector_norm(x, p, dim, keepdim=True).clamp_min(eps))
    return through(func(*args, **{k: v for k, v in kwargs.items() if k != "out"}), line)


def glu(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`torch.nn.functional.glu`: the sigmoid of the gate is a constant."""
    x, dim = _bound(args, kwargs, ("input", "dim"), -1)
    kept, gate = x.chunk(2, dim)
    return through(func(*args, **kwargs), kept * still(torch.sigmoid(gate)))


def sloped(func: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An activation with its slope as a constant."""
    given = args[0] if args else kwargs["input"]
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    return with_slope(func(*args, **kwargs), given)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _affine(line: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    line = line if weight is None else line * weight
    return line if bias is None else line + bias


def _bound(args: tuple, kwargs: dict[str, Any], names: tuple[str, ...], last: Any, **defaults: Any) -> list[Any]:
    """A call's arguments by name; `last` is the default of the last one."""
    given = {**defaults, names[-1]: last, **dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]


SCALES: dict[str, Any] = {  # anywhere in the model
    "rsqrt": detached,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "normalize": normalize,
}
ROOTS: dict[str, Any] = {  # in a norm's module
    **dict.fromkeys(("sqrt", "norm", "vector_norm", "std", "var"), detached),
    **dict.fromkeys(("std_mean", "var_mean"), later_detached),
    **dict.fromkeys(("pow", "__pow__", "float_power"), root),
}
PATTERNS: dict[str, Any] = {"softmax": detached, "scaled_dot_product_attention": sdpa}  # in an attention
WEIGHTS: dict[str, Any] = dict.fromkeys(("softmax", "sigmoid"), detached)  # in a feed-forward: routers, gates
ACTIVATIONS = frozenset(
    ("silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "softplus", "mish", "hardswish", "tanh")
)
