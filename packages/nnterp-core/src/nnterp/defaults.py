"""torch's defaults inside a function of nnterp: float32 on the CPU, whatever the caller's are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Run a block, or a decorated function, with torch's own default dtype and device.

    A default dtype (`torch.set_default_dtype`) and a default device (`torch.set_default_device`, or `with
    torch.device("meta"):`) apply to every tensor made without naming them, in transformers too; results must not
    depend on them. The caller's are restored at the end.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # entering a device costs time in every call of torch
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
