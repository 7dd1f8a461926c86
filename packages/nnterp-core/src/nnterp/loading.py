"""What has to be settled before a model can be loaded: its tokenizer, its attention implementation, its placement."""

from __future__ import annotations

import ast
import contextlib
import copy
import linecache
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from nnterp._ids_alone import IdsAlone
from nnterp.anatomy import RenameConfig
from nnterp.eager import make_eager
from nnterp.huggingface import is_huggingface
from nnterp.wording import nearest

_PLACED_BY = ("auto", "balanced", "balanced_low_0", "sequential")  # ways in which accelerate makes a device map
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}


def checked_model(model: Any, rename_config: Any = None) -> str | nn.Module:
    """The first argument of `StandardizedTransformer`, before anything is loaded; a path as text.

    Raises:
        TypeError: It is neither a text, a path nor a module; or `rename_config` is no `RenameConfig`.
        ValueError: It is an empty text.
        FileNotFoundError: It is the path of a folder that is not there.
    """
    if rename_config is not None and not isinstance(rename_config, RenameConfig):
        how = "RenameConfig(**it)" if isinstance(rename_config, dict) else "RenameConfig(mlp_name='ffn')"
        raise TypeError(f"rename_config is a RenameConfig, not {rename_config!r:.80}: pass {how}.")
    if isinstance(model, nn.Module):
        return model
    if isinstance(inner := getattr(model, "_module", None), nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, which wraps a {type(inner).__name__}; give the module itself: "
            "StandardizedTransformer(model._module, tokenizer=model.tokenizer)."
        )
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model is a hub id, a local folder or a HuggingFace module, not {model!r:.80}.")
    require_folder(model)
    return str(model)


def require_folder(model: str | Path) -> None:
    """Raise if a model's name is the path of a folder that is not there; a hub id may be "name" or "owner/name".

    Raises:
        ValueError: It is empty.
        FileNotFoundError: It is such a path.
    """
    name = str(model)
    if not name.strip() or (isinstance(model, Path) and name == "."):
        raise ValueError("model is empty; give a hub id, a local folder or a HuggingFace module.")
    is_path = isinstance(model, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and not os.path.exists(name):
        raise FileNotFoundError(f"There is no folder {name}, and it is no hub id (owner/name) either.")


def check_options(options: Mapping[str, Any], remote: bool) -> None:
    """Look at the arguments of `from_pretrained` before anything is loaded; of a remote model, not at its devices.

    Raises:
        TypeError: `dtype` is neither a dtype nor its name.
        ValueError: There is no such dtype, or no such device here.
    """
    _check_dtype(options)
    if not remote:
        _check_placement(options)


def _check_placement(options: Mapping[str, Any]) -> None:
    """Raise for a device that is not there, before transformers wraps that error into others.

    Args:
        options: Arguments of `from_pretrained`, of which `device_map` and `device` are looked at.

    Raises:
        ValueError: There is no such device here.
    """
    for name in ("device_map", "device"):
        given = options.get(name)
        for one in given.values() if isinstance(given, Mapping) else [given]:
            numbered = name == "device_map" and isinstance(one, int)
            named = isinstance(one, str) and one not in (*_PLACED_BY, "disk")
            if numbered or named or isinstance(one, torch.device):
                reason = _absent(one)
                if reason:
                    raise ValueError(
                        f"{name}={given!r:.80}: there is no such device here ({reason}). Leave it out to use what is "
                        f"there, or give {name}='cpu'; device_map also takes {', '.join(map(repr, _PLACED_BY))}."
                    )


def _absent(device: str | int | torch.device) -> str:
    """Why a device is not there; "" if it is, or if only using it would tell. Starts no driver."""
    if isinstance(device, int):
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        return "" if device < count else f"PyTorch sees {count} GPUs"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if device.type == "cuda":
        count = torch.cuda.device_count()
        missing = "PyTorch is built without CUDA" if torch.version.cuda is torch.version.hip is None else ""
        return "" if (device.index or 0) < count else missing or f"PyTorch sees {count} GPUs"
    absent = device.type == "mps" and not torch.backends.mps.is_available()
    return "PyTorch cannot use MPS" if absent else ""


def _check_dtype(options: Mapping[str, Any]) -> None:
    """Raise for a `dtype` (or `torch_dtype`) that transformers does not take.

    Raises:
        TypeError: It is neither a dtype nor its name.
        ValueError: It is the name of no dtype; says which is near.
    """
    for name in ("dtype", "torch_dtype"):
        given = options.get(name)
        if given is None or isinstance(given, (torch.dtype, Mapping)):
            continue
        how = "Give torch.bfloat16 or another torch.dtype, its name ('bfloat16'), or 'auto', the checkpoint's own."
        if not isinstance(given, str):
            raise TypeError(f"{name}={given!r:.80} is no dtype. {how}")
        if given != "auto" and not isinstance(getattr(torch, given, None), torch.dtype):
            short = _SHORT_DTYPES.get(given.lower())
            names = ("bfloat16", "float16", "float32", "float64", "auto")
            near = f" Did you mean {short}?" if short else nearest(given, names)
            raise ValueError(f"{name}={given!r:.80} is no dtype.{near} {how}")


def refuse_unreadable_block(frame: FrameType | None) -> None:
    """Raise for a `with` block that nnsight would refuse, before a model is loaded for it.

    Args:
        frame: The caller's frame, at the line of the `with` statement.

    Raises:
        ValueError: The block's body stands on the line of its `with`, or begins with `try`.
    """
    source = "" if frame is None else "".join(linecache.getlines(frame.f_code.co_filename))
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a notebook's cell with magics: nnsight itself will say
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and frame is not None and node.lineno <= frame.f_lineno < node.body[0].lineno:
            if isinstance(node.body[0], ast.Try):
                raise ValueError("A traced block cannot begin with `try`: put another statement before it.")
        elif isinstance(node, ast.With) and frame is not None and node.lineno == frame.f_lineno == node.body[0].lineno:
            raise ValueError(
                f"The body of a traced block begins on a line of its own, because nnsight runs it itself: break line "
                f"{node.lineno} of {frame.f_code.co_filename} after the colon."
            )


def resolve_tokenizer(
    model: str | nn.Module,
    tokenizer: Any,
    tokenizer_kwargs: dict[str, Any] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Any:
    """The tokenizer to trace with: a copy of the user's, or the one that belongs to the model.

    `IdsAlone` for a module that is not HuggingFace's, if none is given: it is run on token ids.

    nnsight pads on the left and sets a pad token on the tokenizer it is given, so the user's own is never handed over.

    Raises:
        ValueError: A loaded module was given without a tokenizer, and does not say where it came from.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    source = tokenizer if tokenizer is not None else model
    if isinstance(source, nn.Module) and not is_huggingface(source):
        return IdsAlone()
    if isinstance(source, nn.Module):
        source = getattr(source.config, "_name_or_path", "") or getattr(source, "name_or_path", "")
        if not source:
            raise ValueError(
                f"{type(model).__name__} was given as a loaded module that does not say where it was loaded from, so "
                f"its tokenizer cannot be found. Pass tokenizer=... (a tokenizer, a hub id or a folder)."
            )
    options = dict(tokenizer_kwargs or {})
    if isinstance(source, (str, Path)):
        return AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=trust_remote_code, **options
        )
    if not isinstance(source, PreTrainedTokenizerBase) and not callable(source):
        raise TypeError(f"tokenizer must be a tokenizer, a hub id or a folder, not a {type(source).__name__}.")
    mine = copy.deepcopy(source)
    for name, value in options.items():
        setattr(mine, name, value)
    return mine


def require_eager(model: str | nn.Module, options: dict[str, Any]) -> None:
    """Make `options` (and a loaded module) compute attention the way that has probabilities to read.

    Raises:
        ValueError: `attn_implementation` was also passed, and is not "eager".
    """
    asked = options.get("attn_implementation")
    if asked not in (None, "eager"):
        raise ValueError(
            f"enable_attention_probs=True needs attn_implementation='eager', because {asked!r} never computes the "
            f"probabilities as a tensor; attn_implementation={asked!r} was asked for. Drop one of the two."
        )
    if isinstance(model, nn.Module):
        options.pop("attn_implementation", None)
        make_eager(model)
    else:
        options["attn_implementation"] = "eager"


def prefix_free(tokenizer: Any) -> Any:
    """A copy of a tokenizer that does not put a space before the first word."""
    source = getattr(tokenizer, "name_or_path", "")
    if source:
        return type(tokenizer).from_pretrained(source, add_prefix_space=False)
    mine = copy.deepcopy(tokenizer)
    if hasattr(mine, "add_prefix_space"):
        mine.add_prefix_space = False
    return mine


@contextlib.contextmanager
def left_in_place(module: nn.Module) -> Iterator[None]:
    """A block in which transformers does not move a module whose weights accelerate brings in when they are needed.

    Raises:
        ValueError: Weights are on the meta device, and nothing brings them in.
    """
    absent = [
        path
        for path, inner in (module.named_modules() if is_huggingface(module) else ())
        if not hasattr(inner, "_hf_hook") and any(p.device.type == "meta" for p in inner.parameters(recurse=False))
    ]
    if absent:
        raise ValueError(
            f"The weights of {type(module).__name__} at {absent[0] or 'its root'} are on the meta device, and nothing "
            "brings them in. Give the name of the checkpoint instead of the module, or load the module's weights first."
        )
    devices_first(module)
    unplaced = getattr(module, "hf_device_map", None) is None
    offloaded = unplaced and any(p.device.type == "meta" for p in module.parameters())
    if offloaded:
        module.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    try:
        yield
    finally:
        if offloaded:
            del module.hf_device_map


def devices_first(module: nn.Module) -> None:
    """Put what is on disk last in a module's device map: transformers moves a pipeline's inputs to its first entry."""
    placed = getattr(module, "hf_device_map", None)
    if placed:
        module.hf_device_map = dict(sorted(placed.items(), key=lambda entry: entry[1] == "disk"))  # type: ignore[assignment]


@contextlib.contextmanager
def quiet_about_the_task() -> Iterator[None]:
    """A block in which transformers does not say that a model of images and text is none for text generation.

    nnsight asks for that task, and runs only the model, which takes texts. The complaint lists hundreds of classes.
    """
    said_by = logging.getLogger("transformers.pipelines.base")

    def other(record: logging.LogRecord) -> bool:
        return "is not supported for text-generation" not in record.getMessage()

    said_by.addFilter(other)
    try:
        yield
    finally:
        said_by.removeFilter(other)


@contextlib.contextmanager
def reported(reports: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """While the block is open, keep what transformers says of every checkpoint that it loads.

    Args:
        reports: Is given (model, report) for each; a report lists the weights that were "missing_keys",
            "unexpected_keys" and "mismatched_keys".
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_loading_info", False)
        loaded = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        if isinstance(loaded, tuple):
            devices_first(loaded[0])
            reports.append(loaded)
        return loaded[0] if isinstance(loaded, tuple) and not wanted else loaded

    PreTrainedModel.from_pretrained = classmethod(watched)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]
