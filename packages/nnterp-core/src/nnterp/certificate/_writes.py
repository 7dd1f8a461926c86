"""Prove writes: the same noise written through an accessor and by a torch hook must change the logits alike, and must
change them. One value a row: as many writes as a batch has rows are proven in one forward pass of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.certificate._recording import stream_in
from nnterp.certificate._residual import relative_error
from nnterp.values import VALUES
from nnterp.values._accessors import read_value, write_value

if TYPE_CHECKING:
    from nnterp.certificate._certify import _Checks

GUARD = 1e-6  # smallest relative change of the logits that counts as an effect


def prove_writes(checks: _Checks, ids: torch.Tensor) -> None:
    """Add one line to the certificate for all writes of all values."""
    from nnterp.certificate._certify import MAX_WRITES

    name = "every write is causal and equals a torch hook's"
    model, module = checks.model, checks.module
    targets = _targets(checks)
    total = len(targets)
    if total > MAX_WRITES:
        targets = [targets[round(k * (total - 1) / (MAX_WRITES - 1))] for k in range(MAX_WRITES)]
    batch = ids.repeat(len(targets) + 1, 1)  # the last row is left alone
    noise = torch.Generator().manual_seed(2)

    edits = [(row, value, layer, torch.randn((), generator=noise).item()) for row, (value, layer) in enumerate(targets)]
    try:
        hooked = _by_hooks(checks, batch, edits)
        with model.trace(batch):
            for row, value_name, layer, seed in edits:
                value = VALUES[value_name]
                tensor = read_value(model, value, layer)
                write_value(model, value, disturbed(tensor, row, seed, batch.shape[0]), layer)
            written = model.logits.save()
    except Exception as error:
        checks.say(name, False, detail=f"{type(error).__name__}: {str(error)[:200]}")
        return
    clean = written[-1]
    silent = [
        f"{value}[{layer}]" if layer is not None else value
        for row, value, layer, _ in edits
        if not relative_error(written[row], clean) > GUARD
    ]
    error = relative_error(written, hooked)
    ok = not silent and error <= checks.tolerance
    detail = f"{len(targets)} of {total} values" if ok else (f"no effect: {', '.join(silent[:4])}" if silent else "differs from hooks")
    checks.say(name, ok, error, detail, "" if ok else "name the parts with RenameConfig")


def _targets(checks: _Checks) -> list[tuple[str, int | None]]:
    """(value, layer) of everything writable, in forward order."""
    anatomy = checks.anatomy
    found: list[tuple[tuple[int, int], str, int | None]] = []
    for value in VALUES.values():
        if not value.per_layer:
            if getattr(anatomy, value.role) is not None:
                found.append(((-1 if value.rank == 0 else anatomy.num_layers, value.rank), value.name, None))
            continue
        for block in anatomy.blocks:
            if value.role == "layer" or getattr(block, value.role) is not None:
                found.append(((block.index, value.rank), value.name, block.index))
    return [(name, layer) for _, name, layer in sorted(found, key=lambda entry: entry[0])]


def disturbed(tensor: torch.Tensor, row: int, seed: float, rows: int) -> torch.Tensor:
    """A copy of a value with one row of the batch shifted by a fixed random direction at every position."""
    flat = tensor.shape[0] != rows  # OPT's elders hand positions and batch in one axis
    width = tensor.shape[-1]
    generator = torch.Generator().manual_seed(int(abs(seed) * 1e6))
    direction = torch.randn(width, generator=generator).to(tensor.device, tensor.dtype)
    copy = tensor.clone()
    view = copy.reshape(rows, -1, width) if flat else copy
    scale = view[row].float().pow(2).mean().sqrt().clamp(min=1e-3).to(tensor.dtype)
    view[row] = view[row] + direction * scale
    return view.reshape(tensor.shape)


def _by_hooks(checks: _Checks, batch: torch.Tensor, edits: list[tuple[int, str, int | None, float]]) -> torch.Tensor:
    """The reference: plain forward hooks on the plain module."""
    handles: list[Any] = []
    module, rows = checks.module, batch.shape[0]

    def hook_output(row: int, seed: float) -> Any:
        def hook(_: Any, args: tuple, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return disturbed(output, row, seed, rows)
            return type(output)((disturbed(output[0], row, seed, rows), *output[1:]))

        return hook

    def hook_input(row: int, seed: float) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            stream = stream_in(args, kwargs)
            assert stream is not None
            new = disturbed(stream, row, seed, rows)
            return tuple(new if a is stream else a for a in args), {k: new if v is stream else v for k, v in kwargs.items()}

        return hook

    try:
        for row, value_name, layer, seed in edits:
            site = VALUES[value_name].site(checks.anatomy, layer)
            target = module.get_submodule(site.path)
            if site.side == "output":
                handles.append(target.register_forward_hook(hook_output(row, seed)))
            else:
                handles.append(target.register_forward_pre_hook(hook_input(row, seed), with_kwargs=True))
        return module(**checks.forward_kwargs(batch)).logits
    finally:
        for handle in handles:
            handle.remove()
