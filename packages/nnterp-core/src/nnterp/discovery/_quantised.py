"""Linear modules whose weights are quantised: what they are not, beside a matrix and a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nnterp.discovery._linears import is_linear
from nnterp.errors import Unavailable
from nnterp.huggingface import dtype_of

ROWS = 8
SLOPES = 0.1  # largest relative error of a gradient: rounding what is given to 8 bits makes about 0.01


def quantised_linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of each linear module whose weights are no plain floating tensors."""
    for path, module in root.named_modules():
        if is_linear(module) and not _is_plain(module):
            yield path, module


def mixes_rows(root: nn.Module) -> str:
    """Why a quantised module's result at a position depends on other positions and rows; "" if none does.

    LLM.int8() (Dettmers et al. 2022, section 3.2) computes a feature in 16 bits if it is large at any position of a
    batch, and in 8 bits at all of them otherwise.
    """
    for path, module in quantised_linears(root):
        threshold = getattr(getattr(module, "state", None), "threshold", None)
        if type(module).__name__ == "Linear8bitLt" and threshold:
            return (
                f"{path} is computed with LLM.int8() and llm_int8_threshold={threshold}, so that what it returns at a "
                "position depends on all other positions and rows of the batch: load the model with "
                "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 bits"
            )
    return ""


@torch.no_grad()
def not_additive(root: nn.Module, path: str) -> str:
    """Why the parts of what a module is given do not add up to what it returns of the whole; "" if they do.

    A module that rounds what it is given is not linear. Only quantised ones are tried.
    """
    module = root.get_submodule(path)
    if _is_plain(module) or not is_linear(module):
        return ""
    whole = _given(root, module)
    if whole is None:
        return ""
    half = whole.clone()
    half[..., : whole.shape[-1] // 2] = 0
    at_zero = module(torch.zeros_like(whole))
    sums, made = module(half) + module(whole - half) - at_zero, module(whole)
    error = float((sums.double() - made.double()).norm() / made.double().norm().clamp(min=1e-30))
    if error <= max(1e-4, 8 * torch.finfo(whole.dtype).eps):
        return ""
    return f"{path} ({type(module).__name__}) rounds what it is given, so heads do not add up (off by {error:.1e})"


def require_gradients(root: nn.Module) -> None:
    """Raise if a quantised module of a model hands on no gradient, or a wrong one.

    One module of each kind is tried: for random g and d, g · (f(d) − f(0)) is the gradient of g · f times d.

    Raises:
        Unavailable: Names the module, and what to do.
    """
    tried: set[tuple[type, type]] = set()
    for path, module in quantised_linears(root):
        kind = type(module), type(getattr(module, "weight", None))
        if kind in tried:
            continue
        tried.add(kind)
        if not _hands_on_gradients(root, module):
            raise Unavailable(
                f"Gradients cannot be taken: {path} ({' of '.join(one.__name__ for one in kind)}) is quantised and "
                "hands on no gradient, or a wrong one. Load the model with weights alone quantised (bitsandbytes in 4 "
                "bits, torchao's Int8WeightOnlyConfig), or not quantised."
            )


def _hands_on_gradients(root: nn.Module, module: nn.Module) -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        x = _given(root, module)
        if x is None:
            return True
        x.requires_grad_()
        y = module(x)
        if not y.requires_grad:
            return False
        along = _random(y.shape, 1).to(y)
        (slope,) = torch.autograd.grad(y, x, along, allow_unused=True)
    if slope is None:
        return False
    with torch.no_grad():
        step = _random(x.shape, 2).to(x)
        made = ((module(step) - module(torch.zeros_like(step))).double() * along).sum(-1)
        found = (slope.double() * step).sum(-1)
    return bool((made - found).norm() <= SLOPES * made.norm())


def _is_plain(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()


def _given(root: nn.Module, module: nn.Module) -> torch.Tensor | None:
    """A random input `[1, ROWS, in]`; None if the module does not say how wide its input is."""
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        return None
    tensors = (*module.parameters(), *module.buffers())
    device = next((one.device for one in tensors if one.device.type != "meta"), torch.device("cpu"))
    return _random((1, ROWS, width), 0).to(device, dtype_of(root))


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
