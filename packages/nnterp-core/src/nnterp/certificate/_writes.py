"""Claim: noise written through an accessor changes the logits as the same noise from a torch hook does.

Values are written in rows of their own, and one more row has every value written, all rows in one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnterp.certificate._evidence import Claimed, Evidence, outcome
from nnterp.errors import Unavailable
from nnterp.facts import Facts
from nnterp.huggingface import uncached
from nnterp.named_transformer import NamedTransformer
from nnterp.table import VALUES, Value
from nnterp.tensors import relative_error, stream_in
from nnterp.traced import Site, read_value, write_value
from nnterp.values import leaves_inside, site_of
from nnterp.wording import ranges

WRITES = "every write is causal and equals a torch hook's"
LENGTH = 4  # tokens of a row
# How many values get a row of their own; if a model has more, they are sampled evenly. In a large model, where rows are
# what the certificate costs, each kind of value has one, at one layer. One more row has all values written.
ROWS = 48
EFFECT = 1e-6  # smallest relative change of the logits that counts as an effect


@dataclass(frozen=True)
class Target:
    """One value at one layer: the module input or output that a hook writes instead.

    Attributes:
        call: Which call of the module it is, from 0: a module that several layers share runs in each of them.
        given: The module that a part's input is read from, where the part leaves inside its own module.
    """

    value: Value
    layer: int | None
    site: Site
    call: int
    given: str | None

    def __str__(self) -> str:
        return self.value.name if self.layer is None else f"{self.value.name}[{self.layer}]"


@dataclass(frozen=True)
class _Edit:
    """A target, the rows in which it is written, the seed of what is added, and whether unequally over positions.

    Two heads of opposite signs can cancel a shift that is the same at all positions.
    """

    target: Target
    rows: tuple[int, ...]
    seed: int
    uneven: bool = False


def writes(evidence: Evidence, facts: Facts) -> Claimed:
    """Covers all values that are a module's input or output. Learns nothing."""
    targets = targets_of(evidence, facts)
    chosen = _one_of_each_kind(targets) if evidence.large else _sampled(len(targets))
    row_of = {k: row for row, k in enumerate(chosen)}
    everything = len(row_of)  # the row in which all values are written; in the one after it nothing is
    edits = [
        _Edit(target, (everything,) if k not in row_of else (row_of[k], everything), k)
        for k, target in enumerate(targets)
    ]
    batch = evidence.ids[:, :LENGTH].repeat(everything + 2, 1)
    hooked = _by_hooks(evidence, batch, edits, facts.readout.layout.extra)
    try:
        written = _by_accessors(evidence.model.supposing(facts), evidence.inputs(batch), batch.shape[0], edits)
    except Exception as problem:
        detail = f"{type(problem).__name__}: {str(problem)[:200]}"
        return outcome(WRITES, False, detail=detail), facts
    alone = {str(targets[k]): row for k, row in row_of.items()}
    idle = {str(target) for target in targets if _enters_zeros(evidence, facts, target)}
    silent = [n for n, row in alone.items() if not relative_error(written[row], written[-1]) > EFFECT and n not in idle]
    if silent:
        uneven = [dataclasses.replace(edit, uneven=True) for edit in edits]
        again = _by_accessors(evidence.model.supposing(facts), batch, batch.shape[0], uneven)
        silent = [name for name in silent if not relative_error(again[alone[name]], again[-1]) > EFFECT]
    error = relative_error(written, hooked)
    ok = not silent and error <= evidence.tolerance
    detail = _evidence(targets, row_of.keys())
    if silent:
        detail = f"no effect on the logits: {', '.join(silent[:4])}"
    elif not ok:
        differ = [n for n, row in alone.items() if relative_error(written[row], hooked[row]) > evidence.tolerance]
        detail = f"not what a hook does: {', '.join(differ[:4])}"
    remedy = "name the parts with RenameConfig"
    return outcome(WRITES, ok, error, evidence.tolerance, detail, remedy), facts


def _sampled(total: int) -> list[int]:
    """All values, or `ROWS` of them at even distances."""
    return list(range(total)) if total <= ROWS else sorted({round((k + 0.5) * total / ROWS) for k in range(ROWS)})


def _one_of_each_kind(targets: list[Target]) -> list[int]:
    """One value of each name; the layers of the names are spread over the depth of the model."""
    kinds: dict[str, list[int]] = {}
    for k, target in enumerate(targets):
        kinds.setdefault(target.value.name, []).append(k)
    depths = ((i + 0.5) / len(kinds) for i in range(len(kinds)))
    return sorted(ks[round(depth * (len(ks) - 1))] for depth, ks in zip(depths, kinds.values(), strict=True))


def _evidence(targets: list[Target], alone: Collection[int]) -> str:
    """How many values were written alone, and which were not, or which were, whichever are fewer."""
    together = [target for k, target in enumerate(targets) if k not in alone]
    if not together:
        return f"{len(targets)} values, each written alone"
    if len(together) <= len(alone):
        shown = _listed(together)
        return f"{len(targets)} values: {len(alone)} written alone, {len(together)} only together with all: {shown}"
    shown = _listed([targets[k] for k in alone])
    return f"{len(targets)} values: {len(together)} written only together, {len(alone)} also alone: {shown}"


def _listed(targets: list[Target]) -> str:
    """Names of values with their layers, in the order in which the names first appear."""
    layers: dict[str, list[int]] = {}
    for target in targets:
        layers.setdefault(target.value.name, []).extend([] if target.layer is None else [target.layer])
    return ", ".join(f"{name}[{ranges(sorted(found))}]" if found else name for name, found in layers.items())


def written_at_once(evidence: Evidence, facts: Facts) -> tuple[int, float]:
    """Write every value in one run of a prompt with its images, by accessors and by hooks.

    Returns:
        How many values were written, and how far the two runs' logits are apart.
    """
    edits = [_Edit(target, (0,), k) for k, target in enumerate(targets_of(evidence, facts))]
    hooked = _by_hooks(evidence, evidence.ids, edits, facts.readout.layout.extra)
    given = {**evidence.inputs(evidence.ids), **uncached(evidence.module)}
    written = _by_accessors(evidence.model.supposing(facts), given, 1, edits)
    return len(edits), relative_error(written, hooked)


# -- what is written ---------------------------------------------------------------------------------------------------


def targets_of(evidence: Evidence, facts: Facts) -> list[Target]:
    """Everything that is a module's input or output, in the order in which the model computes it."""
    found: list[tuple[int, float, Target]] = []
    for value in (value for value in VALUES.values() if value.stack != "vision"):
        try:
            own = facts.of_stack(value.stack)
        except Unavailable:
            continue
        layers = [layer.index for layer in evidence.ran(own.anatomy)]
        for layer in layers if value.per_layer else [None]:
            try:
                target = dataclasses.replace(_target(evidence, own, VALUES[value.base], layer), value=value)
            except Unavailable:
                continue
            calls = evidence.recording.calls.get(target.site.path)
            if calls:
                call = calls[target.call]
                found.append((call.began if target.site.side == "input" else call.ended, value.rank, target))
    return [target for _, _, target in sorted(found, key=lambda entry: entry[:2])]


def _target(evidence: Evidence, facts: Facts, value: Value, layer: int | None) -> Target:
    """The module input or output at which a hook does what writing the value does.

    What leaves a part inside its module (`Part.closing`) is added to the stream at once and given to the closing norm.
    """
    given = None
    if layer is not None and leaves_inside(value, facts.anatomy, layer):
        part = facts.anatomy.part(value.role, layer)
        if not part.leaves or part.closing is None:
            raise Unavailable(f"{value.name}[{layer}] was not found.")
        site, given = Site(part.closing, "input"), part.entry
    else:
        site = site_of(value, facts.anatomy, layer)
    call = None if layer is None else evidence.call_in_layer(facts.anatomy, site.path, layer)
    calls = evidence.recording.calls.get(site.path, [])
    last = len(calls) - 1 if layer is None and value.rank else 0  # a final norm may also run between passes
    turn = last if call is None else next(i for i, c in enumerate(calls) if c.began == call.began)
    return Target(value, layer, site, turn, given)


def _enters_zeros(evidence: Evidence, facts: Facts, target: Target) -> bool:
    """Whether a target is what a part is given that returns zeros whatever it is given."""
    if target.layer is None or target.site.side != "input" or target.value.role in (None, "layer"):
        return False
    part = facts.of_stack(target.value.stack).anatomy.part(target.value.role, target.layer)
    made = evidence.recording.made(part.exit)
    return made is not None and not bool(made.any())


def _disturbed(tensor: torch.Tensor, edit: _Edit, batch: int, extra: int = 0) -> torch.Tensor:
    """A copy of a value with some rows of the batch shifted by a fixed random direction at every position but the first
    `extra`, which the model puts in front of the tokens."""
    direction = torch.randn(tensor.shape[-1], generator=torch.Generator().manual_seed(edit.seed))
    direction = direction.to(tensor.device, tensor.dtype)
    copy = tensor.clone()
    for row in edit.rows:
        if tensor.shape[0] == batch:
            view = copy[row]
        elif tensor.dim() > 1 and tensor.shape[1] == batch:  # several streams stacked in front of the batch
            view = copy[:, row]
        else:  # batch and positions on one axis
            view = copy.view(batch, -1, tensor.shape[-1])[row]
        view = view[extra:]
        shift = direction * (0.3 * view.float().pow(2).mean().sqrt().clamp(min=1e-3)).to(tensor.dtype)
        if edit.uneven:
            amounts = torch.linspace(0.5, 1.5, len(view), device=view.device, dtype=view.dtype)
            shift = shift * amounts.view(-1, *[1] * (view.dim() - 1))
        view += shift
    return copy


# -- written in two ways -----------------------------------------------------------------------------------------------


def _by_accessors(model: NamedTransformer, given: Any, size: int, edits: list[_Edit]) -> torch.Tensor:
    """The logits with all edits written as a user writes them, in a run of `size` rows."""
    with model.trace(given):
        for edit in edits:
            label, layer = edit.target.value.label, edit.target.layer
            write_value(model, label, _disturbed(read_value(model, label, layer), edit, size), layer)
        logits = model.logits.save()
    return logits


def _by_hooks(evidence: Evidence, batch: torch.Tensor, edits: list[_Edit], extra: int) -> torch.Tensor:
    """The reference: plain forward hooks on the plain module."""
    handles: list[Any] = []
    try:
        for edit in edits:
            handles += _hooks(evidence.module, edit, batch.shape[0], extra)
        return evidence.forward(batch).logits
    finally:
        for handle in handles:
            handle.remove()


def _hooks(root: nn.Module, edit: _Edit, size: int, extra: int) -> list[Any]:
    target = edit.target
    module, now = root.get_submodule(target.site.path), _at_call(target.call)

    def on_output(_: Any, args: tuple, output: Any) -> Any:
        if not now():
            return None
        if isinstance(output, torch.Tensor):
            return _disturbed(output, edit, size, extra)
        return type(output)((_disturbed(output[0], edit, size, extra), *output[1:]))

    def on_input(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        stream = stream_in(args, kwargs) if now() else None
        if stream is None:
            return None
        new = _disturbed(stream, edit, size, extra)
        return tuple(new if a is stream else a for a in args), {k: new if v is stream else v for k, v in kwargs.items()}

    if target.given is not None:
        return _sum_hooks(root.get_submodule(target.given), module, edit, size, now)
    if target.site.side == "output":
        return [module.register_forward_hook(on_output)]
    return [module.register_forward_pre_hook(on_input, with_kwargs=True)]


def _sum_hooks(part: nn.Module, norm: nn.Module, edit: _Edit, size: int, now: Callable[[], bool]) -> list[Any]:
    """Disturb what leaves a part whose norm is given that plus what the part was given."""
    given: list[torch.Tensor] = []

    def on_part(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = stream_in(args, kwargs)
        if stream is not None:
            given.append(stream)

    def on_norm(_: Any, args: tuple) -> Any:
        if not now():
            return None
        left = args[0] - given[-1]
        return (args[0] + _disturbed(left, edit, size) - left, *args[1:])

    return [
        part.register_forward_pre_hook(on_part, with_kwargs=True),
        norm.register_forward_pre_hook(on_norm),
    ]


def _at_call(number: int) -> Callable[[], bool]:
    """A function that is True at the `number`-th time it is called, from 0."""
    count = -1

    def now() -> bool:
        nonlocal count
        count += 1
        return count == number

    return now
