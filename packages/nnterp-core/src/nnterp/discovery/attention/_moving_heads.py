"""Find the heads in W_O's input by removing head 0: the block that changes is its own."""

from __future__ import annotations

import torch

from nnterp.anatomy import Layer
from nnterp.discovery._linears import feeding, linears
from nnterp.discovery._probe import ROWS, Probe
from nnterp.discovery._recording import Recording
from nnterp.discovery.attention._attention import Attention
from nnterp.discovery.attention._heads import split_heads
from nnterp.eager import eagerly
from nnterp.tensors import same
from nnterp.traced import Everywhere, Inside, Place, Site, View
from nnterp.wording import generic_path

Blocks = tuple[int | None, int | None]  # number of head blocks in W_O's input, and in that of the projection before it


class MovingHeads:
    """Finds the heads of attentions in which the input of W_O is not exactly the probabilities times the values.

    The probabilities of head 0 are set to zero; the part of W_O's input that changes is head 0's block. If another
    projection mixes the heads before W_O (DeepSeek-V4's, over groups of heads), the heads are the input of that one.
    Layers that run the same code share one trial.

    Args:
        probe: A short prompt for the model.
        recording: A forward pass of the probe in which all modules' calls were recorded.
    """

    def __init__(self, probe: Probe, recording: Recording) -> None:
        self.probe, self.recording = probe, recording
        self.tried: dict[tuple, Blocks] = {}

    def prove(self, layer: Layer, attention: Attention) -> None:
        """Correct the places of one attention's heads, or replace them by a reason. Does nothing if they are proven."""
        if attention.exact or attention.out is None or "attention_head_outputs" not in attention.places:
            return
        operations = _operations_of(attention.places.get("attention_probabilities"))
        heads = attention.heads or 0
        if not operations or heads < 2:
            return
        assert layer.self_attn is not None
        before_out = feeding(
            linears(self.probe.module, layer.self_attn, self.recording), attention.out, self.probe.tolerance
        )
        kind = (*((o.labels, generic_path(o.path)) for o in operations), generic_path(attention.out), heads)
        if kind not in self.tried:
            self.tried[kind] = self.blocks(operations, attention, before_out)
        self.apply(attention, before_out, *self.tried[kind])

    def blocks(self, operations: list[Inside], attention: Attention, before_out: str | None) -> Blocks:
        """Run the probe with and without head 0 and count the head blocks."""
        assert attention.out is not None
        watched = [path for path in (attention.out, before_out) if path is not None]
        edits = {(o.path, o.labels): without_first_head for o in operations}
        with eagerly(self.probe.module):
            before = self.probe.record(modules=watched)
            after = self.probe.record(
                modules=watched, operations=dict.fromkeys(o.path for o in operations), edits=edits, arguments=False
            )
        counts = []
        for path in (attention.out, before_out):
            whole, without = (None, None) if path is None else (before.given(path), after.given(path))
            counted = whole is not None and without is not None and whole.dim() > 2
            counts.append(
                head_blocks(whole.flatten(2), without.flatten(2), attention.heads or 0, attention.value_dim)  # type: ignore[union-attr]
                if counted
                else None
            )
        return counts[0], counts[1]

    def apply(self, attention: Attention, before_out: str | None, direct: int | None, grouped: int | None) -> None:
        """Change an attention: its heads are blocks in W_O's input, in that of `before_out`, or in neither."""
        attention.out_heads = direct or grouped
        place: Place | None = None
        if direct is None and grouped is not None and before_out is not None:
            given = self.recording.given(before_out)
            assert given is not None
            attention.before_out = (before_out, (*given.shape[2:-1], -1))
            place = split_heads(Site(before_out, "input"), grouped, grouped=True)
        elif direct is not None and attention.out is not None:
            place = split_heads(Site(attention.out, "input"), direct)
        for name in ("attention_head_outputs", "attention_head_contributions"):
            if place is None:
                del attention.places[name]
                attention.reasons[name] = (
                    f"the heads are mixed before the projection that ends attention ({attention.out})"
                )
            else:
                attention.places[name] = place


def _operations_of(place: Place | None) -> list[Inside]:
    """The operations that a place reads."""
    if isinstance(place, Everywhere):
        return [operation for inner in place.places for operation in _operations_of(inner)]
    if isinstance(place, View):
        return _operations_of(place.place)
    return [place] if isinstance(place, Inside) else []


def without_first_head(output: torch.Tensor) -> torch.Tensor:
    """A copy of the probabilities with those of head 0 at zero.

    Args:
        output: `[rows, heads, query, key]`, or `[rows × heads, query, key]`.
    """
    output = output.clone()
    if output.dim() == 4:
        output[:, 0] = 0
    else:
        output[:: output.shape[0] // ROWS] = 0
    return output


def head_blocks(before: torch.Tensor, after: torch.Tensor, heads: int, width_of_head: int | None) -> int | None:
    """Number of head blocks in W_O's input, found by what changes when head 0 is removed.

    Pairs of heads may share a block (DiffLlama subtracts one from the other), and a norm over all heads may rescale the
    other blocks together (BitNet). None if the heads are mixed before W_O.

    Args:
        before: W_O's input, `[rows, seq, width]`.
        after: The same with the probabilities of head 0 at zero.
        heads: Heads of the probabilities.
        width_of_head: Width of one head's block, where it is known.
    """
    width = before.shape[-1]
    for count in (heads, heads // 2):
        if count < 2 or width % count:
            continue
        own = width // count
        if width_of_head is not None and own != width_of_head:
            continue
        moved = (after - before)[..., :own].abs().max()
        x, y = before[..., own:].double(), after[..., own:].double()
        factor = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp(min=1e-30)
        if moved > 1e-4 * before.abs().max() and same(y, x * factor, 1e-4):
            return count
    return None
