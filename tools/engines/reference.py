"""The reference: plain HuggingFace models, watched with plain torch hooks. It shares no code with any engine.

    python reference.py JOB.json

Layers are found by the hidden states that a model returns, attention by the softmax that runs in it; a head is set to
zero in two ways that have to agree. Where a part cannot be told this way, nothing is compared.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cells import HEAD, prompts, vector
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

CLOSE = 1e-5
NOT_ATTENTION = re.compile(r"norm|rotary|cross|linear|mamba|conv|delta|encoder_attn|indexer|bias|drop", re.IGNORECASE)
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|experts", re.IGNORECASE)
NOT_FEED_FORWARD = re.compile(r"norm|drop|attn|attention", re.IGNORECASE)
NORM = re.compile(r"norm|drop|scale", re.IGNORECASE)


def load(folder: Path) -> nn.Module:
    """The model in float32, with eager attention where it has it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except ValueError:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def tensor_of(output: Any) -> torch.Tensor | None:
    """The first tensor of floats in what a module returned."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = list(output.values())
    return tensor_of(output[0]) if isinstance(output, (tuple, list)) and output else None


def same(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float = CLOSE) -> bool:
    """Whether two tensors hold the same numbers, axes of length one aside."""
    if a is None or b is None or a.squeeze().shape != b.squeeze().shape:
        return False
    a, b = a.squeeze(), b.squeeze()
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-12))


@dataclass
class Call:
    """One call of a module."""

    name: str
    given: torch.Tensor | None
    returned: torch.Tensor | None


@dataclass
class Softmax:
    """One softmax over keys, and the modules in which it ran."""

    inside: tuple[str, ...]
    value: torch.Tensor


@dataclass
class Watched:
    """One forward pass."""

    output: Any
    calls: list[Call] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)

    @property
    def logits(self) -> torch.Tensor:
        return self.output.logits

    def returned(self, name: str) -> torch.Tensor | None:
        """What a module returned, if it was called once."""
        values = [call.returned for call in self.calls if call.name == name]
        return values[0] if len(values) == 1 else None


class Softmaxes(TorchFunctionMode):
    """Hands every softmax of four axes to a function, which may replace it."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        value = func(*args, **(kwargs or {}))
        if "softmax" in getattr(func, "__name__", "") and isinstance(value, torch.Tensor) and value.ndim == 4:
            return self.seen(value)
        return value


@contextmanager
def hooks(handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(model: nn.Module, ids: torch.Tensor, edit=None, **kwargs: Any) -> Watched:
    """Run the model and keep every call and every softmax. `edit(modules, softmax)` replaces a softmax."""
    watched, stack = Watched(None), []

    def enter(name):
        def hook(module, args, kwargs):
            given = kwargs.get("hidden_states")
            given = given if isinstance(given, torch.Tensor) else tensor_of([a for a in args if a is not None])
            stack.append((name, given.clone() if given is not None else None))

        return hook

    def leave(name):
        def hook(module, args, output):
            _, given = stack.pop()
            returned = tensor_of(output)
            watched.calls.append(Call(name, given, returned.clone() if returned is not None else None))

        return hook

    def seen(value):
        inside = tuple(name for name, _ in stack)
        watched.softmaxes.append(Softmax(inside, value.clone()))
        return value if edit is None else edit(inside, value)

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [m.register_forward_pre_hook(enter(n), with_kwargs=True) for n, m in named]
    handles += [m.register_forward_hook(leave(n)) for n, m in named]
    with torch.no_grad(), hooks(handles), Softmaxes(seen):
        watched.output = model(input_ids=ids, **kwargs)
    return watched


def find_layers(model: nn.Module, watched: Watched) -> list[str]:
    """The names of the layers: the list of modules whose outputs are the hidden states that the model returns."""
    states = [s for s in getattr(watched.output, "hidden_states", None) or () if isinstance(s, torch.Tensor)]
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found, counted = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        names = [f"{name}.{i}" for i in range(len(module))]
        outputs = [watched.returned(n) for n in names]
        if any(o is None for o in outputs):
            continue
        if len(states) > len(names) and all(any(same(o, s) for s in states) for o in outputs[:-1]):
            found.append(names)
        elif len(names) == depth:
            counted.append(names)
    if found:
        return max(found, key=len)
    return counted[0] if len(counted) == 1 else []


def topmost(watched: Watched, layer: str, fits) -> list[str]:
    """Modules of a layer that fit, without those inside another that fits."""
    names = dict.fromkeys(call.name for call in watched.calls if call.name.startswith(layer + "."))
    fitting = sorted((n for n in names if fits(n)), key=len)
    return [n for n in fitting if not any(n != m and n.startswith(m + ".") for m in fitting)]


def last_projection(model: nn.Module, watched: Watched, name: str, width: int) -> Call | None:
    """The last linear map to the width of the stream that ran inside a part."""
    for call in reversed(watched.calls):
        linear = type(model.get_submodule(call.name)).__name__.endswith(("Linear", "Conv1D"))
        if call.name.startswith(name + ".") and linear and call.returned.shape[-1] == width:
            return call
    return None


def accepted(model: nn.Module, watched: Watched, layer: str, name: str) -> list[torch.Tensor]:
    """What counts as the output of a part: what its module or its last projection returns, and what norms make of it.

    Engines define it in either way: what the module returns, or what is added to the stream. In a model that norms
    after it adds (BERT), the module itself adds and norms, and the projection is what is added.
    """
    first = watched.returned(name)
    if first is None:
        return []
    projection = last_projection(model, watched, name, first.shape[-1])
    values = [first] if projection is None else [first, projection.returned]
    for call in watched.calls:
        short = call.name.removeprefix(layer + ".")
        beside = call.name.startswith(layer + ".") and not call.name.startswith(name + ".")
        if not beside or not NORM.search(short) or call.returned is None:
            continue
        if any(same(call.given, value) for value in values):
            values.append(call.returned)
    factor = getattr(model.get_submodule(layer), "residual_multiplier", None)
    return values + ([values[-1] * factor] if isinstance(factor, float) else [])


def layer_of(layers: list[str], inside: tuple[str, ...]) -> int | None:
    """The layer among the modules in which something ran."""
    return next((i for i, name in enumerate(layers) if name in inside), None)


class Examined:
    """All that is known of one model type."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.facts: dict[str, Any] = {"cells": {}, "huggingface": []}
        self.model = load(folder)
        text = self.model.config.get_text_config(decoder=True)
        self.rows = prompts(text.vocab_size)
        self.facts |= {"rows": self.rows, "padding": 0, "class": type(self.model).__name__}
        self.ids = [torch.tensor([row]) for row in self.rows]
        self.plain = watch(self.model, self.ids[0])
        again = watch(self.model, self.ids[0])
        if not same(again.logits, self.plain.logits) or not torch.isfinite(self.plain.logits).all():
            raise ValueError("two runs of the model differ, or its logits are not finite")
        self.states = self.quietly(output_hidden_states=True)
        self.layers = find_layers(self.model, self.states or self.plain)
        if not self.layers:
            raise ValueError("its layers cannot be told by the hidden states that it returns")
        self.attending: dict[int, torch.Tensor] = {}
        self.streams()
        self.patterns()
        self.parts()
        self.write()
        self.head()
        self.default_attention(folder)

    def quietly(self, **kwargs: Any) -> Watched | None:
        """A run with something more to return, if the model takes it."""
        try:
            return watch(self.model, self.ids[0], **kwargs)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return None

    def put(self, cell: str, layer: int | str, values: list[torch.Tensor]) -> None:
        for i, value in enumerate(values):
            self.tensors[f"{cell}.{layer}@{i}"] = value.detach().clone().contiguous()
        self.facts["cells"].setdefault(cell, []).append(layer)

    def streams(self) -> None:
        short = watch(self.model, self.ids[1])
        self.facts["last"] = len(self.layers) - 1
        for i, name in enumerate(self.layers):
            alone = [self.plain.returned(name), short.returned(name)]
            self.put("stream", i, alone[:1])
            self.put("padded", i, [torch.cat([v.squeeze() for v in alone], dim=-2)])
        self.put("padded", "logits", [torch.cat([self.plain.logits[0], short.logits[0]])])
        self.put("readout", "logits", [self.plain.logits])
        last = getattr(getattr(self.states, "output", None), "hidden_states", None)
        if last and not same(last[-1], self.plain.returned(self.layers[-1])):
            self.facts["huggingface"].append("hidden_states[-1] is not the stream after the last layer")

    def patterns(self) -> None:
        run = self.quietly(output_attentions=True)
        stated = list(getattr(getattr(run, "output", None), "attentions", None) or ())
        if run is not None and not same(run.logits, self.plain.logits, 1e-4):
            self.facts["huggingface"].append("output_attentions changes the logits")
            stated = []
        per_layer: dict[int, list[torch.Tensor]] = {}
        for softmax in self.plain.softmaxes:
            i, length = layer_of(self.layers, softmax.inside), len(self.rows[0])
            if i is not None and softmax.value.shape[2] == length and softmax.value.shape[3] in (length, length + 1):
                per_layer.setdefault(i, []).append(softmax.value[..., :length])
        of_layer: dict[int, torch.Tensor] = {}
        if len(stated) == len(self.layers):
            of_layer = {i: a for i, a in enumerate(stated) if isinstance(a, torch.Tensor) and a.ndim == 4}
        elif len(stated) == len(per_layer):
            of_layer = dict(zip(sorted(per_layer), stated, strict=True))
        differ = []
        for i in sorted({*per_layer, *of_layer}):
            softmaxes = per_layer.get(i, [])
            value = softmaxes[0] if len(softmaxes) == 1 else of_layer.get(i)
            if i in of_layer and len(softmaxes) == 1 and not same(of_layer[i], value):
                differ.append(i)
                continue
            if value is not None and value.shape[-1] == value.shape[-2] == len(self.rows[0]):
                self.put("pattern", i, [value])
            if len(softmaxes) == 1:
                self.attending[i] = softmaxes[0]
        if differ:
            self.facts["huggingface"].append(f"attentions of layers {differ} are not the softmax that ran in them")

    def default_attention(self, folder: Path) -> None:
        """Whether asking for attentions changes the logits of a model that is loaded with its default attention."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(input_ids=self.ids[0]).logits
            try:
                asked = model(input_ids=self.ids[0], output_attentions=True).logits
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
                return
        if not same(asked, logits, 1e-4):
            self.facts["huggingface"].append("output_attentions changes the logits, with the default attention")
        elif not same(logits, self.plain.logits, 1e-4):
            self.facts["huggingface"].append("eager attention gives other logits than the default attention")

    def parts(self) -> None:
        for i, layer in enumerate(self.layers):
            running = {n for s in self.plain.softmaxes for n in s.inside}
            of_class = {n: type(m).__name__ for n, m in self.model.named_modules()}

            def attends(n, running=running, of_class=of_class, layer=layer):
                short = n.removeprefix(layer + ".")
                text = short + ("" if of_class[n].endswith(("Layer", "Block")) else of_class[n])
                return n in running and bool(ATTENTION.search(text)) and not NOT_ATTENTION.search(short)

            def feeds(n, of_class=of_class, layer=layer):
                short = n.removeprefix(layer + ".")
                text = short + " " + of_class[n].replace("DecoderLayer", "")
                return bool(FEED_FORWARD.search(text)) and not NOT_FEED_FORWARD.search(text)

            for cell, fits in (("attention", attends), ("mlp", feeds)):
                found = topmost(self.plain, layer, fits)
                if len(found) == 1:
                    if values := accepted(self.model, self.plain, layer, found[0]):
                        self.put(cell, i, values)
                    if cell == "attention":
                        self.facts.setdefault("attention modules", {})[i] = found[0]

    def write(self) -> None:
        stream = self.plain.returned(self.layers[1])
        added = vector(stream.shape[-1], float(stream.std()))
        self.tensors["vector"] = added

        def add(module, args, output):
            if isinstance(output, (tuple, list)):
                return type(output)((output[0] + added, *output[1:]))
            return output + added if isinstance(output, torch.Tensor) else None

        with torch.no_grad(), hooks([self.model.get_submodule(self.layers[1]).register_forward_hook(add)]):
            changed = self.model(input_ids=self.ids[0]).logits
        if not same(changed, self.plain.logits, 1e-3):
            self.put("write", 1, [changed])

    def head(self) -> None:
        for text, attention in self.facts.get("attention modules", {}).items():
            i = int(text)
            if i not in self.attending or self.attending[i].shape[1] <= HEAD:
                continue

            def silence(inside, value, name=self.layers[i]):
                if name in inside:
                    value = value.clone()
                    value[:, HEAD] = 0
                return value

            by_pattern = watch(self.model, self.ids[0], edit=silence).logits
            by_projection = self.without_head(attention, self.attending[i].shape[1])
            shows = not same(by_pattern, self.plain.logits, 1e-3)
            if shows and by_projection is not None and same(by_pattern, by_projection, 1e-4):
                self.put("head", i, [by_projection])
                return

    def without_head(self, attention: str, heads: int) -> torch.Tensor | None:
        """Logits with one head's columns set to zero in the input of the attention's last projection."""
        width = self.plain.returned(self.layers[0]).shape[-1]
        call = last_projection(self.model, self.plain, attention, width)
        if call is None or call.given.shape[-1] % heads:
            return None
        size = call.given.shape[-1] // heads

        def silence(module, args):
            z = args[0].clone()
            z[..., HEAD * size : (HEAD + 1) * size] = 0
            return (z, *args[1:])

        with torch.no_grad(), hooks([self.model.get_submodule(call.name).register_forward_pre_hook(silence)]):
            return self.model(input_ids=self.ids[0]).logits


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for model_type in job["types"]:
        out = Path(job["out"])
        try:
            found = Examined(Path(job["checkpoints"]) / model_type)
            save_file(found.tensors, out / f"{model_type}.safetensors")
            facts = found.facts
        except Exception as error:
            facts = {"none": f"{type(error).__name__}: {error}"[:300], "cells": {}, "huggingface": []}
        (out / f"{model_type}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
