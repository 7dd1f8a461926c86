"""What each head adds to what attention returns.

W_O is applied to one head at a time, the others at zero, and what it returns for zeros is subtracted. That is right for
any module that is linear up to a bias, quantised or adapted ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnterp.record import Record
from nnterp.traced._apart import Apart

if TYPE_CHECKING:
    from nnterp.traced._running import Place, Running


class ThroughOut(Record):
    """Each head's part of what W_O returns.

    Attributes:
        heads: Where the heads are.
        path: W_O.
        before: (path, shape of one position's input) of a projection that stands between them.
    """

    def __init__(self, heads: Place, path: str, before: tuple[str, tuple[int, ...]] | None = None) -> None:
        self.heads, self.path, self.before = heads, path, before

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[batch, seq, heads, hidden]`; a new tensor."""
        return self.through(model, self.heads.read(model, label))

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Make W_O return their sum and its bias."""
        bias = self.through(model, self.heads.read(model, label), bias_only=True)
        envoy = model.envoy(self.path)
        output = envoy.output
        envoy.output = (tensor.sum(2) + bias).reshape(output.shape)

    def through(self, model: Running, z: torch.Tensor, bias_only: bool = False) -> torch.Tensor:
        """Heads `[batch, seq, heads, head_dim]` through W_O, apart from the running forward pass."""
        out = model._module.get_submodule(self.path)
        batch, seq, heads, width = z.shape
        with Apart(model.interleaver):
            bias = self.project(model, z.new_zeros(1, 1, heads * width))
            if bias_only:
                return bias
            weight: Any = getattr(out, "weight", None)
            plain = type(out) is nn.Linear and self.before is None and type(weight) is nn.Parameter
            if plain and weight.device.type != "meta" and weight.shape[1] == heads * width:  # not offloaded
                return torch.einsum("bshd,ohd->bsho", z, weight.view(-1, heads, width).to(z.device))
            alone = z.new_zeros(heads, batch, seq, heads, width)
            index = torch.arange(heads, device=z.device)
            alone[index, :, :, index] = z.permute(2, 0, 1, 3)
            made = self.project(model, alone.reshape(heads * batch, seq, heads * width)) - bias
            return made.view(heads, batch, seq, -1).permute(1, 2, 0, 3)

    def project(self, model: Running, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, heads × head_dim]` to what W_O returns of it."""
        if self.before is not None:
            path, shape = self.before
            x = model._module.get_submodule(path)(x.reshape(*x.shape[:2], *shape)).flatten(2)
        return model._module.get_submodule(self.path)(x)

    def __str__(self) -> str:
        first = "" if self.before is None else f"{self.before[0]} and "
        return f"each head of {self.heads}, through {first}{self.path}"
