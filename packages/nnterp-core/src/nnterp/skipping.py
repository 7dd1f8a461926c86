"""Leave layers out of the running forward pass (now in `nnterp.traced`)."""

from nnterp.traced import skip_layers

__all__ = ["skip_layers"]
