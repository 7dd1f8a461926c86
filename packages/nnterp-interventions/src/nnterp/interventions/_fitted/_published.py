"""The files of published lenses: the tuned-lens repository's folders, and Jacobian lenses made for Neuronpedia."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import path_of
from nnterp.files import write_whole
from nnterp.interventions._vectors._belonging import identity_of, short_name

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer
    from nnterp.interventions._fitted._belonging import Origin

CONFIG, PARAMS = "config.json", "params.pt"


def read_pickle(path: Path) -> Any:
    """The tensors of a file of `torch.save`, without running what else it may hold.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated or damaged, or holds more than tensors; names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and numbers, so it is not opened: {error!s:.200}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({type(error).__name__}: {error!s:.200}).") from error


def write_pickle(path: Path, content: Any) -> None:
    """Write a file of `torch.save` at once."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def read_tuned_folder(
    folder: str | Path, model: StandardizedTransformer, strict: bool
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], dict[str, Any]]:
    """The maps and biases of a folder of the tuned-lens repository, by nnterp's layers, and what its config says."""
    folder = path_of(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"There is no {CONFIG} in {folder}: give a folder with {CONFIG} and {PARAMS}.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        count, width, name = (config[key] for key in ("num_hidden_layers", "d_model", "base_model_name_or_path"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no config of a tuned lens ({error!r}).") from error
    own = identity_of(model)["model"], model.revision
    revision = config.get("base_model_revision")
    wrong = []
    if short_name(str(name)) != short_name(own[0]):
        wrong.append(f"it was fitted on {name}, and this is {own[0]}")
    if (revision or "main") != (own[1] or "main"):
        wrong.append(f"it was fitted on revision {revision or 'main'}, and this is {own[1] or 'main'}")
    if wrong and strict:
        raise ValueError(f"The lens in {folder}: {' and '.join(wrong)}. With strict=False this is a warning.")
    if wrong:
        warnings.warn(f"The lens in {folder}: {' and '.join(wrong)}.", stacklevel=4)
    if (count, width) != (model.num_layers, model.hidden_size):
        raise ValueError(
            f"The lens in {folder} is for {count} layers of width {width}; {own[0]} has {model.num_layers} of width "
            f"{model.hidden_size}."
        )
    state = read_pickle(folder / PARAMS)
    weights, biases = {}, {}
    for i in range(1, count):
        given = state.get(f"{i}.weight") if isinstance(state, dict) else None
        if not isinstance(given, torch.Tensor) or tuple(given.shape) != (width, width):
            got = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(f"{folder / PARAMS} has no [{width}, {width}] map {i}.weight: it is {got}.")
        weights[i - 1] = torch.eye(width) + given.float()
        if f"{i}.bias" in state:
            biases[i - 1] = state[f"{i}.bias"].float()
    return weights, biases, {"imported": "tuned-lens", "config": config, "skip_first": 0}


def write_tuned_folder(
    folder: str | Path, weights: Mapping[int, torch.Tensor], biases: Mapping[int, torch.Tensor], origin: Origin
) -> None:
    """Write maps and biases as a folder of the tuned-lens repository."""
    folder, count = path_of(folder), origin.num_layers
    missing = [layer for layer in range(count - 1) if layer not in weights]
    if missing:
        raise ValueError(f"The tuned-lens package wants a map for every layer; this lens has none for {missing}.")
    width = weights[0].shape[0]
    state = {"0.weight": torch.zeros(width, width), "0.bias": torch.zeros(width)}
    for layer, weight in weights.items():
        state[f"{layer + 1}.weight"] = weight - torch.eye(width)
        state[f"{layer + 1}.bias"] = biases.get(layer, torch.zeros(width)).clone()
    config = {
        "base_model_name_or_path": origin.model,
        "d_model": width,
        "num_hidden_layers": count,
        "bias": True,
        "base_model_revision": origin.revision,
        "unembed_hash": None,
        "lens_type": "linear_tuned_lens",
    }
    write_pickle(folder / PARAMS, state)
    write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())


def read_jacobian_file(path: str | Path) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """The Jacobians of a published file, by layer, and what else it says."""
    path = path_of(path)
    state = read_pickle(path)
    try:
        jacobians = {int(layer): matrix.float() for layer, matrix in state["J"].items()}
        width, prompts = int(state["d_model"]), int(state["n_prompts"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no Jacobian lens: it needs J, d_model and n_prompts ({error!r}).") from error
    for layer, matrix in jacobians.items():
        if tuple(matrix.shape) != (width, width):
            raise ValueError(
                f"{path}: the Jacobian of layer {layer} has shape {list(matrix.shape)}, not [{width}, {width}]."
            )
    return jacobians, {"imported": "jacobian-lens", "prompts": prompts}


def write_jacobian_file(path: str | Path, weights: Mapping[int, torch.Tensor], prompts: int) -> None:
    """Write Jacobians as they are published."""
    large = [layer for layer, weight in weights.items() if not weight.half().isfinite().all()]
    if large:
        raise ValueError(f"The maps of layers {large} have entries above 65504, which half precision does not hold.")
    content = {
        "J": {layer: weight.half() for layer, weight in weights.items()},
        "n_prompts": prompts,
        "source_layers": sorted(weights),
        "d_model": next(iter(weights.values())).shape[0],
    }
    write_pickle(path_of(path), content)
