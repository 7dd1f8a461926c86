"""What a proof rests on: two models for which all of it is equal are proven alike."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from nnsight.intervention.source import Controller
from torch import nn

from nnterp.devices import input_device
from nnterp.eager import attention_configs
from nnterp.huggingface import dtype_of
from nnterp.identity import Checkpoint, code_digest, digest, digest_of_weights, function_digest
from nnterp.versions import version_of

Key = dict[str, str]  # what it rests on, in words → a version, a name or a digest
VERSIONS = ("nnterp-core", "nnsight", "transformers", "torch", "accelerate")
_ELSEWHERE = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})  # of a config: said in other words
_PLAIN = (bool, int, float, str, torch.dtype)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


@dataclass(frozen=True)
class What:
    """One kind of proof.

    Attributes:
        name: In the names of files.
        words: What is proven, for the log: "the names of its parts".
        classes: The records and dataclasses that the proof is made of.
        package: The package whose code proves it, beside nnterp-core.
        of_names: Whether it rests on names that are proven, as all do but the certificate.
    """

    name: str
    words: str
    classes: tuple[type, ...] = ()
    package: str = "nnterp"
    of_names: bool = True


class Keyed(Protocol):
    """What a key is made of."""

    repo_id: str
    revision: str | None
    keep_proofs: bool
    loaded_files: Checkpoint
    dispatched: bool
    rename_config: Any
    tokenizer: Any
    standing: tuple
    kwargs: dict[str, Any]
    _module: nn.Module
    _edits: Any

    @property
    def facts(self) -> Any:
        """All that is known of it."""
        ...

    @property
    def load_report(self) -> dict[str, Any] | None:
        """What transformers said of the checkpoint."""
        ...


def key_of(model: Keyed, what: What) -> Key | str:
    """Return what a proof of a model rests on, or why none is kept for it.

    The certificate is looked up before anyone can have changed the weights, right after they were loaded: the files
    that they were loaded from count. Later each weight counts with its numbers, which are read, unless the kernel
    knows that its memory still is what the file holds.

    Args:
        model: The model.
        what: What is proven.
    """
    if reason := why_none(model):
        return reason
    if what.of_names and model.facts.proof != "weights":
        return "the names of its parts are not proven"
    if model.dispatched and not what.of_names and not model.loaded_files.digest:
        return "the files of its weights cannot be told"
    module = model._module
    return {
        "name": str(model.repo_id),
        "revision": str(model.revision),
        "commit": str(getattr(module.config, "_commit_hash", None)),
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "weights": _weights(model, what),
        "checkpoint": digest((model.load_report, model.kwargs)),
        "dtype": str(dtype_of(module)),
        "device": _device(model),
        "tokenizer": _tokenizer(model.tokenizer),
        "parts": _hashed(repr(model.facts.anatomy)),
        **_of_the_code(model, what.package),
    }


def key_of_code(model: Keyed, what: What) -> Key | str:
    """Return what a proof of a model's twin rests on: its code and its config. Or why none is kept."""
    if reason := _why_off(model):
        return reason
    return {"name": str(model.repo_id), "weights": "of a twin", **_of_the_code(model, what.package)}


def why_none(model: Keyed) -> str:
    """Return why no proof is kept for a model; "" if one is."""
    if reason := _why_off(model):
        return reason
    module = model._module
    if model.standing or model._edits:
        return "the model is steered or edited"
    if model.dispatched and model.load_report is None:
        return "the model was given as a module, so that its code may be its own"
    if getattr(module, "hf_quantizer", None) is not None or hasattr(module.config, "quantization_config"):
        return "the model is quantised"
    if getattr(module, "_hf_peft_config_loaded", False) or hasattr(module, "peft_config"):
        return "the model has an adapter"
    if any(getattr(torch.nn.modules.module, name) for name in _GLOBAL_HOOKS):
        return "torch has hooks on all modules"
    for path, inner in module.named_modules():
        held = inner.__dict__
        hooks = [hook for name in _HOOKS if held.get(name) for hook in held[name].values()]
        if not all(map(_is_transformers, hooks)):
            return f"{path or 'the model'} has hooks"
        if "forward" in held and not isinstance(held["forward"], Controller) and "_hf_hook" not in held:
            return f"the forward of {path or 'the model'} was replaced"
        if held.get("_compiled_call_impl") is not None:
            return f"{path or 'the model'} was compiled"
    for name, tensor in _tensors(module):
        if type(tensor) not in (nn.Parameter, torch.Tensor) and tensor.device.type != "meta":
            return f"{name} is a {type(tensor).__name__}"
        if model.dispatched and (tensor.device.type == "meta" or tensor.layout != torch.strided):
            return f"{name} is not in memory"
    return ""


def _is_transformers(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers itself captures outputs."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _why_off(model: Keyed) -> str:
    if not getattr(model, "keep_proofs", False):
        return "the model was loaded with keep_proofs=False"
    return "" if model.repo_id else "the model was given as a module, so that its code may be its own"


def _of_the_code(model: Keyed, package: str) -> Key:
    """The parts of a key that do not depend on weights."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # seconds to import, loaded with any model

    module = model._module
    attention = sorted({str(config._attn_implementation_internal) for config in attention_configs(module)})
    functions = [ALL_ATTENTION_FUNCTIONS[name] for name in attention if name in ALL_ATTENTION_FUNCTIONS]
    return {
        "config": digest(_plain(vars(module.config))),
        "attention": ", ".join(attention),
        "modules": _hashed("\n".join(_attributes(module))),
        "model's code": digest((code_digest(module), *map(function_digest, functions))),
        "RenameConfig": digest(model.rename_config),
        "settings of torch": _settings(),
        "Python": platform.python_version(),
        **{name: version_of(name) for name in VERSIONS},
        "nnterp's code": digest(tuple(_source_digest(own) for own in sorted({"nnterp", package}))),
        "nnsight's code": _source_digest("nnsight"),
    }


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _weights(model: Keyed, what: What) -> str:
    if not model.dispatched:
        return "absent"
    if not what.of_names:
        return f"loaded from {model.loaded_files.digest}"
    return digest_of_weights(_tensors(model._module), model.loaded_files)


def _device(model: Keyed) -> str:
    """Where a model computes: the kind of device, and where its parts are if they are on several."""
    devices = {tensor.device for _, tensor in _tensors(model._module)} if model.dispatched else {torch.device("meta")}
    kinds = {own.type for own in devices}
    named = sorted({torch.cuda.get_device_name(own) for own in devices} if kinds == {"cuda"} else kinds)
    if kinds == {"cpu"}:
        named.append(torch.backends.cpu.get_cpu_capability())
    if len(devices) < 2:
        return ", ".join(named)
    placed = [(name, str(tensor.device)) for name, tensor in _tensors(model._module)]
    return f"{', '.join(named)} {digest((placed, str(input_device(model._module))))}"


def _tokenizer(tokenizer: Any) -> str:
    """What proofs ask a tokenizer: its special tokens, and how it pads."""
    special = sorted(int(i) for i in getattr(tokenizer, "all_special_ids", ()) if i is not None)
    pads = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "padding_side", None)
    return digest((type(tokenizer).__name__, special, pads))


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, those of the configs inside it included."""
    return {
        name: _plain(vars(value)) if hasattr(value, "to_diff_dict") else value
        for name, value in fields.items()
        if name not in _ELSEWHERE
    }


def _attributes(root: nn.Module) -> Iterator[str]:
    """Path, class and plain attributes of every module."""
    for path, module in root.named_modules(remove_duplicate=False):
        own = [
            f"{name}={value!r}"
            for name, value in module.__dict__.items()
            if name[0] != "_" and (value is None or isinstance(value, _PLAIN)) and name != "name_or_path"
        ]
        yield f"{path} {type(module).__qualname__} {sorted(own)}"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings() -> str:
    """Settings of torch that change the last digits of what a model computes, or how it computes attention."""
    backends = torch.backends
    return digest(
        (
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.are_deterministic_algorithms_enabled(),
            backends.cudnn.allow_tf32,
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.mkldnn.enabled,
        )
    )


@functools.cache
def _source_digest(package: str) -> str:
    """A digest of the source files of a package, read once: its version does not tell where it is being edited."""
    found = hashlib.sha256()
    for folder in dict.fromkeys(_folders(package)):
        for file in sorted(folder.rglob("*.py")):
            found.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _folders(package: str) -> Iterator[Path]:
    if package == "nnterp":  # core's own folder; its `__path__` leads to the other packages too
        yield Path(__file__).parents[1]
    else:
        yield from map(Path, import_module(package).__path__)
