"""How a layer combines its parts: which multiples of which module outputs are added to the residual stream.

The structure is solved for. `x` is the input of a layer, `y` its output and `p_k` the outputs of its parts. Least
squares over all positions and channels give the coefficients of `y = s x + sum_k c_k p_k`. There are a few unknowns and
hundreds of equations, so a fit to rounding error is a proof. For each part, several outputs are tried: that of its
module, those of the norms and convolutions that follow it, and that of the last projection inside it. Coefficients are
tried as one number for all channels first, then as one for each channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nnterp.anatomy import Layer, Part
from nnterp.discovery._fitting import Fit, Scale, fit
from nnterp.discovery._recording import Call, Recording


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
            (one part), "post-norm" (the stream is normalised after each addition, as in BERT), "normed stream" (a part
            is added to the output of its norm, as in MiniMax), "silent" (a part returned zeros alone), or "unknown".
        mixer: What the sequence mixer adds; for layers with two mixers side by side, what both add.
        mlp: What the feed-forward adds.
        other: What further modules of the layer add (per-layer embeddings of Gemma 3n and 4).
        stream_scale: What the incoming stream is multiplied by: 1 for nearly every model.
        error: Relative error of the identity, the worst over positions.
        reason: For "unknown", why.
        mid: Path of the module whose input or output is the stream between the two parts; None where there is no such
            stream.
        mid_side: "input" or "output": which of the two it is.
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
        operations: For each part whose output is an operation inside its module: `Part.end` → what the operation was
            given and returned.

    Returns:
        The structure; one of kind "unknown", with the reason, if no sum fits.
    """
    call = recording.call(layer.path)
    if call is None:
        return ResidualStructure("unknown", reason="the layer did not run")
    x, y = call.stream_in, call.stream_out
    if x is None or y is None or x.shape != y.shape:
        return ResidualStructure("unknown", reason="the layer's output does not have the shape of its input")
    operations = operations or {}
    own = [path for path in operations if path.startswith(f"{layer.path}.")]
    calls = {path: operations.get(path) or recording.within(path, call) for path in (*inside, *own)}
    return _Solver(layer, _Streams.of(calls, x, y), tolerance).solve()


def refit(
    structure: ResidualStructure, call: Call, recording: Recording, inside: Sequence[str], tolerance: float
) -> ResidualStructure:
    """The same addends with the factors that they have in a recording, which may be zero.

    Returns:
        The structure; one of kind "unknown", with the reason, if the addends do not add up to the layer's output there.
    """
    x, y = call.stream_in, call.stream_out
    parts = [part for part in (structure.mixer, structure.mlp, structure.other) if part is not None]
    terms = [term for part in parts for term in part.terms]
    if x is not None and y is not None and structure.kind in ("sequential", "parallel", "single"):
        made = _Streams.of({path: recording.within(path, call) for path in inside}, x, y).made
        per_channel = any(isinstance(term.scale, torch.Tensor) for term in terms)
        if all(term.path in made for term in terms):
            found = fit(y, [x, *(made[term.path] for term in terms)], per_channel)
            if found.error <= tolerance:
                scales = iter(found.scales[1:])

                def rescaled(part: Contribution | None) -> Contribution | None:
                    if part is None:
                        return None
                    return replace(part, terms=tuple(Term(term.path, next(scales)) for term in part.terms))

                mixer, mlp, other = map(rescaled, (structure.mixer, structure.mlp, structure.other))
                return replace(structure, mixer=mixer, mlp=mlp, other=other, stream_scale=found.scales[0])
    return ResidualStructure(
        "unknown", reason="what its parts are multiplied by is zero, and adds up only if it is not"
    )


@dataclass(frozen=True)
class _Streams:
    """The streams of one layer, all in one shape.

    Attributes:
        x, y: The layer's input and output.
        given, made: Path of a module inside the layer → its input, and its output.
        began: Path → when it began.
        order: The paths in `made`, in the order in which they began.
    """

    x: torch.Tensor
    y: torch.Tensor
    given: dict[str, torch.Tensor]
    made: dict[str, torch.Tensor]
    began: dict[str, int]
    order: list[str]

    @classmethod
    def of(cls, calls: Mapping[str, Call | None], x: torch.Tensor, y: torch.Tensor) -> _Streams:
        """Read the streams off the calls of the modules inside a layer; modules that did not run are left out."""

        def table(streams: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
            return {
                path: stream.reshape(x.shape)  # some feed-forwards work on [batch * seq, hidden]
                for path, stream in streams.items()
                if stream is not None and stream.numel() == x.numel() and stream.shape[-1] == x.shape[-1]
            }

        ran = {path: call for path, call in calls.items() if call is not None}
        began = {path: call.began for path, call in ran.items()}
        made = table({path: call.stream_out for path, call in ran.items()})
        given = table({path: call.stream_in for path, call in ran.items()})
        return cls(x, y, given, made, began, sorted(made, key=began.__getitem__))


class _Solver:
    """The sums that are tried for one layer, simplest first.

    Attributes:
        mixers, mlp: Paths of the modules that return what the parts make (`Part.exit`).
        options: For each of them, the modules whose output may be what the part adds (see `forms`).
        smallest: The smallest error of a single sum that was tried.
    """

    def __init__(self, layer: Layer, streams: _Streams, tolerance: float) -> None:
        self.layer, self.tolerance = layer, tolerance
        self.x, self.y, self.given, self.made = streams.x, streams.y, streams.given, streams.made
        self.began, self.order = streams.began, streams.order
        parts = {p.exit: p for p in (layer.mixer, layer.self_attn, layer.mlp) if p is not None}
        self.mixers = list(dict.fromkeys(p.exit for p in (layer.mixer, layer.self_attn) if p is not None))
        self.mlp = layer.mlp.exit if layer.mlp is not None else None
        self.exits = [*self.mixers, *([self.mlp] if self.mlp is not None else [])]
        self.options = [list(self.forms(parts[path])) for path in self.exits]
        self.smallest = float("inf")

    def solve(self) -> ResidualStructure:
        if not self.exits:
            return ResidualStructure("unknown", reason="the layer has no parts of its own")
        if silent := [path for path, forms in zip(self.exits, self.options, strict=True) if not forms]:
            return ResidualStructure("unknown", reason=f"{', '.join(silent)} returns no stream of the layer's shape")
        for trial in (self.one_sum, self.two_sums, self.one_mixer):
            found = trial()
            if found is not None:
                return found
        return self.without_silent() or ResidualStructure(
            "unknown", error=self.smallest, reason="no multiples of its parts add up to what the layer adds"
        )

    def without_silent(self) -> ResidualStructure | None:
        """A sum of the parts that return anything, where others return zeros alone.

        What the silent ones would add if they returned something is not proven, so they have no contribution.
        """
        silent = [path for path in self.exits if path in self.made and not bool(self.made[path].any())]
        loud = [i for i, path in enumerate(self.exits) if path not in silent]
        if not silent:
            return None
        for per_channel, chosen in itertools.product(
            (False, True), itertools.product(*(self.options[i] for i in loud))
        ):
            tried = self.fit(self.y, self.x, chosen, per_channel)
            if self.holds(tried):
                terms = {
                    self.exits[i]: Term(path, c) for i, path, c in zip(loud, chosen, tried.scales[1:], strict=True)
                }
                mixed = tuple(terms[path] for path in self.mixers if path in terms)
                mixer = Contribution(mixed, tried.constant) if len(mixed) == len(self.mixers) else None
                mlp = Contribution((terms[self.mlp],)) if self.mlp in terms else None
                reason = f"{', '.join(silent)} returned zeros alone, so what it is multiplied by is not proven"
                return ResidualStructure("silent", mixer, mlp, None, tried.scales[0], tried.error, reason)
        return None

    def forms(self, part: Part) -> Iterator[str]:
        """The modules whose output may be what a part adds.

        First those that follow the part, each given what the one before it returned, the last one first. Then the
        part itself. Then the last module inside it, and those that hold it.
        """
        if part.leaves:
            yield part.end
            return
        if part.exit in self.made:
            found, current = [part.exit], self.made[part.exit]
            for path in self.order:
                later = path not in found and self.began[path] > self.began[part.exit]
                if later and _equal(self.given.get(path), current):
                    found.append(path)
                    current = self.made[path]
            yield from reversed(found)
        inner = [p for p in self.order if p.startswith(f"{part.exit}.")]
        if inner:
            yield inner[-1]
            # A projection that an adapter has wrapped holds the last module, and is what the part adds.
            yield from (p for p in reversed(inner) if inner[-1].startswith(f"{p}."))

    def extras(self) -> list[str]:
        """A decoder's cross-attention, or direct children in none of the parts: they may add something of their own."""
        depth = self.layer.path.count(".") + 1
        cross = self.layer.cross_attn
        if cross is not None:
            return [cross.exit] if cross.exit in self.made else []
        return [
            p
            for p in self.order
            if p.count(".") == depth and not any(e == p or e.startswith(f"{p}.") for e in self.exits)
        ]

    def fit(self, target: torch.Tensor, start: torch.Tensor, paths: Iterable[str], per_channel: bool = False) -> Fit:
        """Fit `target` by multiples of `start` and of the outputs of the modules at `paths`."""
        return fit(target, [start, *(self.made[path] for path in paths)], per_channel)

    def holds(self, tried: Fit) -> bool:
        return tried.error <= self.tolerance and tried.whole

    # -- one sum: y = x + mixer + mlp --------------------------------------------------------------------------------

    def one_sum(self) -> ResidualStructure | None:
        """The layer's output is one sum of its input and of what its parts add."""
        for paths, per_channel in self.sums():
            tried = self.fit(self.y, self.x, paths, per_channel)
            self.smallest = min(self.smallest, tried.error)
            if self.holds(tried):
                return self.additive(paths, tried, per_channel)
        return None

    def sums(self) -> Iterator[tuple[list[str], bool]]:
        """(addends, one coefficient per channel or one for all) of each sum to try."""
        extras: list[tuple[str, ...]] = [(), *((path,) for path in self.extras())]
        for per_channel, chosen, extra in itertools.product((False, True), itertools.product(*self.options), extras):
            paths = [*chosen, *extra]
            if len(set(paths)) == len(paths):
                yield paths, per_channel

    def additive(self, paths: list[str], total: Fit, per_channel: bool) -> ResidualStructure:
        """The structure in which the sum `total` holds: sequential, parallel or single."""
        terms = tuple(Term(path, scale) for path, scale in zip(paths, total.scales[1:], strict=True))
        mixers = len(self.mixers)
        used = len(self.exits)
        mixer = Contribution(terms[:mixers], total.constant) if mixers else None
        mlp = Contribution(terms[mixers:used]) if self.mlp is not None else None
        other = Contribution(terms[used:]) if len(terms) > used else None
        stream_scale, error = total.scales[0], total.error
        if mixer is None or mlp is None:
            return ResidualStructure("single", mixer, mlp, other, stream_scale, error)
        mid = self.given_the_middle(paths[:mixers], per_channel)
        kind = "parallel" if mid is None else "sequential"
        return ResidualStructure(kind, mixer, mlp, other, stream_scale, error, mid=mid)

    def given_the_middle(self, mixed: list[str], per_channel: bool) -> str | None:
        """The first module that is given the stream plus what the mixers add."""
        after = max(self.began[path] for path in mixed)
        for path in sorted(self.given, key=self.began.__getitem__):
            if self.began[path] > after and self.holds(self.fit(self.given[path], self.x, mixed, per_channel)):
                return path
        return None

    # -- two sums, with a norm between them --------------------------------------------------------------------------

    def two_sums(self) -> ResidualStructure | None:
        """`mid = x + mixer` and `y = mid + mlp`, with a norm on `x`, on `mid`, or on what leaves the layer."""
        if not self.mixers or self.mlp is None:
            return None
        normed = [self.given[p] for p in self.order if p in self.given and _equal(self.made[p], self.y)]
        for mixed, mid, first in self.middles():
            sides = (("input", self.given[mid]), ("output", self.made[mid]))
            for (side, start), form, end in itertools.product(sides, self.options[-1], [self.y, *normed]):
                second = self.fit(end, start, [form])
                if self.holds(second):
                    terms = tuple(Term(p, scale) for p, scale in zip(mixed, first.scales[1:], strict=True))
                    return ResidualStructure(
                        "normed stream" if end is self.y else "post-norm",
                        Contribution(terms, first.constant),
                        Contribution((Term(form, second.scales[1]),), second.constant),
                        error=max(first.error, second.error),
                        mid=mid,
                        mid_side=side,
                    )
        return None

    def middles(self) -> Iterator[tuple[tuple[str, ...], str, Fit]]:
        """Each module that is given the stream, normed or not, plus what the mixers add.

        Yields:
            (the addends, path of the module, the fit).
        """
        starts = [self.x, *(self.made[p] for p in self.order if _equal(self.given.get(p), self.x))]
        for mixed in itertools.product(*self.options[: len(self.mixers)]):
            after = max(self.began[p] for p in mixed)
            for path in self.order:
                if path in self.given and self.began[path] > after:
                    tried = [self.fit(self.given[path], start, mixed) for start in starts]
                    closest = min(tried, key=lambda one: one.error)
                    if self.holds(closest):
                        yield mixed, path, closest

    # -- two mixers of which one writes ------------------------------------------------------------------------------

    def one_mixer(self) -> ResidualStructure | None:
        """Of two mixers only the first adds to the stream (the output of Zamba's attention goes into its Mamba)."""
        for form in self.options[0] if len(self.mixers) > 1 else ():
            tried = self.fit(self.y, self.x, [form])
            if self.holds(tried):
                mixer = Contribution((Term(form, tried.scales[1]),))
                return ResidualStructure("single", mixer, stream_scale=tried.scales[0], error=tried.error)
        return None


def _equal(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)
