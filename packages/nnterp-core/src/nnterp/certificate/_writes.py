"""Prove writes: the same noise written through an accessor and by a torch hook must change the logits alike, and must
change them. Rows, not runs: one value a row, and one row in which every value is written, in one batch of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnterp.certificate._recording import Recording, stream_in
from nnterp.certificate._residual import relative_error
from nnterp.errors import Unavailable
from nnterp.values import VALUES, Value, read_value, write_value
from nnterp.values._places import Site

if TYPE_CHECKING:
    from nnterp.certificate._certify import _Checks

WRITES = "every write is causal and equals a torch hook's"
LENGTH = 4  # tokens of a row
# How many values get a row of their own; if a model has more, they are sampled evenly. In large models, where rows are
# what the certificate costs, the others are covered by the row in which all are written.
ROWS, ROWS_LARGE, LARGE = 48, 1, 3_000_000
GUARD = 1e-6  # smallest relative change of the logits that counts as an effect


def is_large(module: nn.Module) -> bool:
    """Whether a forward pass of the model costs more than the bookkeeping around it."""
    return sum(parameter.numel() for parameter in module.parameters()) > LARGE


def prove_writes(checks: _Checks, ids: torch.Tensor, recording: Recording) -> None:
    """Add one line to the certificate for the writes of all values that are a module's input or output."""
    model = checks.model
    targets = _targets(checks, recording)
    total = len(targets)
    limit = ROWS_LARGE if is_large(checks.module) else ROWS
    chosen = range(total) if total <= limit else sorted({round((k + 0.5) * total / limit) for k in range(limit)})
    row_of = {target: row for row, target in enumerate(chosen)}
    everything = len(row_of)  # the row in which all values are written; the one after it is left alone
    batch = ids[:, :LENGTH].repeat(everything + 2, 1)
    edits: list[tuple[tuple[int, ...], int, str, int | None]] = [
        ((everything,) if k not in row_of else (row_of[k], everything), k, name, layer)
        for k, (name, layer) in enumerate(targets)
    ]
    hooked = _by_hooks(checks, batch, edits, recording)
    try:
        with model.trace(batch):
            for rows, seed, name, layer in edits:
                value = VALUES[name]
                tensor = read_value(model, value.label, layer)
                write_value(model, value.label, disturbed(tensor, rows, seed, batch.shape[0]), layer)
            written = model.logits.save()
    except Exception as problem:
        checks.say(WRITES, False, detail=f"{type(problem).__name__}: {str(problem)[:200]}")
        return
    silent = [_label(*targets[k]) for k, row in row_of.items() if not relative_error(written[row], written[-1]) > GUARD]
    error = relative_error(written, hooked)
    ok = not silent and error <= checks.tolerance
    detail = f"{total} values, {everything} of them alone"
    if silent:
        detail = f"no effect on the logits: {', '.join(silent[:4])}"
    elif not ok:
        differing = [
            _label(*targets[k])
            for k, row in row_of.items()
            if relative_error(written[row], hooked[row]) > checks.tolerance
        ]
        detail = f"not what a hook does: {', '.join(differing[:4])}"
    checks.say(WRITES, ok, error, detail, "name the parts with RenameConfig")


def _label(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name}[{layer}]"


def _targets(checks: _Checks, recording: Recording) -> list[tuple[str, int | None]]:
    """(value, layer) of everything that is a module's input or output, in the order in which the model computes it."""
    found: list[tuple[int, float, str, int | None]] = []
    running = [block.index for block in checks.ran(recording)]
    for value in VALUES.values():
        for layer in running if value.per_layer else [None]:
            try:
                site = _hooked_site(checks, value, layer)
            except Unavailable:
                continue
            calls = recording.calls.get(site.path)
            if not calls or (layer is None and len(calls) > 1):
                continue
            call = calls[0] if layer is None else _call_in_layer(checks, recording, site.path, layer)
            assert call is not None
            found.append((call.began if site.side == "input" else call.ended, value.rank, value.name, layer))
    return [(name, layer) for _, _, name, layer in sorted(found, key=lambda entry: entry[:2])]


def _hooked_site(checks: _Checks, value: Value, layer: int | None) -> Site:
    """The module's edge at which a hook does what writing the value does.

    What leaves a part inside its module (`Part.closing`) is added to the stream at once and given to the closing norm.
    """
    if not value.leaves_inside(checks.anatomy, layer):
        return value.site(checks.anatomy, layer)
    assert layer is not None
    part = checks.anatomy.part(value.role, layer)
    if not part.leaves:
        raise Unavailable(f"{value.name}[{layer}] was not found.")
    return Site(part.closing, "input")


def _call_in_layer(checks: _Checks, recording: Recording, path: str, layer: int) -> Any:
    outer = recording.call(checks.anatomy.blocks[layer].path)
    if outer is None or path == checks.anatomy.blocks[layer].path:
        return outer
    return recording.within(path, outer)


def disturbed(tensor: torch.Tensor, rows: tuple[int, ...], seed: int, batch: int) -> torch.Tensor:
    """A copy of a value with some rows of the batch shifted by a fixed random direction at every position."""
    direction = torch.randn(tensor.shape[-1], generator=torch.Generator().manual_seed(seed))
    direction = direction.to(tensor.device, tensor.dtype)
    copy = tensor.clone()
    for row in rows:
        if tensor.shape[0] == batch:
            view = copy[row]
        elif tensor.dim() > 1 and tensor.shape[1] == batch:  # several streams stacked in front of the batch
            view = copy[:, row]
        else:  # batch and positions on one axis
            view = copy.view(batch, -1, tensor.shape[-1])[row]
        view += direction * (0.3 * view.float().pow(2).mean().sqrt().clamp(min=1e-3)).to(tensor.dtype)
    return copy


def _by_hooks(
    checks: _Checks,
    batch: torch.Tensor,
    edits: list[tuple[tuple[int, ...], int, str, int | None]],
    recording: Recording,
) -> torch.Tensor:
    """The reference: plain forward hooks on the plain module."""
    handles: list[Any] = []
    size = batch.shape[0]

    def when(turn: int) -> Any:
        """True at the `turn`-th call: a module shared by several layers runs in each of them."""
        count = -1

        def now() -> bool:
            nonlocal count
            count += 1
            return count == turn

        return now

    def hook_output(rows: tuple[int, ...], seed: int, now: Any) -> Any:
        def hook(_: Any, args: tuple, output: Any) -> Any:
            if not now():
                return None
            if isinstance(output, torch.Tensor):
                return disturbed(output, rows, seed, size)
            return type(output)((disturbed(output[0], rows, seed, size), *output[1:]))

        return hook

    def hook_input(rows: tuple[int, ...], seed: int, now: Any) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not now():
                return None
            stream = stream_in(args, kwargs)
            assert stream is not None
            new = disturbed(stream, rows, seed, size)
            return tuple(new if a is stream else a for a in args), {
                k: new if v is stream else v for k, v in kwargs.items()
            }

        return hook

    def hook_sum(rows: tuple[int, ...], seed: int, now: Any, given: list[torch.Tensor]) -> Any:
        """The norm is given the sum of what its part was given and of what leaves the part: the latter is disturbed."""

        def hook(_: Any, args: tuple) -> Any:
            if not now():
                return None
            left = args[0] - given[-1]
            return (args[0] + disturbed(left, rows, seed, size) - left, *args[1:])

        return hook

    try:
        for rows, seed, name, layer in edits:
            value = VALUES[name]
            site = _hooked_site(checks, value, layer)
            target = checks.module.get_submodule(site.path)
            turn = 0
            if layer is not None:
                call = _call_in_layer(checks, recording, site.path, layer)
                turn = [c.began for c in recording.calls[site.path]].index(call.began)
            if value.leaves_inside(checks.anatomy, layer):
                given: list[torch.Tensor] = []
                part = checks.module.get_submodule(checks.anatomy.part(value.role, layer).entry)
                handles.append(
                    part.register_forward_pre_hook(
                        lambda _, args, kwargs, given=given: given.append(stream_in(args, kwargs)), with_kwargs=True
                    )
                )
                handles.append(target.register_forward_pre_hook(hook_sum(rows, seed, when(turn), given)))
            elif site.side == "output":
                handles.append(target.register_forward_hook(hook_output(rows, seed, when(turn))))
            else:
                handles.append(target.register_forward_pre_hook(hook_input(rows, seed, when(turn)), with_kwargs=True))
        return checks.module(**checks.forward_kwargs(batch)).logits
    finally:
        for handle in handles:
            handle.remove()
