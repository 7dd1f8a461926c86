"""The checks themselves, in the order they are made: without weights, with weights, through the accessors."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnterp.anatomy import Part
from nnterp.certificate._certificate import Certificate, Line
from nnterp.certificate._recording import Call, Recording, evaluating, record, stream_in, stream_out
from nnterp.certificate._residual import ResidualStructure, relative_error, solve_residual

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

PROBE_LENGTH = 12
SHORT_LENGTH = 7
MAX_WRITES = 48  # rows of the batch in which writes are proven; more values than that are sampled evenly


def certify(model: StandardizedTransformer) -> Certificate:
    """Prove a model's names, as far as it can be done with what is loaded.

    Sets `model.residual_structures` and the way of `model.readout` to what was proven. Does not raise for a failed
    line: see `Certificate.failures`.
    """
    started = time.perf_counter()
    checks = _Checks(model)
    if any(p.device.type == "meta" for p in model._module.parameters()):
        checks.without_weights()
    else:
        with evaluating(model._module):
            checks.with_weights()
    weights = model._module.dtype
    return Certificate(
        model=model.repo_id or "",
        revision=model.revision,
        model_class=model.anatomy.model_class,
        dtype=str(weights).removeprefix("torch."),
        device=str(next(model._module.parameters()).device),
        versions={name: importlib.metadata.version(name) for name in ("nnterp-core", "nnsight", "transformers", "torch")},
        lines=tuple(checks.lines),
        seconds=time.perf_counter() - started,
    )


class _Failed(Exception):
    """A check failed in a way that later checks build on."""


class _Checks:
    def __init__(self, model: StandardizedTransformer) -> None:
        self.model = model
        self.module: nn.Module = model._module
        self.anatomy = model.anatomy
        self.lines: list[Line] = []
        dtype = self.module.dtype
        self.tolerance = max(1e-5, 4 * torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps)

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def say(self, name: str, ok: bool, error: float | None = None, detail: str = "", remedy: str = "") -> bool:
        tolerance = None if error is None else self.tolerance
        text = detail if ok else "; ".join(part for part in (detail, remedy) if part)
        self.lines.append(Line(name, "passed" if ok else "failed", error, tolerance, text))
        return ok

    def skip(self, name: str, reason: str) -> None:
        self.lines.append(Line(name, "skipped", detail=reason))

    def close(self, name: str, pairs: list[tuple[str, torch.Tensor, torch.Tensor]], remedy: str) -> bool:
        """One line for several comparisons: the worst of them counts."""
        worst, where = 0.0, ""
        for label, actual, expected in pairs:
            error = relative_error(actual, expected)
            if not error <= worst:
                worst, where = error, label
        ok = worst <= self.tolerance
        return self.say(name, ok, worst, "" if ok else where, remedy)

    # -- without weights -------------------------------------------------------------------------------------------

    def without_weights(self) -> None:
        """Shapes and order of the parts, from a forward pass on fake tensors."""
        ids = torch.zeros((1, PROBE_LENGTH), dtype=torch.long, device="meta")
        try:
            with evaluating(self.module), FakeTensorMode(allow_non_fake_inputs=True):
                recording = record(self.module, self.forward_kwargs(ids), self.watched())
                self.parts(recording)
        except _Failed:
            return
        except Exception as error:
            self.skip(
                "parts found, run once and in order, with the stream's shape",
                f"the model cannot be scanned without weights ({type(error).__name__}: {str(error)[:120]}); checked when they are loaded",
            )

    # -- with weights ----------------------------------------------------------------------------------------------

    def with_weights(self) -> None:
        ids = self.probe_ids(1, PROBE_LENGTH)
        inputs = self.forward_kwargs(ids)
        plain = self.module(**inputs)
        hidden = self.reference_hidden_states(inputs)
        recording = record(self.module, inputs, self.watched())
        try:
            self.parts(recording)
            self.stream(recording, hidden)
            self.final(recording, plain.logits)
            self.roles(recording)
            self.residual(recording)
        except _Failed:
            return
        self.padding()
        self.accessors(ids, plain.logits)

    def parts(self, recording: Recording) -> None:
        """Every part ran, as often and in the order its name says, on tensors of the stream's shape."""
        wrong: list[str] = []
        previous = 0
        reference = recording.output(self.anatomy.blocks[0].path)
        for block in self.anatomy.blocks:
            calls = recording.calls.get(block.path, [])
            if len(calls) != 1:
                wrong.append(f"{block.path} ran {len(calls)} times in one forward pass")
                continue
            if calls[0].began < previous:
                wrong.append(f"{block.path} ran before the layer that precedes it")
            previous = calls[0].ended
            out = recording.output(block.path)
            if out is None or reference is None or out.shape != reference.shape:
                wrong.append(f"{block.path} returns {_shape(out)} where the first layer returns {_shape(reference)}")
            for role, part in (("self_attn", block.self_attn), ("mixer", block.mixer), ("mlp", block.mlp)):
                wrong += self.part_problems(recording, calls[0], role, part)
        width = self.anatomy.sizes.hidden_size
        if reference is not None and width is not None and reference.shape[-1] != width:
            wrong.append(f"layers return {_shape(reference)}, but the config's hidden size is {width}")
        for role in ("embed_tokens", "ln_final", "lm_head"):
            path = getattr(self.anatomy, role)
            if path is not None and not recording.calls.get(path):
                wrong.append(f"{role} ({path}) did not run")
        self.order_of_ends(recording, previous, wrong)
        detail = f"{self.anatomy.num_layers} layers" if not wrong else "; ".join(wrong[:3])
        remedy = "name the parts with RenameConfig(layers_name=, attn_name=, mlp_name=, ln_final_name=, lm_head_name=)"
        if not self.say("parts found, run once and in order, with the stream's shape", not wrong, detail=detail, remedy=remedy):
            raise _Failed

    def part_problems(self, recording: Recording, layer: Call, role: str, part: Part | None) -> list[str]:
        if part is None:
            return []
        problems = []
        for path in dict.fromkeys((part.entry, part.exit)):
            call = recording.call(path)
            if call is None:
                problems.append(f"{role} ({path}) did not run")
            elif not layer.began < call.began < layer.ended:
                problems.append(f"{role} ({path}) ran outside its layer")
        if not problems:
            out = recording.output(part.exit)
            stream = stream_out(layer.output)
            # Several streams side by side (hyper-connections) are wider than what a part returns.
            if out is None or stream is None or out.shape[-1] != stream.shape[-1]:
                problems.append(f"{role} ({part.exit}) returns {_shape(out)}, the layer {_shape(stream)}")
        return problems

    def order_of_ends(self, recording: Recording, last_layer_ended: int, wrong: list[str]) -> None:
        first = recording.call(self.anatomy.blocks[0].path)
        embed = recording.call(self.anatomy.embed_tokens) if self.anatomy.embed_tokens else None
        if first and embed and embed.began > first.began:
            wrong.append(f"embed_tokens ({self.anatomy.embed_tokens}) ran after the first layer began")
        for role in ("ln_final", "lm_head"):
            path = getattr(self.anatomy, role)
            calls = recording.calls.get(path, []) if path else []
            if calls and calls[-1].began < last_layer_ended:
                wrong.append(f"{role} ({path}) ran before the last layer ended")

    def stream(self, recording: Recording, hidden: tuple[torch.Tensor, ...] | None) -> None:
        """The layers are consecutive, and their outputs are what HuggingFace itself calls hidden states."""
        blocks = self.anatomy.blocks
        pairs = []
        for before, after in zip(blocks, blocks[1:], strict=False):
            given, made = recording.input(after.path), recording.output(before.path)
            if given is not None and made is not None:
                pairs.append((f"between {before.path} and {after.path}", given, made))
        remedy = "RenameConfig(layers_name=...) must name the whole list of the decoder's layers"
        if not self.close("each layer reads what the layer before it wrote", pairs, remedy):
            raise _Failed
        name = "layers_output equals HuggingFace's hidden states"
        if hidden is None:
            self.skip(name, "the model does not return hidden states")
            return
        if len(hidden) not in (len(blocks), len(blocks) + 1):
            self.say(name, False, detail=f"HuggingFace returns {len(hidden)} hidden states for {len(blocks)} layers", remedy=remedy)
            raise _Failed
        own = hidden[len(hidden) - len(blocks) :]
        pairs = []
        for block, state in zip(blocks, own, strict=True):
            made = recording.output(block.path)
            if made is None:
                continue
            if block is blocks[-1]:  # HuggingFace returns the last one normalised, or not, by model
                candidates = [made]
                if self.anatomy.ln_final and (normed := recording.output(self.anatomy.ln_final)) is not None:
                    candidates.append(normed)
                made = min(candidates, key=lambda c: relative_error(c, state))
            pairs.append((block.path, made, state))
        if not self.close(name, pairs, remedy):
            raise _Failed

    def final(self, recording: Recording, logits: torch.Tensor) -> None:
        """The final norm reads the last layer, and projecting the last layer gives the logits."""
        last = recording.output(self.anatomy.blocks[-1].path)
        assert last is not None
        readout = self.model.readout
        tried = []
        for way, project in (("chain", readout.by_chain), ("replay", readout.by_replay)):
            if way == "replay" and not self.feeds_head(recording):
                break
            try:
                made = project(self.module, last)
            except Exception as error:
                tried.append((math.inf, f"{way}: {type(error).__name__}: {str(error)[:100]}"))
                continue
            error_ = relative_error(made, logits) if isinstance(made, torch.Tensor) else math.inf
            if error_ <= self.tolerance:
                readout.way = way  # type: ignore[assignment]
                self.say("project_on_vocab(last layer) equals the logits", True, error_, str(readout))
                return
            tried.append((error_, f"{way}: off by {error_:.1e}"))
        readout.way, readout.reason = None, "; ".join(reason for _, reason in tried)
        remedy = "name the norm and the head with RenameConfig(ln_final_name=, lm_head_name=)"
        self.say("project_on_vocab(last layer) equals the logits", False, min(e for e, _ in tried), readout.reason, remedy)
        raise _Failed

    def feeds_head(self, recording: Recording) -> bool:
        """Whether the parts named as final norm and head carry the stream between the last layer and the logits."""
        logits = recording.result.logits
        head = self.anatomy.lm_head
        made = recording.output(head) if head else None
        if made is None or made.shape[-1] != logits.shape[-1]:
            return False
        if self.anatomy.ln_final is None:
            return True
        normed, given = recording.output(self.anatomy.ln_final), recording.input(head)  # type: ignore[arg-type]
        if normed is None or given is None or normed.shape[-1] == 0:
            return False
        if given.shape == normed.shape:
            scale = (given.double() * normed.double()).sum() / normed.double().square().sum().clamp(min=1e-30)
            return relative_error(given, normed * scale) <= self.tolerance
        return True  # a projection stands between them (OPT 350m), and the replay is compared with the logits anyway

    def roles(self, recording: Recording) -> None:
        """The feed-forward treats every position alone, the mixer does not: told by calling them on edited inputs."""
        mixing: list[str] = []
        alone: list[str] = []
        for block in self.anatomy.blocks:
            for part in dict.fromkeys(p for p in (block.self_attn, block.mixer) if p is not None):
                if self.reaches(recording, part) is False:
                    alone.append(f"{part} of kind {block.kind}")
            if block.mlp is not None and block.kind != "recurrent" and self.reaches(recording, block.mlp):
                mixing.append(str(block.mlp))
            if block.mlp is not None and self.is_norm(recording, block.mlp):
                mixing.append(f"{block.mlp} is a norm, not a feed-forward")
        ok = not mixing and not alone
        detail = "; ".join(
            [*(f"{path} does not move information between positions" for path in alone[:2])]
            + [*(m if "norm" in m else f"{m} moves information between positions" for m in mixing[:2])]
        )
        remedy = "name them with RenameConfig(attn_name=, mlp_name=)"
        if not self.say("the MLP is position-wise and the mixer is not", ok, detail=detail, remedy=remedy):
            raise _Failed

    def reaches(self, recording: Recording, part: Part) -> bool | None:
        """Whether an early position's input changes later positions' output. None if the part cannot be called alone."""
        if part.entry != part.exit:
            return self.span_reaches(recording, part)
        call = recording.call(part.entry)
        assert call is not None
        before = self.recall(part.entry, call, lambda x: x)
        after = self.recall(part.entry, call, lambda x: _nudged(x, position=1))
        if before is None or after is None or before.dim() < 2:
            return None
        if before.dim() == 2:  # OPT flattens batch and positions
            before, after = before[None], after[None]
        change = (after.double() - before.double()).abs().amax(dim=(0, -1))
        scale = before.double().abs().max().clamp(min=1e-30)
        others = torch.cat([change[:1], change[2:]])
        return bool(others.max() > 1e-2 * change.max()) if change.max() > self.tolerance * scale else None

    def span_reaches(self, recording: Recording, part: Part) -> bool | None:
        """The same for a part that is no single module: its ends must both treat positions alone for it to do so."""
        ends = [Part.module(part.entry), Part.module(part.exit)]
        found = [self.reaches(recording, end) for end in ends]
        return None if all(f is None for f in found) else any(found)

    def is_norm(self, recording: Recording, part: Part) -> bool:
        """Whether doubling the input leaves the output as it was."""
        if part.entry != part.exit:
            return False
        call = recording.call(part.entry)
        assert call is not None
        before, after = self.recall(part.entry, call, lambda x: x), self.recall(part.entry, call, lambda x: 2 * x)
        return before is not None and after is not None and relative_error(after, before) < 1e-3

    def recall(self, path: str, call: Call, edit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
        """Call one module again on its recorded arguments, the stream among them edited."""
        stream = stream_in(call.args, call.kwargs)
        if stream is None:
            return None
        args = tuple(edit(a.clone()) if a is stream else a for a in call.args)
        kwargs = {k: edit(v.clone()) if v is stream else v for k, v in call.kwargs.items()}
        try:
            return stream_out(self.module.get_submodule(path)(*args, **kwargs))
        except Exception:
            return None

    def residual(self, recording: Recording) -> None:
        """Input plus contributions is output, in the structure that was found."""
        structures: list[ResidualStructure] = []
        for block in self.anatomy.blocks:
            inside = [p for p in recording.calls if p.startswith(f"{block.path}.")]
            structures.append(solve_residual(block, recording, inside, self.tolerance))
        self.model.residual_structures = tuple(structures)
        unknown = [(i, s) for i, s in enumerate(structures) if s.kind == "unknown"]
        kinds = sorted({s.kind for s in structures if s.kind != "unknown"})
        name = "input + contributions == output"
        if not unknown:
            self.say(name, True, max(s.error or 0.0 for s in structures), ", ".join(kinds))
            return
        index, first = unknown[0]
        detail = f"layers {', '.join(str(i) for i, _ in unknown[:6])}: {first.reason}"
        config = self.model.rename_config
        if config is not None and (config.attn_name or config.mlp_name):
            self.say(name, False, first.error, detail, "check RenameConfig(attn_name=, mlp_name=)")
            raise _Failed
        block = self.anatomy.blocks[index]
        if not self.explained_by_structure(recording, block.path):
            self.say(name, False, first.error, detail, "name the parts with RenameConfig(attn_name=, mlp_name=)")
            raise _Failed
        self.skip(name, f"{detail}; contributions are unavailable there")

    def explained_by_structure(self, recording: Recording, path: str) -> bool:
        """Whether a layer holds more than parts and norms, or carries several streams: then no simple sum is expected."""
        x, y = recording.input(path), recording.output(path)
        if x is None or y is None or x.shape != y.shape or y.dim() > 3:
            return True
        block = self.module.get_submodule(path)
        known = [p.path or p.entry for b in self.anatomy.blocks if b.path == path for p in (b.mixer, b.self_attn, b.mlp) if p]
        for name, child in block.named_children():
            inside = any(k == f"{path}.{name}" or k.startswith(f"{path}.{name}.") for k in known)
            if not inside and "norm" not in type(child).__name__.lower() and next(child.parameters(), None) is not None:
                return True
        return next(block.parameters(recurse=False), None) is not None

    def padding(self) -> None:
        """Rows of a padded batch equal the same prompts alone."""
        name = "a padded batch equals its single rows"
        length, short = PROBE_LENGTH, SHORT_LENGTH
        ids = self.probe_ids(2, length, seed=1)
        mask = torch.ones_like(ids)
        mask[1, : length - short] = 0
        accepts = inspect.signature(self.module.forward).parameters
        if "attention_mask" not in accepts:
            self.skip(name, "the model takes no attention mask")
            return
        batch = {**self.forward_kwargs(ids), "attention_mask": mask}
        if "position_ids" in accepts:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        try:
            together = self.module(**batch).logits
            alone = self.module(**self.forward_kwargs(ids[1:, length - short :])).logits
        except Exception as error:
            self.skip(name, f"the model does not run on one ({type(error).__name__}: {str(error)[:100]})")
            return
        error_ = relative_error(together[1:, length - short :], alone)
        self.model.padding_is_exact = error_ <= max(self.tolerance, 1e-4)
        if self.model.padding_is_exact:
            self.say(name, True, error_, "left padding")
        else:
            self.skip(
                name,
                f"HuggingFace's own forward differs under left padding (by {error_:.1e}); batches of different lengths are refused",
            )

    def accessors(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Through nnterp: an idle trace changes nothing, and every write does what a torch hook's does."""
        from nnterp.certificate._writes import prove_writes

        with self.model.trace(ids):
            traced = self.model.logits.save()
        same = torch.equal(traced, logits)
        error = relative_error(traced, logits)
        self.say("the forward with nnterp is bit-equal to the one without", same, error, "" if same else "it is not")
        prove_writes(self, ids)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def watched(self) -> set[str]:
        """Everything whose calls are of interest: the model's parts, and each layer's modules down to two levels."""
        paths = {p for p in (self.anatomy.embed_tokens, self.anatomy.ln_final, self.anatomy.lm_head) if p is not None}
        for block in self.anatomy.blocks:
            paths.add(block.path)
            for part in (block.mixer, block.self_attn, block.mlp):
                if part is not None:
                    paths |= {part.entry, part.exit}
            for name, child in self.module.get_submodule(block.path).named_modules():
                if name and name.count(".") < 2 and not isinstance(child, nn.ModuleList):
                    paths.add(f"{block.path}.{name}")
        return paths

    def probe_ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random token ids that are no special tokens, the same on every machine."""
        embedding = self.module.get_input_embeddings()  # type: ignore[operator]
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
        return ids.to(embedding.weight.device)

    def forward_kwargs(self, ids: torch.Tensor) -> dict[str, Any]:
        accepts = inspect.signature(self.module.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepts.values())
        kwargs: dict[str, Any] = {"input_ids": ids}
        if "use_cache" in accepts or open_ended:
            kwargs["use_cache"] = False
        return kwargs

    def reference_hidden_states(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
        try:
            states = self.module(**inputs, output_hidden_states=True).hidden_states
        except Exception:
            return None
        return tuple(states) if states else None


def _nudged(x: torch.Tensor, position: int) -> torch.Tensor:
    """The stream with one position replaced by another direction of the same size."""
    where = (slice(None), position) if x.dim() > 2 else (position,)
    x[where] = x[where].roll(1, -1) * 1.5 + 0.1 * x[where].abs().mean()
    return x


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))
