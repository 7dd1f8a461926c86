"""From a hidden state to logits (now in `nnterp.traced`)."""

from nnterp.traced import Chain, Readout, StreamLayout

__all__ = ["Chain", "Readout", "StreamLayout"]
