"""What names alone assume of a forward pass: that layers run once, and that their stream is `[batch, seq, hidden]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnterp.discovery._probe import Probe
from nnterp.discovery._quiet import quiet
from nnterp.discovery._recording import record
from nnterp.table import Side
from nnterp.tensors import stream_out
from nnterp.traced import StreamLayout


@dataclass(frozen=True)
class Assumed:
    """Whether what is assumed of a model that nothing has proven holds in one forward pass.

    Attributes:
        wrong: What does not hold of the layers; "" if all does.
        layout: What is odd about the axes of their stream; "" if it is `[batch, seq, hidden]`.
        repeated: Modules that run more than once → how often.
        unknown: Why that could not be found out; "" if it was.
        edited: (path, side) of the modules whose input or output the model's own code edits in place later.
    """

    wrong: str = ""
    layout: str = ""
    repeated: tuple[tuple[str, int], ...] = ()
    unknown: str = ""
    edited: frozenset[tuple[str, Side]] = frozenset()

    def wrong_of(self, path: str | None, of_stream: bool) -> str:
        """What does not hold of the layers, of one module beside them, or of values on the axes of the stream."""
        times = dict(self.repeated).get(path or "")
        often = f"{path} runs {times} times in a forward pass" if times else ""
        return self.wrong or often or (self.layout if of_stream else "")


def find_assumed(probe: Probe) -> Assumed:
    """Run one forward pass of the plain module, count the runs of its parts, and look at what its layers return."""
    anatomy, module = probe.anatomy, probe.module
    layers = list(dict.fromkeys(layer.path for layer in anatomy.blocks))
    encoder = [] if anatomy.encoder is None else [layer.path for layer in anatomy.encoder.blocks]
    ends = [path for path in (anatomy.embed_tokens, anatomy.ln_final, anatomy.lm_head) if path is not None]
    inside = [
        f"{path}.{name}"
        for path in (*layers, *encoder)
        for name, _ in module.get_submodule(path).named_modules()
        if name
    ]
    try:
        with quiet(module):
            run = record(module, lambda: module(**probe.inputs), modules=(*layers, *encoder, *ends, *inside))
    except torch.OutOfMemoryError:  # it says nothing of the model, and what is returned is kept
        raise
    except Exception as error:
        return Assumed(unknown=f"its own forward pass fails on a text ({type(error).__name__}: {str(error)[:200]})")
    times = {path: len(run.calls.get(path, ())) for path in (*layers, *encoder, *ends)}
    looped = [f"{path} runs {times[path]} times in a forward pass" for path in (*layers, *encoder) if times[path] > 1]
    streams = [stream_out(calls[0].output) for path, calls in run.calls.items() if path in layers]
    shapes = [stream.shape for stream in streams if isinstance(stream, torch.Tensor)]
    return Assumed(
        wrong=looped[0] if looped else "",
        layout=_odd_layout(shapes, tuple(probe.ids.shape)),
        repeated=tuple((path, count) for path, count in times.items() if count > 1),
        edited=frozenset(run.edited),
    )


def _odd_layout(shapes: list[torch.Size], given: tuple[int, ...]) -> str:
    """What is odd about the stream that the first layer returns for an input of this shape; "" if nothing is."""
    if not shapes:
        return ""
    layout, (batch, seq) = StreamLayout.of(shapes[0], *given), given
    if layout is not None and layout.plain and layout.stored is None and not layout.extra:
        return ""
    return f"its layers return {list(shapes[0])} for an input of [{batch}, {seq}], and no [batch, seq, hidden]"
