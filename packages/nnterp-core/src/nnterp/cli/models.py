"""What a command's MODEL stands for, and what to say if it stands for nothing. The same in every command."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

TOY = "toy"
HELP = (
    "a hub id, a folder, 'toy' (the model that comes with nnterp), or a model type of transformers, such as llama "
    "(a tiny random model of that type)"
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--trust-remote-code` and `--device`."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the checkpoint"
    )
    parser.add_argument("--device", help="where to load the weights, e.g. cpu or cuda (default: wherever they fit)")


def require_device(device: str | None) -> None:
    """Raise if the device of `--device` is not there, before a model is loaded.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    try:
        if device not in (None, "auto"):
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None


def require_file(path: Path | None, option: str) -> None:
    """Raise if the file that an option names cannot be written, before a model is loaded. No folder is made.

    Raises:
        ValueError: Its folder does not exist, or the file cannot be written there.
    """
    from nnterp.files import require_writable

    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it, or name another file.")
    try:
        require_writable(path)
    except OSError as error:
        raise ValueError(f"{option} {error}") from None


def load_model(arguments: argparse.Namespace, *, weights: bool = True, **options: Any) -> StandardizedTransformer:
    """Load the model of `arguments.model`, where and as the arguments of `add_model_arguments` say.

    Args:
        arguments: The parsed command line.
        weights: Whether to load the weights now.
        **options: Given to `StandardizedTransformer`.

    Raises:
        ValueError: The name is empty, or names a folder that is not there or holds no model.
        OSError: The name is no folder, and the hub does not give it.
    """
    from nnterp import StandardizedTransformer

    if is_random(arguments.model):
        from nnterp.testing import tiny_model, tiny_tokenizer

        return StandardizedTransformer(tiny_model(arguments.model), tokenizer=tiny_tokenizer(), **options)
    placed = {"device_map": arguments.device} if arguments.device else {}
    source, trusted = source_of(arguments.model), arguments.trust_remote_code
    model = StandardizedTransformer(source, trust_remote_code=trusted, **placed, **options)
    if weights:
        model.dispatch()
    return model


def is_random(name: str) -> bool:
    """Whether a name stands for a tiny random model: it is a model type of transformers, and no folder here."""
    from nnterp.tiny import model_types

    return name in model_types() and not os.path.exists(name)


def about_random(name: str) -> str:
    """What to say above the output for a model with random weights."""
    return (
        f"{name} is a model type of transformers: this is a tiny model of that type with random weights, so its "
        "predictions mean nothing. Checkpoints of the hub are named OWNER/NAME."
    )


def source_of(name: str) -> str:
    """The hub id or folder to load for a name on the command line.

    Raises:
        ValueError: It is empty, or names a folder that is not there or holds no model.
    """
    from nnterp.toy import toy_checkpoint

    if not name.strip():
        raise ValueError("MODEL is empty: give a hub id, a folder, 'toy' or a model type.")
    if name == TOY and not os.path.exists(name):
        return toy_checkpoint()
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if not os.path.exists(os.path.join(folder, "config.json")):
            raise ValueError(f"The folder {name} holds no config.json, so it is no model of transformers.")
        return folder
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name}.")
    return name


def not_loaded(name: str, error: BaseException) -> str:
    """One line that says why a name could not be loaded: it stands for nothing, or loading failed."""
    from nnterp.tiny import model_types

    told = " ".join(str(error).split())
    if not isinstance(error, OSError) or os.path.exists(os.path.expanduser(name)):
        return told
    short = told if len(told) < 200 else f"{told[:197]}..."
    near = difflib.get_close_matches(name, [TOY, *model_types()], n=3, cutoff=0.5)
    nearest = f" Names that are near: {', '.join(near)}." if near else ""
    return f"{name!r} is no folder here, and the hub did not give it ({short}).{nearest}"
