"""The names a user gave in a `RenameConfig`, looked up in the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nnterp.anatomy import _names
from nnterp.anatomy._messages import no_match
from nnterp.anatomy._modules import get_child, path_of
from nnterp.anatomy._rename import RenameConfig
from nnterp.errors import AnatomyError


def backbones(model: nn.Module, rename: RenameConfig) -> tuple[str, ...]:
    """Paths of the modules that may hold the layers: the user's, "" for the model itself, then those with known names.

    Raises:
        AnatomyError: The user's names for the backbone match nothing.
    """
    asked = rename.candidates("model_name")
    required = rename.required("model_name")
    if required and get_child(model, required[0]) is None:
        raise AnatomyError(no_match("model_name", required, model, type(model).__name__))
    return tuple(name for name in (*asked, "", *_names.BACKBONES) if name == "" or get_child(model, name) is not None)


def path_asked_for(model: nn.Module, rename: RenameConfig, field: str, owners: Iterable[str]) -> str | None:
    """The path of the module that the user named in `field`; None if the user named none, or none of a list is there.

    Args:
        model: The model.
        rename: The user's names.
        field: A field of `RenameConfig`.
        owners: Paths of modules that the name may be relative to.

    Raises:
        AnatomyError: A single name matches nothing.
    """
    for name in rename.candidates(field):
        for owner in owners:
            path = f"{owner}.{name}" if owner else name
            module = get_child(model, path)
            if module is not None:
                return path_of(model, module)
    if required := rename.required(field):
        raise AnatomyError(no_match(field, required, model, type(model).__name__))
    return None


def check_in_some_layer(rename: RenameConfig, field: str, layers: list[nn.Module]) -> None:
    """Check that a single name which the user gave for a part of a layer matches in at least one layer.

    Raises:
        AnatomyError: It matches in none.
    """
    asked = rename.required(field)
    if asked and not any(get_child(layer, name) is not None for name in asked for layer in layers):
        raise AnatomyError(no_match(field, asked, layers[0], "a layer"))
