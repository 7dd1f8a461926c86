"""Prove writes: the same noise written through an accessor and by a torch hook must change the logits alike, and must
change them. One value a row: as many writes as a batch has rows are proven in one forward pass of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.certificate._recording import Recording, stream_in
from nnterp.certificate._residual import relative_error
from nnterp.errors import Unavailable
from nnterp.values import VALUES, read_value, write_value

if TYPE_CHECKING:
    from nnterp.certificate._certify import _Checks

WRITES = "every write is causal and equals a torch hook's"
MAX_WRITES = 48  # rows of the batch; if a model has more values, they are sampled evenly
GUARD = 1e-6  # smallest relative change of the logits that counts as an effect


def prove_writes(checks: _Checks, ids: torch.Tensor, recording: Recording) -> None:
    """Add one line to the certificate for the writes of all values that are a module's input or output."""
    model = checks.model
    targets = _targets(checks, recording)
    total = len(targets)
    if total > MAX_WRITES:
        targets = [targets[round(k * (total - 1) / (MAX_WRITES - 1))] for k in range(MAX_WRITES)]
    batch = ids.repeat(len(targets) + 1, 1)  # the last row is left alone
    edits = [(row, name, layer) for row, (name, layer) in enumerate(targets)]
    hooked = _by_hooks(checks, batch, edits, recording)
    try:
        with model.trace(batch):
            for row, name, layer in edits:
                value = VALUES[name]
                tensor = read_value(model, value, layer)
                write_value(model, value, disturbed(tensor, row, batch.shape[0]), layer)
            written = model.logits.save()
    except Exception as problem:
        checks.say(WRITES, False, detail=f"{type(problem).__name__}: {str(problem)[:200]}")
        return
    silent = [
        _label(name, layer) for row, name, layer in edits if not relative_error(written[row], written[-1]) > GUARD
    ]
    error = relative_error(written, hooked)
    ok = not silent and error <= checks.tolerance
    detail = f"{len(targets)} of {total} values"
    if silent:
        detail = f"no effect on the logits: {', '.join(silent[:4])}"
    elif not ok:
        differing = [
            _label(n, i) for row, n, i in edits if relative_error(written[row], hooked[row]) > checks.tolerance
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
                site = value.site(checks.anatomy, layer)
            except Unavailable:
                continue
            calls = recording.calls.get(site.path)
            if not calls or (layer is None and len(calls) > 1):
                continue
            call = calls[0] if layer is None else _call_in_layer(checks, recording, site.path, layer)
            assert call is not None
            found.append((call.began if site.side == "input" else call.ended, value.rank, value.name, layer))
    return [(name, layer) for _, _, name, layer in sorted(found, key=lambda entry: entry[:2])]


def _call_in_layer(checks: _Checks, recording: Recording, path: str, layer: int) -> Any:
    outer = recording.call(checks.anatomy.blocks[layer].path)
    if outer is None or path == checks.anatomy.blocks[layer].path:
        return outer
    return recording.within(path, outer)


def disturbed(tensor: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    """A copy of a value with one row of the batch shifted by a fixed random direction at every position."""
    direction = torch.randn(tensor.shape[-1], generator=torch.Generator().manual_seed(row))
    direction = direction.to(tensor.device, tensor.dtype)
    copy = tensor.clone()
    if tensor.shape[0] == rows:
        view = copy[row]
    elif tensor.dim() > 1 and tensor.shape[1] == rows:  # several streams stacked in front of the batch
        view = copy[:, row]
    else:  # batch and positions on one axis
        view = copy.view(rows, -1, tensor.shape[-1])[row]
    view += direction * view.float().pow(2).mean().sqrt().clamp(min=1e-3).to(tensor.dtype)
    return copy


def _by_hooks(
    checks: _Checks, batch: torch.Tensor, edits: list[tuple[int, str, int | None]], recording: Recording
) -> torch.Tensor:
    """The reference: plain forward hooks on the plain module."""
    handles: list[Any] = []
    rows = batch.shape[0]

    def when(turn: int) -> Any:
        """True at the `turn`-th call: a module shared by several layers runs in each of them."""
        count = -1

        def now() -> bool:
            nonlocal count
            count += 1
            return count == turn

        return now

    def hook_output(row: int, now: Any) -> Any:
        def hook(_: Any, args: tuple, output: Any) -> Any:
            if not now():
                return None
            if isinstance(output, torch.Tensor):
                return disturbed(output, row, rows)
            return type(output)((disturbed(output[0], row, rows), *output[1:]))

        return hook

    def hook_input(row: int, now: Any) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not now():
                return None
            stream = stream_in(args, kwargs)
            assert stream is not None
            new = disturbed(stream, row, rows)
            return tuple(new if a is stream else a for a in args), {
                k: new if v is stream else v for k, v in kwargs.items()
            }

        return hook

    try:
        for row, name, layer in edits:
            site = VALUES[name].site(checks.anatomy, layer)
            target = checks.module.get_submodule(site.path)
            turn = 0
            if layer is not None:
                call = _call_in_layer(checks, recording, site.path, layer)
                turn = [c.began for c in recording.calls[site.path]].index(call.began)
            if site.side == "output":
                handles.append(target.register_forward_hook(hook_output(row, when(turn))))
            else:
                handles.append(target.register_forward_pre_hook(hook_input(row, when(turn)), with_kwargs=True))
        return checks.module(**checks.forward_kwargs(batch)).logits
    finally:
        for handle in handles:
            handle.remove()
