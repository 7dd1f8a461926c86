"""What names alone assume of a forward pass: that layers run once, and that their stream is `[batch, seq, hidden]`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnterp.discovery._probe import Probe
from nnterp.discovery._quiet import quiet
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
    """

    wrong: str = ""
    layout: str = ""
    repeated: tuple[tuple[str, int], ...] = ()
    unknown: str = ""

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
    times: Counter[str] = Counter()
    shapes: list[torch.Size] = []

    def note(path: str, output: Any) -> None:
        times[path] += 1
        if path in layers and not shapes and isinstance(stream := stream_out(output), torch.Tensor):
            shapes.append(stream.shape)

    def watch(path: str) -> Any:
        inner: nn.Module = module.get_submodule(path)
        return inner.register_forward_hook(lambda _, args, output: note(path, output))

    handles = [watch(path) for path in dict.fromkeys((*layers, *encoder, *ends))]
    try:
        with quiet(module):
            module(**probe.inputs)
    except Exception as error:
        return Assumed(unknown=f"its own forward pass fails on a text ({type(error).__name__}: {str(error)[:200]})")
    finally:
        for handle in handles:
            handle.remove()
    looped = [f"{path} runs {times[path]} times in a forward pass" for path in (*layers, *encoder) if times[path] > 1]
    repeated = tuple((path, count) for path, count in times.items() if count > 1)
    return Assumed(looped[0] if looped else "", _odd_layout(shapes, tuple(probe.ids.shape)), repeated)


def _odd_layout(shapes: list[torch.Size], given: tuple[int, ...]) -> str:
    """What is odd about the stream that the first layer returns for an input of this shape; "" if nothing is."""
    if not shapes:
        return ""
    layout, (batch, seq) = StreamLayout.of(shapes[0], *given), given
    if layout is not None and layout.plain and layout.stored is None and not layout.extra:
        return ""
    return f"its layers return {list(shapes[0])} for an input of [{batch}, {seq}], and no [batch, seq, hidden]"
