"""One norm of a model with its scale held still: the linear map that it is in one run, forwards and backwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from nnterp.frozen import FrozenParts, Holding
from nnterp.traced import Apart

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


class HeldNorm:
    """A norm as the affine map that it is when its scale is held still: an RMSNorm's factors, or LayerNorm's centring,
    factors and bias.

    Args:
        model: The model.
        path: The norm's module; None for no norm at all, whose map is the identity.
    """

    def __init__(self, model: StandardizedTransformer, path: str | None) -> None:
        self.model, self.path = model, path

    def push(self, given: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The linear map of vectors, the scale held at what it is for `given`.

        Args:
            given: What the norm is given in the run, `[..., hidden]`.
            vectors: `[..., n, hidden]`.
        """
        if self.path is None:
            return vectors
        with held_norms(self.model, self.path):
            x = leaf(self._cast(given).unsqueeze(-2).expand(vectors.shape))
            y = self._module(x)
            cotangent = torch.zeros_like(y, requires_grad=True)
            (back,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
            (made,) = torch.autograd.grad(back, cotangent, vectors.detach().to(back))
        return made.to(vectors)

    def pull(self, given: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """The transposed map: `pull(given, d) · v = d · push(given, v)`.

        Args:
            given: What the norm is given in the run, `[..., hidden]`.
            direction: `[..., hidden]`.
        """
        if self.path is None:
            return direction
        with held_norms(self.model, self.path):
            x = leaf(self._cast(given))
            y = self._module(x)
            (made,) = torch.autograd.grad(y, x, direction.detach().to(y))
        return made.to(direction)

    @torch.no_grad()
    def bias(self, like: torch.Tensor) -> torch.Tensor:
        """What it adds to the linear map, `[1, hidden]`: what it makes of zero."""
        zero = torch.zeros(1, like.shape[-1], dtype=like.dtype, device=like.device)
        if self.path is None:
            return zero
        with Apart(self.model.interleaver):
            return self._module(self._cast(zero)).to(zero)

    @property
    def _module(self) -> torch.nn.Module:
        assert self.path is not None
        return self.model._module.get_submodule(self.path)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the dtype that the module is given in a forward pass."""
        return tensor.to(self.model._module.dtype)


@contextlib.contextmanager
def held_norms(model: StandardizedTransformer, *paths: str) -> Iterator[None]:
    """A block in which gradients flow, and the scales of these norms are held still; no trace sees what runs in it."""
    parts = FrozenParts((), (), (), paths, (), (), ())
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        Apart(model.interleaver),
        Holding(model._module, parts, ("norms",)),
    ):
        yield


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at which a graph begins, also of a tensor made under inference mode."""
    return tensor.detach().clone().requires_grad_(True)
