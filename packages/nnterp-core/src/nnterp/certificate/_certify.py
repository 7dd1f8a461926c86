"""The checks themselves, in the order they are made: without weights, with weights, through the accessors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnterp.anatomy import Layer, Part
from nnterp.certificate._certificate import Certificate, Line
from nnterp.certificate._recording import Call, Recording, evaluating, record, static_experts, stream_out
from nnterp.certificate._residual import relative_error, solve_residual
from nnterp.certificate._writes import is_large, prove_writes
from nnterp.devices import input_device
from nnterp.huggingface import text_config
from nnterp.readout import StreamLayout
from nnterp.values._operations import record_operations
from nnterp.values._places import Side
from nnterp.wording import generic_path

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

PROBE_LENGTH, PADS = 10, 4  # longer than the windows of tiny models, so that they bite
PROBE_LENGTH_LARGE, PADS_LARGE = 7, 2  # where tokens are what the certificate costs

PARTS = "parts found, run once and in order, with the stream's shape"
HIDDEN = "layers_output equals HuggingFace's hidden states"
CONSECUTIVE = "each layer reads what the layer before it wrote"
READOUT = "project_on_vocab(last layer) equals the logits"
ROLES = "the MLP is position-wise and the mixer is not"
IDENTITY = "input + contributions == output"
PADDING = "a padded batch equals its single rows"
IDLE = "the forward with nnterp is bit-equal to the one without"


def certify(model: StandardizedTransformer) -> Certificate:
    """Prove a model's names, as far as it can be done with what is loaded.

    Sets on the model what was found on the way: the residual structure of each layer, the way of the readout, modules
    that run more than once, whether padding is exact. Does not raise for a failed line: see `Certificate.failures`.
    """
    started = time.perf_counter()
    checks = _Checks(model)
    if not model.dispatched:
        checks.without_weights()
    else:
        with evaluating(model._module):
            checks.with_weights()
    return Certificate(
        model=model.repo_id or "",
        revision=model.revision,
        model_class=model.anatomy.model_class,
        dtype=str(model._module.dtype).removeprefix("torch."),
        device=str(input_device(model._module)) if model.dispatched else "meta",
        versions={name: _version(name) for name in ("nnterp-core", "nnsight", "transformers", "torch")},
        lines=tuple(checks.lines),
        seconds=time.perf_counter() - started,
    )


_VERSIONS: dict[str, str] = {}


def _version(name: str) -> str:
    """The version of an installed distribution; looked up once, because that reads files."""
    if name not in _VERSIONS:
        _VERSIONS[name] = importlib.metadata.version(name)
    return _VERSIONS[name]


class _Failed(Exception):
    """A check failed that later checks build on."""


class _Checks:
    def __init__(self, model: StandardizedTransformer) -> None:
        self.model = model
        self.module: nn.Module = model._module
        self.lines: list[Line] = []
        large = is_large(self.module)
        self.length = PROBE_LENGTH_LARGE if large else PROBE_LENGTH
        self.pads = PADS_LARGE if large else PADS
        dtype = self.module.dtype
        self.tolerance = max(1e-5, 4 * torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps)
        self.accepts = inspect.signature(self.module.forward).parameters
        self.open_ended = any(p.kind is p.VAR_KEYWORD for p in self.accepts.values())

    @property
    def anatomy(self) -> Any:
        return self.model.anatomy

    # -- lines -----------------------------------------------------------------------------------------------------

    def say(self, name: str, ok: bool, error: float | None = None, detail: str = "", remedy: str = "") -> None:
        """Add a line; a failed one ends the checks."""
        tolerance = None if error is None else self.tolerance
        text = detail if ok else "; ".join(part for part in (detail, remedy) if part)
        self.lines.append(Line(name, "passed" if ok else "failed", error, tolerance, text))
        if not ok:
            raise _Failed

    def skip(self, name: str, reason: str) -> None:
        self.lines.append(Line(name, "skipped", detail=reason))

    def close(
        self, name: str, pairs: list[tuple[str, torch.Tensor, torch.Tensor]], remedy: str, detail: str = ""
    ) -> None:
        """One line for several comparisons: the worst of them counts."""
        worst, where = 0.0, ""
        for label, actual, expected in pairs:
            error = relative_error(actual, expected)
            if not error <= worst:
                worst, where = error, label
        ok = worst <= self.tolerance
        self.say(name, ok, worst, detail if ok else where, remedy)

    # -- the two sequences -----------------------------------------------------------------------------------------

    def without_weights(self) -> None:
        """Shapes and order of the parts, from a forward pass on fake tensors."""
        try:
            with evaluating(self.module), static_experts(self.module), FakeTensorMode(allow_non_fake_inputs=True):
                ids = torch.zeros((1, self.length), dtype=torch.long, device="meta")
                recording = record(self.module, self.forward_kwargs(ids), self.watched())
                self.final_norm_by_order(recording)
                self.closing_norms_by_order(recording)
                self.parts(recording)
        except _Failed:
            return
        except Exception as error:
            reason = f"the model cannot be scanned without weights ({type(error).__name__}: {str(error)[:120]})"
            self.skip(PARTS, f"{reason}; checked when they are loaded")

    def with_weights(self) -> None:
        ids = self.probe_ids(1, self.length)
        inputs = self.forward_kwargs(ids)
        recording = self.recording(inputs)
        hidden = getattr(recording.result, "hidden_states", None)
        try:
            self.final_norm_by_order(recording)
            self.closing_norms_by_order(recording)
            self.parts(recording)
            self.consecutive(recording)
            self.hidden_states(recording, hidden)
            self.readout(recording)
            self.roles(recording)
            self.residual(recording)
            self.through_nnterp(ids, recording)
        except _Failed:
            return

    # -- parts -----------------------------------------------------------------------------------------------------

    def final_norm_by_order(self, recording: Recording) -> None:
        """Names can mislead about the final norm; what runs between the last layer and the head cannot."""
        config = self.model.rename_config
        if config is not None and config.ln_final_name is not None:
            return
        last = recording.last_call(self.ran(recording)[-1].path) if self.ran(recording) else None
        head = recording.last_call(self.anatomy.lm_head) if self.anatomy.lm_head else None
        if last is None or head is None:
            return
        named = recording.last_call(self.anatomy.ln_final) if self.anatomy.ln_final else None
        if named is not None and named.began > last.ended:
            return
        found = [
            (call.began, path)
            for path in recording.calls
            if "norm" in type(self.module.get_submodule(path)).__name__.lower()
            and (call := recording.last_call(path)) is not None
            and last.ended < call.began < head.began
        ]
        absent = dict(self.anatomy.absent)
        fits = [path for _, path in sorted(found, reverse=True) if self.may_feed(recording, path, head)]
        path = fits[0] if fits else None
        if path is None:
            absent["ln_final"] = "no norm between the last layer and the head returns what the head is given"
        else:
            absent.pop("ln_final", None)
        if path != self.anatomy.ln_final:
            self.model.adopt(dataclasses.replace(self.anatomy, ln_final=path, absent=absent))

    def closing_norms_by_order(self, recording: Recording) -> None:
        """A norm inside an attention module closes it if nothing runs in the module after it; else it only looks so."""

        def told(part: Part | None) -> Part | None:
            if part is None or part.closing is None:
                return part
            call, closing = recording.call(part.exit), recording.call(part.closing)
            last = (
                call is not None
                and closing is not None
                and not any(
                    closing.ended < c.began < call.ended
                    for path, calls in recording.calls.items()
                    if path.startswith(f"{part.exit}.")
                    for c in calls
                )
            )
            return part if last else dataclasses.replace(part, closing=None)

        self.tell(told)

    def tell(self, told: Callable[[Part | None], Part | None]) -> None:
        """Change the parts of all layers by what was seen of them."""
        blocks = tuple(
            dataclasses.replace(b, mixer=told(b.mixer), self_attn=told(b.self_attn)) for b in self.anatomy.blocks
        )
        if blocks != self.anatomy.blocks:
            self.model.adopt(dataclasses.replace(self.anatomy, blocks=blocks))

    def may_feed(self, recording: Recording, norm: str, head: Call) -> bool:
        """Whether a norm returns what the head is given; without weights, something of its shape."""
        call = recording.last_call(norm)
        made = None if call is None else call.stream_out
        if made is None or head.stream_in is None or made.shape != head.stream_in.shape:
            return False
        return made.device.type == "meta" or _multiple(head.stream_in, made, self.tolerance)

    def ran(self, recording: Recording) -> list[Layer]:
        """The layers that ran; cross-attention layers of a multimodal model stand aside for a text."""
        return [b for b in self.anatomy.blocks if recording.calls.get(b.path) or b.kind != "cross_attention"]

    def parts(self, recording: Recording) -> None:
        """Every part ran, as often and in the order its name says, on tensors of the stream's shape."""
        wrong: list[str] = []
        previous = 0
        blocks = self.ran(recording)
        first = recording.call(blocks[0].path)
        reference = None if first is None else first.stream_out
        for block in blocks:
            calls = recording.calls.get(block.path, [])
            if len(calls) != 1:
                wrong.append(f"{block.path} ran {len(calls)} times in one forward pass")
                continue
            if calls[0].began < previous:
                wrong.append(f"{block.path} ran before the layer that precedes it")
            previous = calls[0].ended
            out = calls[0].stream_out
            if out is None or reference is None or out.shape != reference.shape:
                wrong.append(f"{block.path} returns {_shape(out)} where the first layer returns {_shape(reference)}")
            for role in ("self_attn", "mixer", "mlp"):
                part = getattr(block, role)
                if part is not None and not (role == "mixer" and part == block.self_attn):
                    wrong += self.part_problems(recording, calls[0], role, part)
        impossible = (
            [] if reference is None or first is None else [*self.two_streams(first), *self.stream_layout(reference)]
        )
        for role in ("embed_tokens", "ln_final", "lm_head"):
            path = getattr(self.anatomy, role)
            if path is not None and not recording.calls.get(path):
                wrong.append(f"{role} ({path}) did not run")
        wrong = impossible or [*wrong, *self.order_of_ends(recording, previous)]
        idle = [b.index for b in self.anatomy.blocks if b not in blocks]
        detail = f"{self.anatomy.num_layers} layers" + (f", of which {idle} run only with an image" if idle else "")
        kept = self.model.readout.layout.kept
        if kept is not None:
            detail += f"; the stream is kept as {kept.name.replace('streams', str(self.model.readout.layout.streams))}"
        remedy = "nnterp cannot serve such a model" if impossible else _REMEDY_ALL
        self.say(PARTS, not wrong, detail="; ".join(wrong[:3]) if wrong else detail, remedy=remedy)
        self.remember(recording, blocks)

    def part_problems(self, recording: Recording, layer: Call, role: str, part: Part) -> list[str]:
        for path in dict.fromkeys((part.entry, part.exit)):
            if not recording.calls.get(path):
                return [f"{role} ({path}) did not run"]
            if recording.within(path, layer) is None:
                return [f"{role} ({path}) ran outside its layer"]
        call = recording.within(part.exit, layer)
        out = None if call is None else call.stream_out
        stream = layer.stream_out
        # A layer may carry several streams (hyper-connections), stacked or side by side; its parts return one.
        widths = {self.anatomy.sizes.hidden_size, None if stream is None else stream.shape[-1]}
        if out is None or out.shape[-1] not in widths:
            return [f"{role} ({part.exit}) returns {_shape(out)}, the layer {_shape(stream)}"]
        return []

    def stream_layout(self, stream: torch.Tensor) -> list[str]:
        """Where batch and sequence stand in what layers return."""
        layout = StreamLayout.of(stream.shape, batch=1, seq=self.length)
        if layout is None:
            return [
                f"layers carry {_shape(stream)} for an input of [1, {self.length}]: no axes of it are batch and "
                "sequence"
            ]
        self.model.readout.layout = layout
        width = self.anatomy.sizes.hidden_size
        if width is not None and stream.shape[-1] % width:
            return [f"layers return {_shape(stream)}, but the config's hidden size is {width}"]
        return []

    def two_streams(self, layer: Call) -> list[str]:
        """A reversible layer takes and returns two streams, so neither alone is the residual stream."""
        out, result = layer.stream_out, layer.output
        if out is None or not isinstance(result, (tuple, list)):
            return []
        given = [
            a for a in (*layer.args, *layer.kwargs.values()) if isinstance(a, torch.Tensor) and a.shape == out.shape
        ]
        made = [a for a in result if isinstance(a, torch.Tensor) and a.shape == out.shape]
        if len(given) > 1 and len(made) > 1:
            return [
                "layers take and return two streams (reversible residuals), so no one tensor is the residual stream"
            ]
        return []

    def order_of_ends(self, recording: Recording, last_layer_ended: int) -> list[str]:
        wrong = []
        first = recording.call(self.anatomy.blocks[0].path)
        embed = recording.call(self.anatomy.embed_tokens) if self.anatomy.embed_tokens else None
        if first and embed and embed.began > first.began:
            wrong.append(f"embed_tokens ({self.anatomy.embed_tokens}) ran after the first layer began")
        for role in ("ln_final", "lm_head"):
            path = getattr(self.anatomy, role)
            call = recording.last_call(path) if path else None
            if call is not None and call.began < last_layer_ended:
                wrong.append(f"{role} ({path}) ran before the last layer ended")
        return wrong

    def remember(self, recording: Recording, blocks: list[Layer]) -> None:
        """What the rest of the library needs to know about how this model runs."""
        model = self.model
        model.repeated = frozenset(path for path, calls in recording.calls.items() if len(calls) > 1)
        model.run_order = {path: calls[-1].began for path, calls in recording.calls.items()}
        kept: set[tuple[str, Side]] = set()
        for path, calls in recording.calls.items():
            edges: tuple[tuple[Side, Any], ...] = (("input", calls[0].stream_in), ("output", calls[0].stream_out))
            kept |= {(path, side) for side, x in edges if x is not None and self.is_kept(x)}
        model.kept_as_stream = frozenset(kept)
        outputs = [call.output for b in self.anatomy.blocks if (call := recording.call(b.path))]
        longest = max((len(o) for o in outputs if isinstance(o, (tuple, list))), default=0)
        if longest > 1 and recording.result.logits.device.type != "meta":
            recording = self.with_cache(recording)
        through = tuple(self.handed_through(recording, blocks, entry) for entry in range(1, longest))
        model.readout.returns = tuple(
            through[: len(call.output) - 1]
            if (call := recording.call(b.path)) is not None and isinstance(call.output, (tuple, list))
            else None
            for b in self.anatomy.blocks
        )

    def with_cache(self, recording: Recording) -> Recording:
        """The same forward pass with a cache, which is where layers hand states on."""
        try:
            return record(
                self.module, {"input_ids": self.probe_ids(1, self.length)}, {b.path for b in self.anatomy.blocks}
            )
        except Exception:
            return recording

    @staticmethod
    def handed_through(recording: Recording, blocks: list[Layer], entry: int) -> int | str | None:
        """The argument that a layer hands on as the `entry`-th thing it returns (a recurrent state), if any.

        Told by a layer that is given what the layer before it returned, or, for a state of its own that comes and goes
        with the cache, by an argument of the same make.
        """
        for before, after in itertools.pairwise(blocks):
            source, target = recording.call(before.path), recording.call(after.path)
            if (
                source is None
                or target is None
                or not isinstance(source.output, (tuple, list))
                or len(source.output) <= entry
            ):
                continue
            made = source.output[entry]
            if made is None:
                continue
            given: list[tuple[int | str, Any]] = [*enumerate(target.args), *target.kwargs.items()]
            for key, value in given:
                if key not in (0, "hidden_states") and _alike(made, value):
                    return key
            own: list[tuple[int | str, Any]] = [*enumerate(source.args), *source.kwargs.items()]
            for key, value in own:
                if key not in (0, "hidden_states") and not isinstance(made, torch.Tensor) and _same_make(made, value):
                    return key
        return None

    # -- the stream ------------------------------------------------------------------------------------------------

    def consecutive(self, recording: Recording) -> None:
        """What a layer is given is what the one before it returned, or that and what one module in between adds."""
        blocks = self.ran(recording)
        pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        between: list[str] = []
        for before, after in itertools.pairwise(blocks):
            given, made = recording.call(after.path), recording.call(before.path)
            assert given is not None
            assert made is not None
            if given.stream_in is None or made.stream_out is None:
                continue
            stream = made.stream_out
            if relative_error(stream, given.stream_in) > self.tolerance:
                path = self.adds_between(recording, made, given)
                if path is not None:
                    between.append(path)
                    stream = stream + recording.calls[path][0].stream_out
            pairs.append((f"between {before.path} and {after.path}", given.stream_in, stream))
        detail = f"and what {', '.join(dict.fromkeys(map(generic_path, between)))} adds" if between else ""
        self.close(CONSECUTIVE, pairs, _REMEDY_LAYERS, detail)
        if tuple(between) != self.anatomy.between:
            self.model.adopt(dataclasses.replace(self.anatomy, between=tuple(between)))

    def adds_between(self, recording: Recording, before: Call, after: Call) -> str | None:
        """The module outside of all layers whose output, added to what a layer returned, is what the next is given.

        Layers left out of the list are no such modules, nor is anything in them.
        """
        kinds = tuple({type(self.module.get_submodule(block.path)) for block in self.anatomy.blocks})
        for path, calls in recording.calls.items():
            call = calls[0]
            made = call.stream_out
            if len(calls) > 1 or not before.ended < call.began < call.ended < after.began or made is None:
                continue
            if made.shape != after.stream_in.shape or any(isinstance(m, kinds) for m in self.holding(path)):  # type: ignore[union-attr]
                continue
            if relative_error(before.stream_out + made, after.stream_in) <= self.tolerance:  # type: ignore[operator,arg-type]
                return path
        return None

    def holding(self, path: str) -> Iterator[nn.Module]:
        """A module and all those that hold it."""
        while path:
            yield self.module.get_submodule(path)
            path = path.rpartition(".")[0]

    def hidden_states(self, recording: Recording, hidden: tuple[torch.Tensor, ...] | None) -> None:
        blocks = self.ran(recording)
        if hidden is None:
            self.skip(HIDDEN, "the model does not return hidden states")
            return
        if self.anatomy.other_stacks:  # HuggingFace returns those of several stacks, in the order in which they run
            hidden = hidden[-len(blocks) :]
        if len(hidden) not in (len(blocks), len(blocks) + 1):
            self.say(
                HIDDEN,
                False,
                detail=f"HuggingFace returns {len(hidden)} of them for {len(blocks)} layers",
                remedy=_REMEDY_LAYERS,
            )
        entering = recording.call(blocks[0].path)
        assert entering is not None
        # Most models begin with the embeddings, some (Mamba, RWKV) with what leaves the first layer.
        start = None if entering.stream_in is None else self.main_stream(entering.stream_in)
        begins_with_input = start is not None and relative_error(start, hidden[0]) <= self.tolerance
        own = hidden[1:] if begins_with_input else hidden[: len(blocks)]
        pairs = []
        for block, state in zip(blocks, own, strict=False):
            call = recording.call(block.path)
            made = None if call is None else call.stream_out
            if made is None:
                continue
            made = self.main_stream(made) if made.shape[1] != state.shape[1] else made
            if block is blocks[-1]:  # HuggingFace returns the last one normalised, or not, by model
                several = made.dim() > 3
                made = min(self.ends(recording, made), key=lambda c: relative_error(c, state))
                if several and relative_error(made, state) > self.tolerance:
                    continue  # several streams are merged after the last layer; the readout line covers it
            pairs.append((block.path, made, state))
        streams = self.model.readout.layout.streams
        detail = f"the first of {streams} streams" if streams > 1 else ""
        self.close(
            HIDDEN, pairs, _REMEDY_LAYERS, "the last of those it returns" if self.anatomy.other_stacks else detail
        )

    def own_positions(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream as it is shown, without the positions that the model puts in front of the tokens."""
        layout = self.model.readout.layout
        if layout.extra:
            return stream[:, layout.extra :]
        return layout.shown(stream) if self.is_kept(stream) else stream

    def is_kept(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the probe's one row has the layout of the model's own stream; told by its lengths."""
        return self.model.readout.layout.is_kept(tensor.shape, 1, self.length)

    def batch_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the probe's one row with the batch in front."""
        turned = self.model.readout.layout.sequence_first and self.is_kept(tensor)
        return tensor.transpose(0, 1) if turned else tensor

    def main_stream(self, stream: torch.Tensor) -> torch.Tensor:
        """Of several streams that the model keeps one after the other, the first, which is HuggingFace's."""
        stream = self.own_positions(stream)
        return stream[:, :, 0] if self.model.readout.layout.streams > 1 else stream

    def ends(self, recording: Recording, made: torch.Tensor) -> list[torch.Tensor]:
        """What HuggingFace may call the last hidden state."""
        norm = recording.last_call(self.anatomy.ln_final) if self.anatomy.ln_final else None
        head = recording.last_call(self.anatomy.lm_head) if self.anatomy.lm_head else None
        later = [t for t in (norm and norm.stream_out, head and head.stream_in) if t is not None]
        return [made, *later]

    # -- the readout -----------------------------------------------------------------------------------------------

    def readout(self, recording: Recording) -> None:
        """Projecting the last layer gives the logits, and the parts named as final norm and head carry it there."""
        logits = recording.result.logits
        last = recording.call(self.ran(recording)[-1].path)
        assert last is not None
        assert last.stream_out is not None
        readout = self.model.readout
        flow = self.flow_problem(recording)
        tried: list[tuple[float, str]] = []
        for way, project in (("chain", readout.by_chain), ("replay", readout.by_replay)):
            try:
                made = project(self.module, self.own_positions(last.stream_out))
            except Exception as error:
                tried.append((math.inf, f"{way}: {type(error).__name__}: {str(error)[:80]}"))
                continue
            error_ = relative_error(made, logits) if isinstance(made, torch.Tensor) else math.inf
            if error_ <= self.tolerance:
                readout.way = way  # type: ignore[assignment]
                self.say(
                    READOUT,
                    way == "chain" or not flow,
                    error_,
                    str(readout) if way == "chain" or not flow else flow,
                    _REMEDY_ENDS,
                )
                return
            tried.append((error_, f"{way}: off by {error_:.1e}"))
        readout.way, readout.reason = None, "; ".join(reason for _, reason in tried)
        config = self.model.rename_config
        named = config is not None and (config.ln_final_name or config.lm_head_name)
        if flow or named:
            self.say(READOUT, False, min(e for e, _ in tried), flow or readout.reason, _REMEDY_ENDS)
        readout.reason = "its logits depend on more than what leaves the last layer"
        self.skip(READOUT, f"{readout.reason}: hidden states cannot be projected on the vocabulary")

    def flow_problem(self, recording: Recording) -> str:
        """What is wrong with the way from the final norm through the head to the logits; "" if nothing is.

        Follows tensors from module to module: the head must return what becomes the logits, and what it is given must
        be what the final norm returned, be it by way of other modules and up to a factor.
        """
        head, norm = self.anatomy.lm_head, self.anatomy.ln_final
        logits = recording.result.logits
        if head is None:
            return "no head was found"
        call = recording.last_call(head)
        made = None if call is None else call.stream_out
        if call is None or made is None or made.shape[-1] != logits.shape[-1]:
            return f"lm_head ({head}) returns {_shape(made)}, the logits are {_shape(logits)}"
        if not _monotone(made, logits):
            return f"the logits are not a function of what lm_head ({head}) returns"
        if norm is None or call.stream_in is None:
            return ""
        start = recording.last_call(norm)
        if start is None or start.stream_out is None:
            return f"ln_final ({norm}) returned nothing"
        reached = [start.stream_out]
        for path in sorted(recording.calls, key=lambda p: recording.calls[p][-1].began):
            step = recording.calls[path][-1]
            if not start.ended < step.began < call.began or step.stream_in is None or step.stream_out is None:
                continue
            if any(_multiple(step.stream_in, r, self.tolerance) for r in reached):
                reached.append(step.stream_out)
        if any(_multiple(call.stream_in, r, self.tolerance) for r in reached):
            return ""
        return f"lm_head ({head}) is not given what ln_final ({norm}) returns"

    # -- the roles -------------------------------------------------------------------------------------------------

    def roles(self, recording: Recording) -> None:
        """The feed-forward treats every position alone, the mixer does not: told by calling them on edited inputs."""
        problems: list[str] = []
        mixing: set[type] = set()
        still: list[tuple[type, str]] = []
        for block in self.ran(recording):
            layer = recording.call(block.path)
            assert layer is not None
            for part in dict.fromkeys(p for p in (block.self_attn, block.mixer) if p is not None):
                found = self.reaches(recording, layer, part)
                kind = type(self.module.get_submodule(part.entry))
                if found:
                    mixing.add(kind)
                elif found is False:
                    still.append((kind, f"{part} ({block.kind}) does not move information between positions"))
            if block.mlp is None:
                continue
            if block.kind != "recurrent" and self.reaches(
                recording, layer, block.mlp
            ):  # RWKV's channel mix shifts tokens
                problems.append(f"{block.mlp} moves information between positions")
            if self.is_norm(recording, layer, block.mlp):
                problems.append(f"{block.mlp} is a norm, not a feed-forward")
        # A layer that borrows another's keys and values mixes nothing of its own input; its class mixes elsewhere.
        problems += [problem for kind, problem in still if kind not in mixing]
        self.say(ROLES, not problems, detail="; ".join(problems[:3]), remedy=_REMEDY_PARTS)

    def reaches(self, recording: Recording, layer: Call, part: Part) -> bool | None:
        """Whether an early position's input changes other positions' output; None if it cannot be called alone."""
        if part.entry != part.exit:
            ends = [self.reaches(recording, layer, Part.module(path)) for path in (part.entry, part.exit)]
            return None if all(f is None for f in ends) else any(ends)
        call = recording.within(part.entry, layer)
        before = None if call is None else call.stream_out
        after = self.recall(recording, layer, part.entry, self.nudged)
        if before is None or after is None or before.dim() < 2 or before.shape != after.shape:
            return None
        before, after = self.batch_first(before), self.batch_first(after)
        if before.dim() == 2:  # positions and batch on one axis
            before, after = before[None], after[None]
        change = (after.double() - before.double()).abs().amax(dim=(0, -1))
        while change.dim() > 1:
            change = change.amax(dim=0)
        if change.max() <= self.tolerance * before.double().abs().max().clamp(min=1e-30):
            return None
        return bool(torch.cat([change[:_NUDGED], change[_NUDGED + 1 :]]).max() > 1e-3 * change.max())

    def nudged(self, x: torch.Tensor) -> torch.Tensor:
        """The stream with one position replaced by another direction of about the same size."""
        shown = self.batch_first(x)
        where = (slice(None), _NUDGED) if x.dim() > 2 else (_NUDGED,)
        shown[where] = shown[where].roll(1, -1) * 1.5 + 0.1 * shown[where].abs().mean()
        return x

    def is_norm(self, recording: Recording, layer: Call, part: Part) -> bool:
        """Whether a part has no matrices and returns the same for twice its input."""
        if part.entry != part.exit or any(p.dim() > 1 for p in self.module.get_submodule(part.entry).parameters()):
            return False
        call = recording.within(part.entry, layer)
        before = None if call is None else call.stream_out
        after = self.recall(recording, layer, part.entry, lambda x: 2 * x)
        return before is not None and after is not None and relative_error(after, before) < 1e-2

    def recall(
        self, recording: Recording, layer: Call, path: str, edit: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """Call one module again on the arguments it had in a layer, the stream among them edited."""
        call = recording.within(path, layer)
        stream = None if call is None else call.stream_in
        if call is None or stream is None:
            return None
        # Some attentions are given the stream several times, as query, key and value, each in a form of its own.
        given = (*call.args, *call.kwargs.values())
        mine = [a for a in given if isinstance(a, torch.Tensor) and a.is_floating_point() and a.shape == stream.shape]
        args = tuple(edit(a.clone()) if any(a is m for m in mine) else a for a in call.args)
        kwargs = {k: edit(v.clone()) if any(v is m for m in mine) else v for k, v in call.kwargs.items()}
        try:
            return stream_out(self.module.get_submodule(path)(*args, **kwargs))
        except Exception:
            return None

    # -- the sum ---------------------------------------------------------------------------------------------------

    def residual(self, recording: Recording) -> None:
        """Input plus contributions is output, in the structure that was found."""
        operations = self.ends_inside(recording)
        structures = []
        for block in self.anatomy.blocks:
            inside = [p for p in recording.calls if p.startswith(f"{block.path}.")]
            structures.append(solve_residual(block, recording, inside, self.tolerance, operations))
        self.model.residual_structures = tuple(structures)
        self.named_parts_read_the_stream(recording)
        idle = {b.index for b in self.anatomy.blocks} - {b.index for b in self.ran(recording)}
        unknown = [(i, s) for i, s in enumerate(structures) if s.kind == "unknown" and i not in idle]
        if not unknown:
            kinds = sorted({s.kind for i, s in enumerate(structures) if i not in idle})
            self.say(IDENTITY, True, max(s.error or 0.0 for s in structures), ", ".join(kinds))
            return
        index, first = unknown[0]
        detail = f"layers {', '.join(str(i) for i, _ in unknown[:6])}: {first.reason}"
        config = self.model.rename_config
        named = config is not None and (config.attn_name or config.mlp_name)
        if named or not self.holds_more(recording, self.anatomy.blocks[index]):
            self.say(IDENTITY, False, first.error, detail, _REMEDY_PARTS)
        self.skip(IDENTITY, f"{detail}; contributions are unavailable there")

    def ends_inside(self, recording: Recording) -> dict[str, Call]:
        """Where parts leave whose module adds the stream by itself and normalises it before it returns.

        It is the operation whose output, added to what the part is given, is what the norm is given. The anatomy is
        told; what is returned are these operations as calls, by the ends of their parts.
        """
        parts = {p.exit: p for b in self.ran(recording) for p in (b.mixer, b.self_attn) if p is not None and p.closing}
        if not parts:
            return {}
        inputs = self.forward_kwargs(self.probe_ids(1, self.length))
        operations = record_operations(self.module, list(parts), lambda: self.module(**inputs), arguments=False)
        found: dict[str, Call] = {}
        for path, part in parts.items():
            part_call, closing = recording.call(path), recording.call(part.closing)  # type: ignore[arg-type]
            x = None if part_call is None else part_call.stream_in
            mid = None if closing is None else closing.stream_in
            if closing is None or x is None or mid is None or len(recording.calls[path]) > 1:
                continue
            for operation in sorted(operations.of(path), key=lambda o: -o.ended):
                made = operation.output
                if operation.times > 1 or not isinstance(made, torch.Tensor) or made.shape != x.shape:
                    continue
                if relative_error(x + made, mid) <= self.tolerance:
                    parts[path] = dataclasses.replace(part, leaves=operation.labels)
                    found[parts[path].end] = Call((), {}, made, closing.began - 1, closing.began)
                    break

        self.tell(lambda part: None if part is None else parts.get(part.exit, part))
        return found

    def named_parts_read_the_stream(self, recording: Recording) -> None:
        """A part the user named must be given the stream, as it is or normalised: the last projection of an MLP returns
        what the MLP returns, but what it is given is something else."""
        config = self.model.rename_config
        roles = [
            role for role, name in (("self_attn", "attn_name"), ("mlp", "mlp_name")) if config and getattr(config, name)
        ]
        norms = [p for p in recording.calls if "norm" in type(self.module.get_submodule(p)).__name__.lower()]
        wrong = []
        for block, structure in zip(self.anatomy.blocks, self.model.residual_structures, strict=True):
            layer = recording.call(block.path)
            if layer is None:
                continue
            for role in roles:
                part = getattr(block, role)
                call = None if part is None else recording.within(part.entry, layer)
                if call is None or call.stream_in is None:
                    continue
                sources = [layer.stream_in]
                if structure.mid is not None and (mid := recording.within(structure.mid, layer)) is not None:
                    sources.append(mid.stream_in if structure.mid_side == "input" else mid.stream_out)
                sources += [own.stream_out for p in norms if (own := recording.within(p, layer)) is not None]
                given = call.stream_in.flatten()
                if not any(
                    s is not None and s.numel() == given.numel() and torch.equal(s.flatten(), given) for s in sources
                ):
                    wrong.append(f"{part.entry} is not given the residual stream, nor a norm of it")
        if wrong:
            self.say(IDENTITY, False, detail="; ".join(wrong[:2]), remedy=_REMEDY_PARTS)

    def holds_more(self, recording: Recording, block: Layer) -> bool:
        """Whether a layer holds more than parts and norms, or several streams: then no simple sum is expected."""
        call = recording.call(block.path)
        x, y = (None, None) if call is None else (call.stream_in, call.stream_out)
        if x is None or y is None or x.shape != y.shape or y.dim() > 3 or y.shape[-1] != self.anatomy.sizes.hidden_size:
            return True
        module = self.module.get_submodule(block.path)
        known = [p.path or p.entry for p in (block.mixer, block.self_attn, block.mlp) if p is not None]
        for name, child in module.named_children():
            inside = any(k == f"{block.path}.{name}" or k.startswith(f"{block.path}.{name}.") for k in known)
            if not inside and "norm" not in type(child).__name__.lower() and next(child.parameters(), None) is not None:
                return True
        return next(module.parameters(recurse=False), None) is not None

    # -- through nnterp --------------------------------------------------------------------------------------------

    def through_nnterp(self, ids: torch.Tensor, recording: Recording) -> None:
        """What a user gets: an idle trace changes nothing, padding is exact or refused, writes do what hooks do."""
        model = self.model
        with model.trace(ids):
            traced = model.logits.save()
        plain = recording.result.logits
        if not torch.equal(traced, plain):  # it may have been computed without a mask or a cache
            takes_mask = "attention_mask" in self.accepts or self.open_ended
            kwargs = {"attention_mask": torch.ones_like(ids)} if takes_mask else {}
            plain = self.module(input_ids=ids, **kwargs).logits
        self.say(IDLE, torch.equal(traced, plain), relative_error(traced, plain))
        self.padding(ids, traced)
        prove_writes(self, ids, recording)

    def padding(self, alone: torch.Tensor, logits: torch.Tensor) -> None:
        """Rows of a left-padded batch equal the same prompts alone, or padding is refused.

        nnsight counts positions from each row's first token and passes them. RoBERTa and its kin count them otherwise,
        and rightly so if nobody tells them: whichever is exact is what the model will be given.

        Args:
            alone: Ids of one row.
            logits: The model's logits of it.
        """
        model = self.model
        if getattr(text_config(self.module.config), "index_topk", None):
            model.padding_is_exact = False
            self.skip(
                PADDING,
                "its indexer picks keys without regard to padding; padding is refused, equal lengths share a batch",
            )
            return
        ids = self.probe_ids(2, self.length + self.pads, seed=1)
        ids[1:, self.pads :] = alone
        mask = torch.ones_like(ids)
        mask[1, : self.pads] = 0
        filler = getattr(model.tokenizer, "pad_token_id", None)
        if filler is not None:
            ids[1, : self.pads] = filler
        side = getattr(model.tokenizer, "padding_side", None)
        model.padding_is_exact = True
        best, why = math.inf, ""
        try:
            if side is not None:
                model.tokenizer.padding_side = "left"
            for counts in (True, False):
                model.positions_from_mask = counts
                try:
                    with model.trace({"input_ids": ids, "attention_mask": mask}):
                        together = model.logits.save()
                except Exception as caught:
                    why = why or f"the model does not run on one ({type(caught).__name__}: {str(caught)[:80]})"
                    continue
                error = relative_error(together[1:, self.pads :], logits)
                # Masked positions still enter the kernels' sums, so rows agree to rounding, not to the bit.
                if error <= 10 * self.tolerance:
                    detail = "left padding" if counts else "left padding, positions counted by the model itself"
                    self.lines.append(Line(PADDING, "passed", error, 10 * self.tolerance, detail))
                    return
                best = min(best, error)
        finally:
            if side is not None:
                model.tokenizer.padding_side = side
        model.padding_is_exact, model.positions_from_mask = False, True
        why = why if best == math.inf else f"HuggingFace's own forward is off by {best:.1e} under left padding"
        self.skip(PADDING, f"{why}; padding is refused, prompts of equal length share a batch")

    # -- inputs ----------------------------------------------------------------------------------------------------

    def watched(self) -> set[str]:
        """The model's parts, each layer's modules down to three levels, and the few modules outside of the layers."""
        anatomy = self.anatomy
        paths = {p for p in (anatomy.embed_tokens, anatomy.ln_final, anatomy.lm_head) if p is not None}
        blocks = tuple(f"{block.path}." for block in anatomy.blocks)
        for block in anatomy.blocks:
            paths.add(block.path)
            for part in (block.mixer, block.self_attn, block.mlp):
                if part is not None:
                    paths |= {part.entry, part.exit}
            for name, child in self.module.get_submodule(block.path).named_modules():
                if name and name.count(".") < 3 and not isinstance(child, nn.ModuleList) and not _LISTED.search(name):
                    paths.add(f"{block.path}.{name}")
        owner = anatomy.layers.rpartition(".")[0]
        for path, child in self.module.named_modules():
            leaf = not any(child.children()) or (bool(anatomy.other_stacks) and path.startswith(f"{owner}."))
            if path and leaf and not path.startswith(blocks) and not _TOWER.search(path) and path.count(".") < 4:
                paths.add(path)
        return paths

    def probe_ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random token ids that are no special tokens, the same on every machine."""
        embedding = self.module.get_input_embeddings()
        vocab = min(embedding.weight.shape[0], self.anatomy.sizes.vocab_size or embedding.weight.shape[0])
        special = {int(i) for i in getattr(self.model.tokenizer, "all_special_ids", ()) if i is not None}
        config = self.module.config
        for owner in (config, getattr(config, "text_config", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                    special.add(value)
        generator = torch.Generator().manual_seed(seed)
        ordinary = torch.tensor([i for i in range(min(vocab, 4096)) if i not in special] or [0])
        ids = ordinary[torch.randint(len(ordinary), (rows, length), generator=generator)]
        return ids.to(input_device(self.module))

    def forward_kwargs(self, ids: torch.Tensor) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"input_ids": ids}
        if "use_cache" in self.accepts or self.open_ended:
            kwargs["use_cache"] = False
        return kwargs

    def recording(self, inputs: dict[str, Any]) -> Recording:
        """One watched forward pass, with HuggingFace's own hidden states if the model returns them."""
        watched = self.watched()
        try:
            return record(self.module, {**inputs, "output_hidden_states": True}, watched)
        except Exception:
            return record(self.module, inputs, watched)


_NUDGED = 1  # the position whose input is changed to see what else changes

_LISTED = re.compile(r"\.\d+(\.|$)")  # entries of lists inside a layer: experts, of which there may be hundreds

_TOWER = re.compile(r"(^|\.)(vision|visual|image|audio|speech)")

_REMEDY_LAYERS = "RenameConfig(layers_name=...) must name the whole list of the decoder's layers"
_REMEDY_PARTS = "name the parts with RenameConfig(attn_name=, mlp_name=)"
_REMEDY_ENDS = "name the norm and the head with RenameConfig(ln_final_name=, lm_head_name=)"
_REMEDY_ALL = "name the parts with RenameConfig(layers_name=, attn_name=, mlp_name=, ln_final_name=, lm_head_name=)"


def _multiple(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether `a` is `b` times one number."""
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.double().reshape(-1, a.shape[-1]), b.double().reshape(-1, b.shape[-1])
    scale = (a * b).sum() / b.square().sum().clamp(min=1e-30)
    return bool(scale.abs() > 1e-12) and relative_error(a, b * scale) <= tolerance


def _monotone(raw: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether logits rank tokens as the head's output does, up to a sign: true of scales and softcaps.

    Of a head that unembeds several streams, one output must.
    """
    if raw.dim() == logits.dim() + 1:
        return any(_monotone(one, logits) for axis in range(raw.dim() - 1) for one in raw.unbind(axis))
    if raw.shape != logits.shape:
        return False
    row, out = raw.reshape(-1, raw.shape[-1])[-1].double(), logits.reshape(-1, logits.shape[-1])[-1].double()
    order = row.argsort()
    steps = out[order].diff()
    slack = 1e-4 * (out.max() - out.min())
    return bool((steps >= -slack).all() or (steps <= slack).all())


def _alike(a: Any, b: Any) -> bool:
    """Whether two things are the same object, equal tensors, or containers of such."""
    if a is b:
        return a is not None
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.device.type != "meta" and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b) > 0:
        return all(x is y or _alike(x, y) for x, y in zip(a, b, strict=True))
    return False


def _same_make(a: Any, b: Any) -> bool:
    """Whether two containers hold tensors of the same shapes."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
    return (
        isinstance(a, (tuple, list))
        and isinstance(b, (tuple, list))
        and len(a) == len(b) > 0
        and all(map(_same_make, a, b))
    )


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))
