"""The standard names on a plain HuggingFace model: modules, no tracing."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from nnterp.anatomy import RenameConfig, find_anatomy
from nnterp.errors import Unavailable
from nnterp.older import FoundModules
from nnterp.traced import layer_index


class ModuleAccessor:
    """Look a HuggingFace model's modules up under the standard names.

    `ModuleAccessor(model).layers[3]`, `.embed_tokens`, `.ln_final`, `.lm_head`, `.get_attention(3)`, `.get_mlp(3)`;
    other attributes are the model's own.

    Args:
        model: A causal LM loaded with transformers.
        rename_config: Names of parts for models whose structure does not give them away.
        rename: Extra names: native path → your name.

    Raises:
        AnatomyError: A part was not found.

    Example:
        from transformers import AutoModelForCausalLM

        names = ModuleAccessor(AutoModelForCausalLM.from_pretrained(nnterp.toy_checkpoint()))
        print(type(names.get_mlp(3)).__name__)  # → LlamaMLP
    """

    def __init__(
        self, model: nn.Module, rename_config: RenameConfig | None = None, rename: dict[str, str] | None = None
    ) -> None:
        self._model = model
        self.anatomy = find_anatomy(model, rename_config)
        self._extra = {name: path for path, name in (rename or {}).items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_model":  # asked for by `copy` before there is a model
            raise AttributeError(name)
        if name in ("embed_tokens", "layers", "ln_final", "lm_head"):
            path = getattr(self.anatomy, name)
            if path is None:
                raise Unavailable(
                    f"{self.anatomy.model_class} has no {name}: {self.anatomy.absent.get(name, 'absent')}."
                )
            return self._model.get_submodule(path)
        if name in self._extra:
            return self._model.get_submodule(self._extra[name])
        if name == "model" and not hasattr(self._model, "model"):  # the backbone, by Llama's name for it
            return self.nn_model.model._module
        return getattr(self._model, name)

    @cached_property
    def nn_model(self) -> FoundModules:
        """nnsight's tree over the model, with the standard names (1.x)."""
        return FoundModules(self._model, self.anatomy)

    def get_embed_tokens(self) -> nn.Module:
        """Look up the token embedding; returns the model's own module."""
        return self.embed_tokens

    def get_layers(self) -> nn.ModuleList:
        """Look up the list of layers; returns the model's own list."""
        return self.layers

    def get_attention(self, layer: int) -> nn.Module:
        """Look up the attention of one layer; returns the model's own module."""
        return self._part("self_attn", layer)

    def get_mlp(self, layer: int) -> nn.Module:
        """Look up the feed-forward of one layer; returns the model's own module."""
        return self._part("mlp", layer)

    def get_unembed_norm(self) -> nn.Module:
        """Look up the norm after the last layer; returns the model's own module."""
        return self.ln_final

    def get_unembed(self) -> nn.Module:
        """Look up the unembedding; returns the model's own module."""
        return self.lm_head

    def _part(self, role: str, layer: int) -> nn.Module:
        index = layer_index(layer, self.anatomy.num_layers, f"get_{role}")
        part = self.anatomy.part(role, index)
        if part.path is None:
            raise Unavailable(
                f"Layer {layer} has no {role} module: the part enters at {part.entry} and leaves at {part.exit}."
            )
        return self._model.get_submodule(part.path)
