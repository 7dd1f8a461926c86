"""The files of published lenses: the tuned-lens repository's folders, and Jacobian lenses made for Neuronpedia."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import path_of
from nnterp.files import write_whole
from nnterp.indices import integer
from nnterp.interventions._fitted._sound import require_map
from nnterp.interventions._vectors._belonging import identity_of, short_name
from nnterp.warn import warn

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
        if zipfile.is_zipfile(path) and _unpacks_to_more(path):
            raise ValueError("it is compressed, and torch.save compresses nothing")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and numbers, so it is not opened: {error!s:.200}") from error
    except Exception as error:  # the reader of a damaged file fails in any way
        raise ValueError(f"{path} is truncated or damaged ({type(error).__name__}: {error!s:.200}).") from error


def _unpacks_to_more(path: Path) -> bool:
    """Whether a zip file holds more than its own bytes."""
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    return not stored or sum(entry.file_size for entry in entries) > path.stat().st_size


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
        revision = config.get("base_model_revision")
        if not isinstance(name, str) or not (revision is None or isinstance(revision, str)):
            raise TypeError("the model's name and revision are texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is no config of a tuned lens ({error!r:.200}).") from error
    own = identity_of(model)["model"], model.revision
    wrong = []
    if short_name(name) != short_name(own[0]):
        wrong.append(f"it was fitted on {name}, and this is {own[0]}")
    if (revision or "main") != (own[1] or "main"):
        wrong.append(f"it was fitted on revision {revision or 'main'}, and this is {own[1] or 'main'}")
    if wrong and strict:
        raise ValueError(f"The lens in {folder}: {' and '.join(wrong)}. With strict=False this is a warning.")
    if wrong:
        warn(f"The lens in {folder}: {' and '.join(wrong)}.")
    if (count, width) != (model.num_layers, model.hidden_size):
        raise ValueError(
            f"The lens in {folder} is for {count} layers of width {width}; {own[0]} has {model.num_layers} of width "
            f"{model.hidden_size}."
        )
    state = read_pickle(folder / PARAMS)
    weights, biases = {}, {}
    if not isinstance(state, dict):
        raise ValueError(f"{folder / PARAMS} holds no maps by name but {type(state).__name__}.")
    for i in range(1, model.num_layers):
        weight: Any = state.get(f"{i}.weight")
        require_map(weight, (width, width), f"{folder / PARAMS}: {i}.weight")
        weights[i - 1] = torch.eye(width) + weight.float()
        if f"{i}.bias" in state:
            bias: Any = state[f"{i}.bias"]
            require_map(bias, (width,), f"{folder / PARAMS}: {i}.bias")
            biases[i - 1] = bias.float()
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


def read_jacobian_file(
    path: str | Path, model: StandardizedTransformer
) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """The Jacobians of a published file, by layer, and what else it says."""
    path, last = path_of(path), model.num_layers - 1
    state = read_pickle(path)
    try:
        jacobians, width, prompts = state["J"], integer(state["d_model"], "d_model"), state["n_prompts"]
        prompts, layers = integer(prompts, "n_prompts"), [integer(layer, "a layer") for layer in jacobians]
        matrices = [jacobians[layer] for layer in jacobians]
        told = [state.get("source_layers"), state.get("target_layer")]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is no Jacobian lens: it needs J, d_model and n_prompts ({error!r:.200}).") from error
    name = identity_of(model)["model"]
    if width != model.hidden_size:
        raise ValueError(
            f"{path}: the lens is for a stream of width {width}; that of {name} has width {model.hidden_size}."
        )
    if surplus := [layer for layer in layers if not 0 <= layer < last]:
        raise ValueError(
            f"{path} has maps for layers {surplus[:5]}; {name} has layers 0 to {last - 1} before its last."
        )
    if told[0] is not None and told[0] != sorted(layers):
        raise ValueError(f"{path} is damaged: it has maps for layers {sorted(layers)}, and says {told[0]!r:.80}.")
    if told[1] not in (None, -1, last):
        raise ValueError(
            f"{path} leads to layer {told[1]!r:.80} and not to the last one, {last}: that is not read here."
        )
    for layer, matrix in zip(layers, matrices, strict=True):
        require_map(matrix, (width, width), f"{path}: the Jacobian of layer {layer}")
    found = {layer: matrix.float() for layer, matrix in zip(layers, matrices, strict=True)}
    return found, {"imported": "jacobian-lens", "prompts": prompts}


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
