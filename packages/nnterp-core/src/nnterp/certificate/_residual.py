"""How a layer combines its parts: which multiples of which module outputs are added to the residual stream.

The structure is not assumed but solved for. With `x` entering a layer, `y` leaving it and `p_k` what its parts return,
the coefficients of `y - x = sum_k c_k p_k` are found by least squares over all positions and channels; a fit to rounding
error is proof, because there are a few unknowns and thousands of equations. Each part is tried as it leaves its module
and as it leaves the norms that follow it, with one coefficient for all channels and with one for each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from nnterp.anatomy import Layer
from nnterp.certificate._recording import Recording


@dataclass(frozen=True)
class Term:
    """One addend: the output of the module at `path`, times `scale` (one number, or one per channel)."""

    path: str
    scale: float | torch.Tensor


@dataclass(frozen=True)
class Contribution:
    """What one part adds to the residual stream: the sum of its terms."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class ResidualStructure:
    """How one layer's parts make its output.

    Attributes:
        kind: "sequential" (the MLP reads the stream after attention), "parallel" (both read the same stream),
            "post-norm" (the stream itself is normalised after each addition), "single" (one part), or "unknown".
        mixer: What the sequence mixer adds; for layers with two mixers side by side, what both add.
        mlp: What the feed-forward adds.
        error: Relative error of the identity, the worst over positions.
        reason: For "unknown", why.
        mid: For "sequential" and "post-norm": path of the module whose input ("sequential") or output ("post-norm") is
            the stream between the two parts.
    """

    kind: str
    mixer: Contribution | None = None
    mlp: Contribution | None = None
    error: float | None = None
    reason: str = ""
    mid: str | None = None


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error over positions, relative to the norm of what is expected at that position."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()
    norm = expected.norm(dim=-1)
    floor = norm.max().clamp(min=1e-30) * 1e-3
    error = ((actual - expected).norm(dim=-1) / norm.clamp(min=float(floor))).max().item()
    return error if error == error else float("inf")


def solve_residual(layer: Layer, recording: Recording, inside: list[str], tolerance: float) -> ResidualStructure:
    """Find how one layer combines its parts.

    Args:
        layer: The layer.
        recording: A forward pass in which the modules at `inside` and the layer's parts were watched.
        inside: Paths of modules inside the layer whose outputs may be terms.
        tolerance: The largest relative error that counts as equal.
    """
    x, y = recording.input(layer.path), recording.output(layer.path)
    if x is None or y is None or x.shape != y.shape:
        return ResidualStructure("unknown", reason="the layer's output does not have the shape of its input")
    streams = {p: t for p in inside if (t := recording.output(p)) is not None and t.shape == x.shape}

    def chain(exit_path: str | None) -> list[str]:
        """The part's own exit, and the modules its output passes alone on the way to the stream."""
        if exit_path is None or exit_path not in streams:
            return []
        found, current = [exit_path], streams[exit_path]
        for path in sorted(streams, key=lambda p: recording.calls[p][0].began):
            given = recording.input(path)
            if path not in found and given is not None and given.shape == current.shape and torch.equal(given, current):
                found.append(path)
                current = streams[path]
        return found[::-1]

    mixers = [part.exit for part in dict.fromkeys((layer.mixer, layer.self_attn)) if part is not None]
    mlp = layer.mlp.exit if layer.mlp is not None else None
    exits = [p for p in (*mixers, mlp) if p is not None]
    options = [chain(p) for p in exits]
    if any(not option for option in options):
        silent = [p for p, option in zip(exits, options, strict=True) if not option]
        return ResidualStructure("unknown", reason=f"{', '.join(silent)} returns no stream of the layer's shape")
    if not exits:
        return ResidualStructure("unknown", reason="the layer has no parts")
    siblings = _siblings(streams, exits, recording)

    best = float("inf")
    for chosen in itertools.product(*options):
        for extra in (*siblings, ()):
            paths = [*chosen, *extra]
            if len(set(paths)) < len(paths):
                continue
            scales, error = _fit(y - x, [streams[p] for p in paths], y)
            best = min(best, error)
            if scales is not None and error <= tolerance:
                return _structure(layer, recording, x, paths, mixers, scales, error, tolerance)
    post = _post_norm(layer, recording, streams, x, y, mixers, mlp, tolerance)
    if post is not None:
        return post
    return ResidualStructure("unknown", error=best, reason="no multiples of its parts add up to what the layer adds")


def _siblings(streams: dict[str, torch.Tensor], exits: list[str], recording: Recording) -> list[tuple[str, ...]]:
    """Modules that read exactly what a known part reads (a shared expert beside a mixture of experts)."""
    given = [recording.input(p) for p in exits]
    twins = [
        path
        for path in streams
        if path not in exits
        and not any(path.startswith(f"{e}.") or e.startswith(f"{path}.") for e in exits)
        and (own := recording.input(path)) is not None
        and any(g is not None and g.shape == own.shape and torch.equal(own, g) for g in given)
    ]
    return [(twin,) for twin in twins]


def _fit(target: torch.Tensor, parts: list[torch.Tensor], scale_of: torch.Tensor):
    """Coefficients with which `parts` add up to `target`: one per part, else one per part and channel."""
    flat = torch.stack([p.double().reshape(-1) for p in parts], dim=1)
    goal = target.double().reshape(-1, 1)
    found = torch.linalg.lstsq(flat, goal).solution[:, 0]
    # Rounding in the low bits of a fit must not be passed on: a coefficient that is 1 is 1.
    found = torch.where((found - found.round()).abs() < 1e-3, found.round(), found)
    sum_ = (flat @ found).reshape(target.shape)
    error = relative_error((scale_of.double() - target.double()) + sum_, scale_of)
    if error <= 1e-2:
        return [float(c) for c in found], error
    positions = target.reshape(-1, target.shape[-1])
    if positions.shape[0] < 2 * len(parts):
        return None, error
    rows = torch.stack([p.double().reshape(-1, p.shape[-1]) for p in parts], dim=-1)  # [positions, channels, parts]
    channels = torch.linalg.lstsq(rows.transpose(0, 1), positions.double().T.unsqueeze(-1)).solution  # [channels, parts, 1]
    sum_ = torch.einsum("pck,ck->pc", rows, channels[..., 0]).reshape(target.shape)
    error = relative_error((scale_of.double() - target.double()) + sum_, scale_of)
    return [channels[:, k, 0] for k in range(len(parts))], error


def _structure(layer, recording, x, paths, mixers, scales, error, tolerance) -> ResidualStructure:
    terms = [Term(path, scale) for path, scale in zip(paths, scales, strict=True)]
    mixer_terms = tuple(terms[: len(mixers)])
    mlp_terms = tuple(terms[len(mixers) :])
    mixer = Contribution(mixer_terms) if mixer_terms else None
    mlp = Contribution(mlp_terms) if mlp_terms else None
    if mixer is None or mlp is None:
        return ResidualStructure("single", mixer, mlp, error)
    mid = x.double()
    for term in mixer_terms:
        mid = mid + torch.as_tensor(term.scale, dtype=torch.float64, device=x.device) * recording.output(term.path).double()
    own = f"{layer.path}."
    for path in sorted(recording.calls, key=lambda p: recording.calls[p][0].began):
        if path.startswith(own) and recording.calls[path][0].began > max(recording.calls[m][0].began for m in mixers):
            given = recording.input(path)
            if given is not None and given.shape == mid.shape and relative_error(given, mid) <= tolerance:
                return ResidualStructure("sequential", mixer, mlp, error, mid=path)
    return ResidualStructure("parallel", mixer, mlp, error)


def _post_norm(layer, recording, streams, x, y, mixers, mlp, tolerance) -> ResidualStructure | None:
    """`mid = norm(x + mixer)`, `y = norm(mid + mlp)`: the original transformer, BERT, GPT-1."""
    norms = [p for p in streams if p not in (*mixers, mlp)]
    outer = [p for p in norms if torch.equal(streams[p], y)]
    for last in outer:
        summed = recording.input(last)
        if summed is None or summed.shape != x.shape:
            continue
        for first in norms:
            if first == last:
                continue
            mid, inner = streams[first], recording.input(first)
            if inner is None or inner.shape != x.shape or not mixers or mlp is None:
                continue
            scales, error = _fit(inner - x, [streams[m] for m in mixers], inner)
            if scales is None or error > tolerance:
                continue
            mlp_scales, mlp_error = _fit(summed - mid, [streams[mlp]], summed)
            if mlp_scales is not None and mlp_error <= tolerance:
                return ResidualStructure(
                    "post-norm",
                    Contribution(tuple(Term(m, s) for m, s in zip(mixers, scales, strict=True))),
                    Contribution((Term(mlp, mlp_scales[0]),)),
                    max(error, mlp_error),
                    mid=first,
                )
    return None
