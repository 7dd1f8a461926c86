"""What a command's MODEL stands for, and what to say if it stands for nothing."""

from __future__ import annotations

import difflib
import os

from nnterp.toy import toy_checkpoint

TOY = "toy"
HELP = "a hub id, a folder, or 'toy', the model that comes with nnterp"


def source_of(name: str) -> str:
    """The hub id or folder to load for a name on the command line.

    Raises:
        ValueError: It is empty, or names a folder that is not there or holds no model.
    """
    if not name.strip():
        raise ValueError(f"MODEL is empty: give {HELP}.")
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
