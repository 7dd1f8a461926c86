"""What all claims look at: one recorded forward pass of the plain module; and how a claim states its outcome."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnterp.anatomy import Anatomy, Layer, find_anatomy, sublayers
from nnterp.certificate._certificate import Line
from nnterp.devices import input_device
from nnterp.discovery import (
    Call,
    Recording,
    attention_of,
    model_inputs,
    probe_ids,
    quiet,
    record,
    rounding_of,
    static_experts,
    vision_stacks,
)
from nnterp.errors import AnatomyError, RenamingError
from nnterp.facts import Facts
from nnterp.huggingface import uncached, with_logits
from nnterp.inputs import Row
from nnterp.named_transformer import NamedTransformer
from nnterp.tensors import relative_error

LENGTH, PADS = 10, 4  # longer than the windows of tiny models, so that the windows act
LENGTH_LARGE, PADS_LARGE = 7, 2  # for models where tokens are what the certificate costs
LARGE = 3_000_000  # parameters from which a forward pass costs more than the bookkeeping around it

REMEDY_LAYERS = "RenameConfig(layers_name=...) must name the whole list of the decoder's layers"
REMEDY_PARTS = "name the parts with RenameConfig(attn_name=, mlp_name=)"
REMEDY_ENDS = "name the norm and the head with RenameConfig(ln_final_name=, lm_head_name=)"
REMEDY_ALL = "name the parts with RenameConfig(layers_name=, attn_name=, mlp_name=, ln_final_name=, lm_head_name=)"

Claimed = tuple[Line, Facts]  # what a claim returns: its line, and the facts with what it learnt


@dataclass(frozen=True)
class Evidence:
    """A recorded forward pass of the plain module, and what is needed for more of them.

    The recording is made with plain torch hooks, without nnsight's tracing and without nnterp's places, so that it is
    independent of what it proves.

    Attributes:
        model: The model. Only claims about nnterp itself run it through nnsight.
        module: The plain HuggingFace module.
        ids: The probe, `[1, tokens]`.
        recording: The forward pass on it.
        tolerance: The largest relative error that counts as equal, for the dtype the model computes in.
        large: Whether a forward pass costs more than the bookkeeping around it.
        beside: What a forward pass on these ids is given beside them: the images of the prompt.
    """

    model: NamedTransformer
    module: nn.Module
    ids: torch.Tensor
    recording: Recording
    tolerance: float
    large: bool
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the probe."""
        return self.ids.shape[1]

    def named(self, *fields: str) -> bool:
        """Whether the user gave one of these names, and all of them together lead to other parts than no names."""
        config = self.model.rename_config
        if config is None or not any(getattr(config, name) for name in fields):
            return False
        try:
            return find_anatomy(self.module, config) != find_anatomy(self.module)
        except AnatomyError:  # without the user's names a part is not found
            return True

    @property
    def pads(self) -> int:
        """How much longer than the probe a padded row is made."""
        return PADS_LARGE if self.large else PADS

    @property
    def on_meta(self) -> bool:
        """Whether the tensors of the recording have no numbers."""
        return self.recording.result.logits.device.type == "meta"

    def probe_ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random token ids that are no special tokens, `[rows, length]`."""
        return ordinary_ids(self.model, rows, length, seed)

    def forward(self, ids: torch.Tensor) -> Any:
        """What the plain module returns, run without a cache."""
        return with_logits(self.module(**self.inputs(ids), **uncached(self.module)))

    def inputs(self, ids: torch.Tensor) -> dict[str, Any]:
        """What the model is given for these tokens: them, and beside them what an encoder reads, or images."""
        return {**model_inputs(self.module, ids, self.model.tokenizer.all_special_ids), **self.beside}

    # -- calls of the anatomy's modules ------------------------------------------------------------------------------

    def ran(self, anatomy: Anatomy) -> list[Layer]:
        """Layers that ran on the text probe. Cross-attention layers of a multimodal model run only with an image."""
        return [b for b in anatomy.blocks if self.recording.calls.get(b.path) or b.kind != "cross_attention"]

    def idle(self, anatomy: Anatomy) -> list[int]:
        """Indices of the layers that did not run."""
        ran = {layer.index for layer in self.ran(anatomy)}
        return [layer.index for layer in anatomy.blocks if layer.index not in ran]

    def of(self, layer: Layer) -> Recording:
        """What was recorded during one layer's own run, if its module runs several times; else everything."""
        return self.recording.of(layer)

    def call_in_layer(self, anatomy: Anatomy, path: str, layer: int) -> Call | None:
        """The call of a module while one layer ran; a module that several layers share runs in each of them."""
        block = anatomy.blocks[layer]
        outer = self.of(block).call(block.path)
        if outer is None or path == block.path:
            return outer
        return self.recording.within(path, outer)

    def norms(self) -> Iterator[str]:
        """Paths of the norms that were recorded."""
        for path in self.recording.calls:
            if "norm" in type(self.module.get_submodule(path)).__name__.lower():
                yield path

    def last_call(self, path: str | None) -> Call | None:
        """The last call of a module; None if there is no such module or it did not run."""
        return None if path is None else self.recording.last_call(path)

    # -- the stream's layout -----------------------------------------------------------------------------------------

    def is_stored(self, facts: Facts, tensor: torch.Tensor) -> bool:
        """Whether a tensor recorded for the probe is stored in the stream's own layout."""
        return facts.readout.layout.is_stored(tensor.shape, 1, self.length)

    def own_positions(self, facts: Facts, stream: torch.Tensor) -> torch.Tensor:
        """A stream as it is shown, without the positions that the model puts in front of the tokens."""
        layout = facts.readout.layout
        if layout.extra:
            return stream[:, layout.extra :]
        return layout.shown(stream) if self.is_stored(facts, stream) else stream

    def main_stream(self, facts: Facts, stream: torch.Tensor) -> torch.Tensor:
        """Of several streams stored one after the other, the first, which is HuggingFace's."""
        stream = self.own_positions(facts, stream)
        return stream[:, :, 0] if facts.readout.layout.streams > 1 else stream

    def batch_first(self, facts: Facts, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor recorded for the probe with the batch in front."""
        turned = facts.readout.layout.sequence_first and self.is_stored(facts, tensor)
        return tensor.transpose(0, 1) if turned else tensor


def gather(model: NamedTransformer, large: bool) -> Evidence:
    """Record one forward pass of a model with weights, with HuggingFace's own hidden states if it returns them."""
    ids = ordinary_ids(model, 1, LENGTH_LARGE if large else LENGTH)
    inputs = {**model_inputs(model._module, ids, model.tokenizer.all_special_ids), **uncached(model._module)}
    modules = sorted(_watched(model._module, model.anatomy))
    try:
        recording = record(model._module, lambda: model._module(**inputs, output_hidden_states=True), modules=modules)
    except Exception:
        recording = _plainly(model, inputs, modules, ids.shape[1])
    return _evidence(model, ids, recording, large)


def _plainly(model: NamedTransformer, inputs: Mapping[str, Any], modules: list[str], length: int) -> Recording:
    """Record one forward pass with nothing asked of the model but its logits.

    Raises:
        RenamingError: HuggingFace's own code fails on it.
    """
    try:
        return record(model._module, lambda: model._module(**inputs), modules=modules)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RenamingError(
            f"{model.model_class} cannot be proven, because its own forward pass fails on {length} tokens of text:\n"
            f"{type(error).__name__}: {error}\n"
            "The model as HuggingFace built it was run, without nnterp: another version of transformers may run it.\n"
            "check_renaming=False loads it all the same; then nothing about its names is proven."
        ) from error


def gather_images(model: NamedTransformer, row: Row, beside: Mapping[str, Any] | None = None) -> Evidence:
    """Record one forward pass on a prompt with an image; `beside` is given in place of its images."""
    module = model._module
    device = input_device(module)
    ids = torch.tensor([row.ids], device=device)
    given = {} if row.images is None else row.images.tensors
    beside = {name: tensor.to(device) for name, tensor in given.items()} if beside is None else beside
    inputs = {"input_ids": ids, **beside, **uncached(module)}
    modules = sorted(_watched(module, model.anatomy) | set(_of_images(module, model.anatomy)))
    try:
        recording = record(module, lambda: module(**inputs, output_hidden_states=True), modules=modules)
    except Exception:
        recording = record(module, lambda: module(**inputs), modules=modules)
    return dataclasses.replace(_evidence(model, ids, recording, is_large(module)), beside=beside)


def gather_shapes(model: NamedTransformer, large: bool) -> Evidence:
    """Record one forward pass on fake tensors, which have shapes and no numbers."""
    module = model._module
    with quiet(module), static_experts(module), FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros((1, LENGTH_LARGE if large else LENGTH), dtype=torch.long, device="meta")
        inputs = {**model_inputs(module, ids), **uncached(module)}
        recording = record(module, lambda: module(**inputs), modules=sorted(_watched(module, model.anatomy)))
    return _evidence(model, ids, recording, large)


def _evidence(model: NamedTransformer, ids: torch.Tensor, recording: Recording, large: bool) -> Evidence:
    return Evidence(model, model._module, ids, recording, max(1e-5, 4 * rounding_of(model._module)), large)


def is_large(module: nn.Module) -> bool:
    """Whether a forward pass of the model costs more than the bookkeeping around it."""
    return sum(parameter.numel() for parameter in module.parameters()) > LARGE


def ordinary_ids(model: NamedTransformer, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, `[rows, length]`, that neither the config nor the tokenizer calls special."""
    special = [int(i) for i in getattr(model.tokenizer, "all_special_ids", ()) if i is not None]
    return probe_ids(model._module, model.anatomy.sizes.vocab_size, rows, length, seed, special)


_IN_A_LIST = re.compile(r"\.\d+(\.|$)")  # entries of lists inside a layer: experts, of which there may be hundreds
_TOWER = re.compile(r"(^|\.)(vision|visual|image|audio|speech)")


def _watched(module: nn.Module, anatomy: Anatomy) -> set[str]:
    """The model's parts, each layer's modules down to three levels, and the few modules outside of the layers."""
    paths = {p for p in (anatomy.embed_tokens, anatomy.ln_final, anatomy.lm_head) if p is not None}
    for block in (*anatomy.blocks, *(anatomy.encoder.blocks if anatomy.encoder is not None else ())):
        paths.add(block.path)
        for part in (block.mixer, block.self_attn, block.mlp, block.cross_attn):
            if part is not None:
                paths |= {part.entry, part.exit}
        for name, child in module.get_submodule(block.path).named_modules():
            if name and name.count(".") < 3 and not isinstance(child, nn.ModuleList) and not _IN_A_LIST.search(name):
                paths.add(f"{block.path}.{name}")
        for name, child in sublayers(module.get_submodule(block.path)):
            paths |= {f"{block.path}.{name}.{inner}" if inner else f"{block.path}.{name}" for inner in _near(child)}
    return paths | set(_outside(module, anatomy))


def _near(module: nn.Module) -> Iterator[str]:
    """Paths of a module itself, "", and of the modules down to two levels inside, entries of lists left out."""
    for path, inner in module.named_modules():
        if path.count(".") < 2 and not isinstance(inner, nn.ModuleList) and not _IN_A_LIST.search(path):
            yield path


def _of_images(module: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    """The layers of towers with their attentions, and every module that stands outside of all layers."""
    stacks = vision_stacks(module, anatomy)
    for path in itertools.chain.from_iterable(stacks):
        yield path
        yield f"{path}.{attention_of(module.get_submodule(path))}"
    layers = tuple(f"{path}." for path in (*(b.path for b in anatomy.blocks), *itertools.chain(*stacks)))
    yield from (path for path, _ in module.named_modules() if path and not f"{path}.".startswith(layers))


def _outside(module: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    """Modules outside of the layers that hold no others; beside several stacks, those that hold others too."""
    layers = tuple(f"{block.path}." for block in anatomy.blocks)
    owner = anatomy.layers.rpartition(".")[0]
    for path, child in module.named_modules():
        leaf = not any(child.children()) or (bool(anatomy.other_stacks) and path.startswith(f"{owner}."))
        if path and leaf and not path.startswith(layers) and not _TOWER.search(path) and path.count(".") < 4:
            yield path


# -- outcomes ----------------------------------------------------------------------------------------------------------


def outcome(
    name: str, ok: bool, error: float | None = None, tolerance: float | None = None, detail: str = "", remedy: str = ""
) -> Line:
    """A line that passed or failed; a failed one says how to mend it."""
    text = detail if ok else "; ".join(part for part in (detail, remedy) if part)
    return Line(name, "passed" if ok else "failed", error, None if error is None else tolerance, text)


def skipped(name: str, reason: str) -> Line:
    """A line that does not apply, or that could not be tried."""
    return Line(name, "skipped", detail=reason)


Pair = tuple[str, torch.Tensor, torch.Tensor]  # where, what there is, what it should be


def compared(name: str, pairs: Iterable[Pair], tolerance: float, remedy: str, detail: str = "") -> Line:
    """One line for several comparisons: the worst of them counts."""
    worst, where = 0.0, ""
    for label, actual, expected in pairs:
        error = relative_error(actual, expected)
        if not error <= worst:
            worst, where = error, label
    ok = worst <= tolerance
    return outcome(name, ok, worst, tolerance, detail if ok else where, remedy)


def shape_of(tensor: torch.Tensor | None) -> str:
    """A tensor's shape in words."""
    return "nothing" if tensor is None else str(list(tensor.shape))
