"""A dataset of activations as a `datasets.Dataset`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from nnterp.datasets._column import ActivationColumn
from nnterp.datasets._format import label
from nnterp.datasets._stored import Stored

_ARROW = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "float32",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def to_huggingface(dataset: Stored) -> Any:
    """See `ActivationDataset.huggingface`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("huggingface() needs the package `datasets`: pip install datasets.") from error
    if not dataset.complete:
        raise ValueError(f"The dataset in {dataset.folder} is not complete; the same call of collect() completes it.")
    names = {label(name, layer): name for name, mine in dataset.layers.items() for layer in (mine or (None,))}
    features: dict[str, Any] = {
        "prompt": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "token_ids": datasets.Sequence(datasets.Value("int32")),
        "positions": datasets.Sequence(datasets.Value("int32")),
    }
    for name, own in names.items():
        about, value = dataset.tensors[name], dataset.manifest["values"][own]
        if about["dtype"] not in _ARROW:
            raise ValueError(f"{name} is {about['dtype']}, which Arrow does not hold.")
        axes = len(about["shape"]) + (value["stored_per"] == "position")
        if value["stored_per"] == "pattern":
            axes = 2 if dataset.manifest["one_position"] else 3
        feature: Any = datasets.Value(_ARROW[about["dtype"]])
        for _ in range(axes):
            feature = datasets.Sequence(feature)
        features[name] = feature
    written = hashlib.sha256("".join(entry["sha256"] for entry in dataset.entries).encode()).hexdigest()
    return datasets.Dataset.from_generator(
        _rows,
        features=datasets.Features(features),
        gen_kwargs={"folder": str(dataset.folder), "written": written},
    )


def _rows(folder: str, written: str) -> Iterator[dict[str, Any]]:
    """The rows; `written` makes that another dataset in the same folder is not taken for this one."""
    dataset = Stored.open(folder)
    columns = {
        label(name, layer): ActivationColumn(dataset, name, () if layer is None else (layer,), stacked=False)
        for name, layers in dataset.layers.items()
        for layer in layers or (None,)
    }
    for number in range(dataset.prompts[-1]):
        row = dataset.about(number) | {name: column.prompt(number) for name, column in columns.items()}
        yield {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
