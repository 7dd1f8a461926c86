"""What stands in a remote request for an object that the worker has."""

from __future__ import annotations

from typing import Any


class SentByName:
    """Stands for an object that a request names and the worker has; any other pickle of a model is refused by it."""

    def __init__(self, name: str, model: str) -> None:
        self._persistent_id, self._model = name, model

    def __reduce_ex__(self, protocol: Any) -> tuple:
        raise TypeError(
            f"A {self._model} cannot be pickled: it holds nnsight's tree over a module. Save the HuggingFace model and "
            "load it again: model._module.save_pretrained(folder), model.tokenizer.save_pretrained(folder), "
            "StandardizedTransformer(folder)."
        )
