"""How a layer combines its parts: which multiples of which module outputs are added to the residual stream.

The structure is not assumed but solved for. With `x` entering a layer, `y` leaving it and `p_k` what its parts return,
the coefficients of `y = s x + sum_k c_k p_k` are found by least squares over all positions and channels; a fit to
rounding error is proof, because there are a few unknowns and hundreds of equations for them. Each part is tried as it
leaves its module, as it leaves the norms and convolutions that follow it, and as the last projection inside it returns
it; with one coefficient for all channels, and with one for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nnterp.anatomy import Layer, Part
from nnterp.discovery._recording import Call, Recording
from nnterp.tensors import relative_error

Scale: TypeAlias = float | torch.Tensor


@dataclass(frozen=True)
class Term:
    """One addend: the output of the module at `path`, times `scale` (one number, or one per channel)."""

    path: str
    scale: Scale


@dataclass(frozen=True)
class Contribution:
    """What one part adds to the residual stream: the sum of its terms, and a constant per channel if there is one."""

    terms: tuple[Term, ...]
    constant: torch.Tensor | None = None


@dataclass(frozen=True)
class ResidualStructure:
    """How one layer's parts make its output.

    Attributes:
        kind: "sequential" (the MLP reads the stream after attention), "parallel" (both read the same stream), "single"
            (one part), "post-norm" (the stream is normalised after each addition, as in BERT), "normed stream" (what is
            carried on is the normalised stream, as in MiniMax), or "unknown".
        mixer: What the sequence mixer adds; for layers with two mixers side by side, what both add.
        mlp: What the feed-forward adds.
        other: What further modules of the layer add (per-layer embeddings of Gemma 3n and 4).
        stream_scale: What the incoming stream is multiplied by: 1 for nearly every model.
        error: Relative error of the identity, the worst over positions.
        reason: For "unknown", why.
        mid: Path of the module that holds the stream between the two parts, and `mid_side`, whether as its input or its
            output; None where there is no such stream.
    """

    kind: str
    mixer: Contribution | None = None
    mlp: Contribution | None = None
    other: Contribution | None = None
    stream_scale: Scale = 1.0
    error: float | None = None
    reason: str = ""
    mid: str | None = None
    mid_side: str = "input"


def solve_residual(
    layer: Layer,
    recording: Recording,
    inside: Sequence[str],
    tolerance: float,
    operations: Mapping[str, Call] | None = None,
) -> ResidualStructure:
    """Find how one layer combines its parts.

    Args:
        layer: The layer.
        recording: A forward pass in which the modules at `inside` and the layer's parts were watched.
        inside: Paths of modules inside the layer whose outputs may be terms.
        tolerance: The largest relative error that counts as equal.
        operations: For parts that leave inside their module, their ends (`Part.end`) and what was made there.
    """
    call = recording.call(layer.path)
    if call is None:
        return ResidualStructure("unknown", reason="the layer did not run")
    x, y = call.stream_in, call.stream_out
    if x is None or y is None or x.shape != y.shape:
        return ResidualStructure("unknown", reason="the layer's output does not have the shape of its input")
    return _Solver(layer, recording, call, inside, x, y, tolerance, operations or {}).solve()


class _Solver:
    def __init__(
        self,
        layer: Layer,
        recording: Recording,
        call: Call,
        inside: Sequence[str],
        x: torch.Tensor,
        y: torch.Tensor,
        tolerance: float,
        operations: Mapping[str, Call],
    ) -> None:
        self.layer, self.x, self.y, self.tolerance = layer, x, y, tolerance
        self.given: dict[str, torch.Tensor] = {}
        self.made: dict[str, torch.Tensor] = {}
        self.began: dict[str, int] = {}
        for path in (*inside, *(p for p in operations if p.startswith(f"{layer.path}."))):
            own = operations.get(path) or recording.within(path, call)
            if own is None:
                continue
            self.began[path] = own.began
            for table, stream in ((self.given, own.stream_in), (self.made, own.stream_out)):
                if stream is not None and stream.numel() == x.numel() and stream.shape[-1] == x.shape[-1]:
                    table[path] = stream.reshape(x.shape)  # some feed-forwards work on [batch * seq, hidden]
        self.order = sorted(self.made, key=self.began.__getitem__)

    def solve(self) -> ResidualStructure:
        mixers = list(dict.fromkeys(p.exit for p in (self.layer.mixer, self.layer.self_attn) if p is not None))
        mlp = self.layer.mlp.exit if self.layer.mlp is not None else None
        exits = [*mixers, *([mlp] if mlp is not None else [])]
        if not exits:
            return ResidualStructure("unknown", reason="the layer has no parts of its own")
        parts = {p.exit: p for p in (self.layer.mixer, self.layer.self_attn, self.layer.mlp) if p is not None}
        options = [list(self.forms(parts[path])) for path in exits]
        if silent := [path for path, forms in zip(exits, options, strict=True) if not forms]:
            return ResidualStructure("unknown", reason=f"{', '.join(silent)} returns no stream of the layer's shape")
        best = float("inf")
        for per_channel in (False, True):
            for chosen in itertools.product(*options):
                for extra in ((), *self.extras(exits)):
                    paths = [*chosen, *extra]
                    if len(set(paths)) < len(paths):
                        continue
                    fit = _fit(self.y, [self.x, *(self.made[p] for p in paths)], per_channel)
                    best = min(best, fit.error)
                    if fit.error <= self.tolerance and fit.whole:
                        return self.additive(paths, len(mixers), mlp is not None, fit, per_channel)
        staged = self.staged(mixers, mlp, options) if mixers and mlp is not None else None
        if staged is not None:
            return staged
        if len(mixers) > 1:  # Zamba's attention speaks to the layer's Mamba, which alone writes to the stream
            for form in options[0]:
                fit = _fit(self.y, [self.x, self.made[form]], False)
                if fit.error <= self.tolerance and fit.whole:
                    return ResidualStructure(
                        "single", Contribution((Term(form, fit.scales[1]),)), None, None, fit.scales[0], fit.error
                    )
        return ResidualStructure(
            "unknown", error=best, reason="no multiples of its parts add up to what the layer adds"
        )

    def forms(self, part: Part) -> Iterator[str]:
        """The modules whose output may be what a part adds: after what follows it, itself, its last projection."""
        if part.leaves:
            yield part.end
            return
        if part.exit in self.made:
            found, current = [part.exit], self.made[part.exit]
            for path in self.order:
                if (
                    path not in found
                    and self.began[path] > self.began[part.exit]
                    and _same(self.given.get(path), current)
                ):
                    found.append(path)
                    current = self.made[path]
            yield from reversed(found)
        inner = [p for p in self.order if p.startswith(f"{part.exit}.")]
        if inner:
            yield inner[-1]

    def extras(self, exits: list[str]) -> list[tuple[str, ...]]:
        """Modules of the layer that are in none of its parts and may add something of their own."""
        depth = self.layer.path.count(".") + 1
        return [
            (p,)
            for p in self.order
            if p.count(".") == depth and not any(e == p or e.startswith(f"{p}.") for e in exits)
        ]

    def additive(self, paths: list[str], mixers: int, has_mlp: bool, fit: _Fit, per_channel: bool) -> ResidualStructure:
        terms = [Term(path, scale) for path, scale in zip(paths, fit.scales[1:], strict=True)]
        used = mixers + has_mlp
        mixer = Contribution(tuple(terms[:mixers]), fit.constant) if mixers else None
        mlp = Contribution(tuple(terms[mixers:used])) if has_mlp else None
        other = Contribution(tuple(terms[used:])) if len(terms) > used else None
        if mixer is None or mlp is None:
            return ResidualStructure("single", mixer, mlp, other, fit.scales[0], fit.error)
        after = max(self.began[t.path] for t in mixer.terms)
        for path in sorted(self.given, key=self.began.__getitem__):
            if self.began[path] > after:
                mid = _fit(self.given[path], [self.x, *(self.made[t.path] for t in mixer.terms)], per_channel)
                if mid.error <= self.tolerance and mid.whole:
                    return ResidualStructure("sequential", mixer, mlp, other, fit.scales[0], fit.error, mid=path)
        return ResidualStructure("parallel", mixer, mlp, other, fit.scales[0], fit.error)

    def staged(self, mixers: list[str], mlp: str, options: list[list[str]]) -> ResidualStructure | None:
        """A norm stands between the additions: `mid = x' + mixer`, `y = mid' + mlp`, where a prime may be a norm."""
        starts = [self.x, *(self.made[p] for p in self.order if _same(self.given.get(p), self.x))]
        ends = [(self.y, "")] + [
            (self.given[p], p) for p in self.order if p in self.given and _same(self.made[p], self.y)
        ]
        for mixed in itertools.product(*options[: len(mixers)]):
            after = max(self.began[p] for p in mixed)
            for path in self.order:
                middle = self.given.get(path)
                if middle is None or self.began[path] <= after:
                    continue
                first = _best([_fit(middle, [s, *(self.made[p] for p in mixed)], False) for s in starts])
                if first.error > self.tolerance or not first.whole:
                    continue
                bases = [(middle, "input"), (self.made[path], "output")]
                for (base, side), form, (end, _) in itertools.product(bases, options[-1], ends):
                    second = _fit(end, [base, self.made[form]], False)
                    if second.error <= self.tolerance and second.whole:
                        return ResidualStructure(
                            "normed stream" if end is self.y else "post-norm",
                            Contribution(
                                tuple(Term(p, s) for p, s in zip(mixed, first.scales[1:], strict=True)), first.constant
                            ),
                            Contribution((Term(form, second.scales[1]),), second.constant),
                            error=max(first.error, second.error),
                            mid=path,
                            mid_side=side,
                        )
        return None


@dataclass(frozen=True)
class _Fit:
    error: float
    scales: list[Scale]
    constant: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether every part takes a share in the sum. A module that already holds the sum would take it all."""
        return all(abs(s) > 1e-6 if isinstance(s, float) else bool(s.abs().max() > 1e-6) for s in self.scales)


def _best(fits: list[_Fit]) -> _Fit:
    return min(fits, key=lambda fit: fit.error)


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def _fit(target: torch.Tensor, parts: list[torch.Tensor], per_channel: bool) -> _Fit:
    """Coefficients with which `parts` add up to `target`; the first, the stream's, is 1 if that fits.

    With `per_channel`, every part has one coefficient for each channel, and there is a constant for each channel too.
    """
    width = target.shape[-1]
    goal = target.double().reshape(-1, width)
    columns = torch.stack([p.double().reshape(-1, width) for p in parts], dim=-1)  # [positions, channels, parts]
    if not per_channel:
        flat = columns.reshape(-1, len(parts))
        found = torch.linalg.lstsq(flat, goal.reshape(-1, 1)).solution[:, 0]
        # A coefficient that is 1 is 1: rounding in the low bits of a fit must not be passed on.
        rounded = torch.where((found - found.round()).abs() < 1e-3, found.round(), found)
        fits = [
            _Fit(relative_error((columns @ c).reshape(target.shape), target), [float(value) for value in c])
            for c in (rounded, found)
        ]
        return fits[0] if fits[0].error <= 2 * fits[1].error + 1e-7 else fits[1]
    if goal.shape[0] < 2 * (len(parts) + 1):
        return _Fit(float("inf"), [])
    ones = torch.ones_like(columns[..., :1])
    rows = torch.cat([columns, ones], dim=-1).transpose(0, 1)  # [channels, positions, parts + 1]
    solved = torch.linalg.lstsq(rows, goal.T.unsqueeze(-1)).solution[..., 0]  # [channels, parts + 1]
    error = relative_error(torch.einsum("cpk,ck->pc", rows, solved).reshape(target.shape), target)
    scales: list[Scale] = []
    for k in range(len(parts)):
        column = solved[:, k]
        one = bool((column - column.mean().round()).abs().max() < 1e-3)
        scales.append(float(column.mean().round()) if one else column)
    constant = solved[:, -1]
    small = constant.abs().max() < 1e-3 * goal.abs().mean()
    return _Fit(error, scales, None if small else constant)
