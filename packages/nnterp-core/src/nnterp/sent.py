"""What a remote request carries of a model, and what stands in it for an object that the worker has."""

from __future__ import annotations

from typing import Any

# Attributes that a remote request carries: nnsight's own, and nnterp's. Bound names (`layers`, ...) are sent too.
SENT_OF_NNSIGHT = (
    *("task", "pipeline", "tokenizer", "processor", "image_processor", "feature_extractor", "peft", "repo_id"),
    *("revision", "dispatched", "_module", "path", "interleaver", "_edits", "_rename", "_aliases", "_envoys"),
    *("_children", "_child_map", "args", "kwargs", "generator"),
)
SENT = (
    *"num_layers num_vision_layers hidden_size num_heads num_kv_heads head_dim".split(),
    *"intermediate_size vocab_size model_class layer_paths runs readout lenders positions_from_mask".split(),
    *("standing", "attached"),
)


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
