"""`RenameConfig`, the names a user gives to a model's parts, and `get_rename_dict` for plain nnsight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

from nnterp.anatomy import _names


class AttnProbFunction(ABC):
    """Says where a model computes its attention probabilities, for models nnterp does not know (kept from 1.x).

    Subclass it and pass an instance as `RenameConfig(attn_prob_source=...)`.
    """

    @abstractmethod
    def get_attention_prob_source(self, attention_module: Any, return_module_source: bool = False) -> Any:
        """Find the operation whose output is the probabilities `[batch, heads, query, key]`.

        Args:
            attention_module: The attention's envoy (`model.layers[i].self_attn`).
            return_module_source: Return the source object that holds the operation instead, for printing.

        Returns:
            The operation, as nnsight serves it, or its source object.
        """

    def __call__(self, attention_module: Any, return_module_source: bool = False) -> Any:
        return self.get_attention_prob_source(attention_module, return_module_source=return_module_source)


Names = str | list[str] | None


@dataclass
class RenameConfig:
    """Names of a model's parts, for models in which nnterp does not find them by itself (remote code, research code).

    Every name may be one string or a list of candidates, and may be a dotted path. Layer-level names (`attn_name`,
    `mlp_name`) are relative to a layer; `ln_final_name`, `lm_head_name` and `layers_name` are relative to the model or
    to its backbone (`model_name`). A single name that matches nothing is an error that shows what was there. A list may
    serve several models: if none of its names matches, the part is looked for as without them.

    Attributes:
        attn_name: The attention inside a layer.
        mlp_name: The feed-forward inside a layer.
        ln_final_name: The norm after the last layer.
        lm_head_name: The unembedding.
        model_name: The backbone that holds the layers.
        layers_name: The list of layers. Of several lists that run in turn (HRM), one stands for all of them.
        attn_prob_source: Where attention probabilities are found, see `AttnProbFunction`.
        ignore_mlp: Do not look for a feed-forward in the layers: they have none.
        ignore_attn: Do not look for an attention in the layers: they have none.
        attn_head_config_key: Config field with the number of heads, or the number itself.
        hidden_size_config_key: Config field with the width of the residual stream, or the number itself.
        vocab_size_config_key: Config field with the vocabulary size, or the number itself.

    Example:
        names = RenameConfig(attn_name="self_attn", mlp_name="mlp", layers_name="layers", ln_final_name="norm")
        same = StandardizedTransformer(nnterp.toy_checkpoint(), rename_config=names)
    """

    attn_name: Names = None
    mlp_name: Names = None
    ln_final_name: Names = None
    lm_head_name: Names = None
    model_name: Names = None
    layers_name: Names = None
    attn_prob_source: AttnProbFunction | None = None
    ignore_mlp: bool | None = None
    ignore_attn: bool | None = None
    attn_head_config_key: str | list[str] | int | None = None
    hidden_size_config_key: str | list[str] | int | None = None
    vocab_size_config_key: str | list[str] | int | None = None

    def candidates(self, field: str) -> list[str]:
        """List the names given for one field.

        Returns:
            The names, none if nothing was given.
        """
        value = getattr(self, field)
        return [value] if isinstance(value, str) else list(value or ())

    def required(self, field: str) -> list[str]:
        """Look up the name given for one field, if it has to match: a single name, and not a list of candidates.

        Returns:
            A list with that name, or an empty one.
        """
        value = getattr(self, field)
        return [value] if isinstance(value, str) else []

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"RenameConfig({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"


def get_rename_dict(rename_config: RenameConfig | None = None) -> dict[str, str]:
    """A `rename=` dict for plain nnsight that gives the standard names to the common architectures at once.

    nnsight skips keys that match nothing, so one dictionary serves many models. The exact names of one model are
    `{native: standard for standard, native in StandardizedTransformer(...).anatomy.names()}`.

    Args:
        rename_config: Your own names, which come before the known ones.

    Returns:
        Native (relative) path → standard name.

    Raises:
        TypeError: `rename_config` is no `RenameConfig`.

    Example:
        print(nnterp.get_rename_dict()["transformer"])
    """
    if rename_config is not None and not isinstance(rename_config, RenameConfig):
        raise TypeError(f"rename_config is a RenameConfig, not {rename_config!r:.80}.")
    config = rename_config or RenameConfig()
    # First, so that later keys may go through the name it gives. Modules called "decoder" stand inside the backbone.
    named = (*config.candidates("model_name"), *_names.BACKBONES, "language_model")
    renames = {name: "model" for name in named if "." not in name and name not in ("model", "decoder")}
    backbones = [*config.candidates("model_name"), *_names.BACKBONES]

    def add(field: str | None, known: tuple[str, ...], standard: str, *, in_backbone: bool) -> None:
        for name in (*(config.candidates(field) if field else ()), *known):
            if in_backbone:
                for backbone in backbones:
                    if "." not in name:
                        renames.setdefault(f"{backbone}.{name}", standard)
            if name != standard:
                renames.setdefault(name, standard)

    def without(known: tuple[str, ...], beside: str) -> tuple[str, ...]:
        """The known names less one that may stand beside another in a layer: nnsight refuses a name for two modules."""
        return tuple(name for name in known if name != beside)

    add("layers_name", _names.LAYERS, "layers", in_backbone=True)
    add("ln_final_name", _names.LN_FINAL[:8], "ln_final", in_backbone=True)
    add(None, _names.EMBED_TOKENS, "embed_tokens", in_backbone=True)
    add("lm_head_name", _names.LM_HEAD, "lm_head", in_backbone=False)
    if not config.ignore_attn:
        add("attn_name", without(_names.SELF_ATTN, "cross_attn"), "self_attn", in_backbone=False)
    if not config.ignore_mlp:
        add("mlp_name", without(_names.MLP, "shared_mlp"), "mlp", in_backbone=False)
    return renames
