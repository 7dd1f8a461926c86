"""Find the queries, keys, values and gates of linear attention and state space mixers, and prove them by a recurrence.

Transformers hands them to one function, whose arguments have the names of the kernel libraries flash-linear-attention
and mamba_ssm. What these arguments are is proven by computing, one token after the other, what the function returned.

A state space model is the same recurrence (Dao and Gu, "Transformers are SSMs", 2024): C are the queries, B the keys, x
the values, and the step size is both how strongly a token is written and how fast the state decays.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

from nnterp.discovery._probe import Probe
from nnterp.discovery._quiet import quiet
from nnterp.discovery._recording import Labels, Operation, SourceText
from nnterp.discovery.attention import with_code
from nnterp.tensors import same, stream_out
from nnterp.traced import Inside, Layout, Place, View

QUERIES, KEYS, VALUES = "mixer_queries", "mixer_keys", "mixer_values"
DECAYS, BETAS, STEPS = "mixer_decays", "mixer_betas", "mixer_steps"
NAMES = (QUERIES, KEYS, VALUES, DECAYS, BETAS, STEPS)

_SPELLINGS = {
    QUERIES: ("query", "q", "C"),
    KEYS: ("key", "k", "B"),
    VALUES: ("value", "v", "hidden_states", "x", "u"),
    DECAYS: ("g",),
    BETAS: ("beta",),
    STEPS: ("dt", "delta"),
}
NO_MIXER = "its mixer is softmax attention, or it has none"
NO_RULE = "no operation of its mixer is a gated delta rule or a selective scan, as far as a recurrence can tell"
NOT_GIVEN = "its mixer's recurrence is given none"

Found = dict[str, Place | str]
Linear = tuple[list[Found], dict[tuple[str, Labels], SourceText]]


def find_linear(probe: Probe) -> Linear:
    """Find where the inside of each layer's linear attention is served.

    Returns:
        Per layer, name → place, or the reason why there is none; and the source of the instrumented functions.
    """
    layers = probe.anatomy.blocks
    mixing = [layer for layer in layers if layer.mixer is not None and layer.kind != "attention"]
    if not mixing:
        return [_none(NO_MIXER) for _ in layers], {}
    paths = {layer.index: with_code(probe.module, layer.mixer) for layer in mixing if layer.mixer is not None}
    with quiet(probe.module):
        recording = probe.record(operations=list(dict.fromkeys(path for own in paths.values() for path in own)))
        found: list[Found] = [_none(NO_MIXER) for _ in layers]
        for layer in mixing:
            operations = [o for path in paths[layer.index] for o in recording.operations_of(path)]
            proven = [places for o in operations if (places := _places(o, probe.tolerance)) is not None]
            found[layer.index] = proven[0] if proven else _none(NO_RULE)
    return found, recording.texts


def _none(reason: str) -> Found:
    """No value has a place."""
    found: Found = {}
    for name in NAMES:
        found[name] = reason
    return found


def _places(operation: Operation, tolerance: float) -> Found | None:
    """The places of what an operation is given, if a recurrence of it is what the operation returned."""
    if len(operation.labels) != 1 or operation.times != 1 or operation.function is None:
        return None
    keys = _keys(operation)
    if keys is None or not {QUERIES, KEYS, VALUES} <= keys.keys():
        return None
    given = _named(operation)
    made = stream_out(operation.output)
    if made is None or not {DECAYS, STEPS} & keys.keys():
        return None
    scanned = STEPS in keys
    try:
        expected = _scan(given, keys) if scanned else _delta_rule(given, keys)
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError):  # other arguments by these names
        return None
    if expected is None or not same(expected.to(made.dtype), made, max(tolerance, 1e-4)):
        return None
    turned = scanned and given[keys[VALUES]].dim() == 3  # [batch, channels, seq]
    found = _none(NOT_GIVEN)
    for name, argument in keys.items():
        place = Inside(operation.path, operation.labels, "input", _position(operation, argument))
        found[name] = View(place, Layout("[batch, heads, seq, dim]")) if turned else place
    return found


def _keys(operation: Operation) -> dict[str, str] | None:
    """Value → name of the argument that holds it."""
    given = _named(operation)
    found = {}
    for value, names in _SPELLINGS.items():
        name = next((name for name in names if isinstance(given.get(name), torch.Tensor)), None)
        if name is not None and given[name].is_floating_point():
            found[value] = name
    return found or None


def _named(operation: Operation) -> dict[str, Any]:
    """The arguments of an operation by their names; those given by keyword alone if its signature cannot be read."""
    named = dict(operation.kwargs)
    try:
        parameters = [
            p.name
            for p in inspect.signature(operation.function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        return named
    return {**dict(zip(parameters, operation.args, strict=False)), **named}


def _position(operation: Operation, name: str) -> int | str:
    """How an argument was given: by keyword or at a position."""
    if name in operation.kwargs:
        return name
    return list(inspect.signature(operation.function).parameters).index(name)


def _delta_rule(given: dict[str, Any], keys: dict[str, str]) -> torch.Tensor | None:
    """What a gated delta rule returns (Yang et al., "Gated Delta Networks", 2024), with its keys' decay per channel in
    Kimi's (2025), `[batch, seq, heads, value_dim]`."""
    if given.get("initial_state") is not None or BETAS not in keys:
        return None
    q, k, v = (given[keys[name]].float() for name in (QUERIES, KEYS, VALUES))
    g, beta = given[keys[DECAYS]].float(), given[keys[BETAS]].float()
    if given.get("use_qk_l2norm_in_kernel"):
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (given.get("scale") or q.shape[-1] ** -0.5)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    g = g[..., None] if g.dim() == 3 else g
    return _recurrence(q, k, v, g, beta, correcting=True)


def _scan(given: dict[str, Any], keys: dict[str, str]) -> torch.Tensor:
    """What a selective scan returns: `[batch, channels, seq]` in Mamba (Gu and Dao, 2023), in Mamba 2 (Dao and Gu,
    2024) `[batch, seq, heads, head_dim]`."""
    c, b, x, dt = (given[keys[name]].float() for name in (QUERIES, KEYS, VALUES, STEPS))
    turned = x.dim() == 3
    if turned:
        c, b, x, dt = (tensor.transpose(1, 2) for tensor in (c, b, x, dt))
        c, b, x = c[:, :, None], b[:, :, None], x[..., None]
    bias = given.get("dt_bias") if given.get("dt_bias") is not None else given.get("delta_bias")
    dt = dt if bias is None else dt + bias.float()
    dt = functional.softplus(dt) if given.get("dt_softplus") or given.get("delta_softplus") else dt
    dt = dt.clamp(*given.get("dt_limit", (0.0, float("inf"))))
    c, b = (tensor.repeat_interleave(x.shape[2] // tensor.shape[2], 2) for tensor in (c, b))
    a = given["A"].float()
    decay = dt[..., None] * (a if a.dim() == 2 else a[:, None])
    made = _recurrence(c, b, x, decay, dt, correcting=False)
    skip = given.get("D")
    made = made if skip is None else made + (skip.float()[:, None] if skip.dim() == 1 else skip.float()) * x
    if turned:
        made = made[..., 0].transpose(1, 2)
    gate = given.get("z")
    return made if gate is None else made * functional.silu(gate.float())


def _recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, correcting: bool
) -> torch.Tensor:
    """Queries read a state that decays and to which every token writes its value along its key, token by token.

    Args:
        q, k: `[batch, seq, heads, key_dim]`.
        v: `[batch, seq, heads, value_dim]`.
        log_decay: `[batch, seq, heads, key_dim or 1]`.
        beta: How strongly a token is written, `[batch, seq, heads]`.
        correcting: Whether a token writes its value less what its key reads already (the delta rule).
    """
    state = v.new_zeros(*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1])
    made = []
    for t in range(v.shape[1]):
        state = state * log_decay[:, t].exp()[..., None]
        known = torch.einsum("bhkv,bhk->bhv", state, k[:, t]) if correcting else 0
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], (v[:, t] - known) * beta[:, t][..., None])
        made.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(made, 1)
