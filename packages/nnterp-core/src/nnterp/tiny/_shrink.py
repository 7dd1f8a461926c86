"""A tiny configuration of any model type: rules first, then the row of a special case, then the caller's fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ._rules import HEADS, MIN_LAYERS, TOWER_LAYERS, replaces_default, tiny_rope, value_by_rule
from ._special_cases import CONFIG_ROWS

# Lists with one entry per layer, and names of the number of layers.
_LAYER_LISTS = [
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "indexer_types",
    "layers_block_type",
    "attn_layers",
    "activation_sparsity_pattern",
    "num_attention_heads_per_layer",
    "layer_rope_theta",
]
_DEPTHS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
    "num_decoder_layers",
    "num_encoder_layers",
    "depth",
]

# Names of fields that hold indices of layers: where a loop over layers begins and ends, and the like.
_INDEX = re.compile(r"(loop|recurr|repeat|layer).*(range|start|end|begin|first|last|idx|ids|indices|layers)")

# Keywords that every configuration class takes; of a composite configuration, they go to the outermost one.
_EVERYWHERE = frozenset({"attn_implementation", "experts_implementation", "dtype"})


def tiny_config(model_type: str, *, num_layers: int | None = None, **overrides: Any) -> PreTrainedConfig:
    """The configuration that `tiny_model` builds from. `tiny_model` explains the parameters."""
    return _tiny(CONFIG_MAPPING[model_type], {}, num_layers, overrides)


def _tiny(
    config_class: type[PreTrainedConfig],
    parent_row: Mapping[str, Any],
    num_layers: int | None,
    overrides: Mapping[str, Any],
) -> PreTrainedConfig:
    """A tiny configuration of one class, with the configurations inside it.

    Args:
        config_class: The class to make one of.
        parent_row: What the row of the enclosing configuration says about this one.
        num_layers: Number of layers, or None for the default of the model type.
        overrides: The caller's fields.
    """
    row = {**CONFIG_ROWS.get(config_class.model_type, {}), **parent_row}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    full = _full_size(config_class)
    parts = _parts(config_class)
    overrides, for_parts = _split_overrides(config_class, defaults, parts, overrides)

    lists = _layer_lists(defaults, full, {**row, **overrides})
    picked = cover(lists)
    depth = _depth_asked_for(num_layers, overrides)
    if depth is None:
        depth = row.get("depth", max(MIN_LAYERS, len(picked)))

    values = {
        **_by_rule(defaults, full),
        **{name: depth for name in _DEPTHS if name in defaults},
        **_tiny_parts(parts, row, num_layers, overrides, for_parts),
        **_into_the_stack(defaults, full, depth),
        **_from_row(row, parts, depth),
        **overrides,
        **{name: _cycled(value, picked, depth) for name, value in lists.items()},
    }
    return config_class(**values)


def _split_overrides(
    config_class: type[PreTrainedConfig],
    defaults: Mapping[str, Any],
    parts: Mapping[str, _Part],
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split the caller's fields into those of this configuration and, by name, those of its parts.

    Fields that only the text part has may be given without naming it.
    """
    own = {config_class.attribute_map.get(name, name): value for name, value in overrides.items()}
    for_parts = {key: dict(own.pop(key)) for key in parts if isinstance(own.get(key), Mapping)}
    text = _text_part(parts)
    if text is not None and not any(name in defaults for name in _DEPTHS):
        below = [name for name in own if name not in defaults and name not in _EVERYWHERE]
        for_parts[text] = {**for_parts.get(text, {}), **{name: own.pop(name) for name in below}}
    return own, for_parts


def _by_rule(defaults: Mapping[str, Any], full: PreTrainedConfig | None) -> dict[str, Any]:
    """The fields that the rules set."""
    values = {name: value_by_rule(name) for name, given in defaults.items() if replaces_default(name, given, defaults)}
    if "kv_lora_rank" in defaults:  # latent attention expands to one key and one value per query head
        values["num_key_value_heads"] = HEADS
    rope = getattr(full, "rope_parameters", None)
    if isinstance(rope, dict):
        values["rope_parameters"] = tiny_rope(rope)
    return values


def _layer_lists(
    defaults: Mapping[str, Any], full: PreTrainedConfig | None, given: Mapping[str, Any]
) -> dict[str, Sequence[Any]]:
    """The non-empty lists with one entry per layer: those in `given`, or else those of the full-size model."""
    stated = {name: getattr(full, name, None) for name in _LAYER_LISTS if name in defaults}
    stated.update({name: value for name, value in given.items() if name in _LAYER_LISTS})
    return {name: value for name, value in stated.items() if isinstance(value, (list, tuple)) and len(value)}


def _depth_asked_for(num_layers: int | None, overrides: Mapping[str, Any]) -> int | None:
    """The number of layers the caller wants, given as such or as the length of a list with one entry per layer."""
    if num_layers:
        return num_layers
    numbers = [overrides[name] for name in _DEPTHS if overrides.get(name) is not None]
    lengths = [len(overrides[name]) for name in _LAYER_LISTS if overrides.get(name)]
    return next(iter([*numbers, *lengths]), None)


def _tiny_parts(
    parts: Mapping[str, _Part],
    row: Mapping[str, Any],
    num_layers: int | None,
    overrides: Mapping[str, Any],
    for_parts: Mapping[str, dict[str, Any]],
) -> dict[str, PreTrainedConfig]:
    """The configurations inside a composite one. Optional ones are made only if a row or the caller mentions them."""
    made = {}
    for key, part in parts.items():
        if key in overrides or (part.optional and key not in row and key not in for_parts):
            continue
        layers = num_layers if key == _text_part(parts) else None
        if key.startswith(("vision", "audio")):
            layers = CONFIG_ROWS.get(part.config_class.model_type, {}).get("depth", TOWER_LAYERS)
        made[key] = _tiny(part.config_class, row.get(key, {}), layers, for_parts.get(key, {}))
    return made


def _from_row(row: Mapping[str, Any], parts: Mapping[str, _Part], depth: int) -> dict[str, Any]:
    """The fields that a row of `CONFIG_ROWS` sets in the configuration itself."""
    fields = {name: value for name, value in row.items() if name not in parts and name != "depth"}
    return {name: value(depth) if callable(value) else value for name, value in fields.items()}


def _into_the_stack(defaults: Mapping[str, Any], full: PreTrainedConfig | None, depth: int) -> dict[str, Any]:
    """Fields that name layers beyond a stack of `depth` layers, moved into it in proportion.

    Without this, a model that runs some of its layers in a loop would be built without the loop.
    """
    stated = {} if full is None else vars(full)
    deep = max((d for name in _DEPTHS if isinstance(d := stated.get(name), int)), default=0)
    moved: dict[str, Any] = {}
    for name in defaults if deep > depth else ():
        value: Any = stated.get(name)
        several = isinstance(value, (list, tuple)) and bool(value)
        if several and len(value) != 2 and not re.search("loop|recurr|repeat", name):  # towers return that many states
            continue
        numbers: list[Any] = list(value) if several else [value]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= deep for n in numbers)
        if name in _LAYER_LISTS or name in _DEPTHS or not _INDEX.search(name) or not whole or max(numbers) < depth:
            continue
        scaled = [min(n * depth // deep, depth) for n in numbers]
        if several and len(scaled) == 2 and scaled[0] == scaled[1]:  # a range keeps at least one layer
            scaled = [min(scaled[0], depth - 1), min(scaled[0], depth - 1) + 1]
        moved[name] = type(value)(dict.fromkeys(scaled)) if several else scaled[0]
    return moved


def _cycled(entries: Sequence[Any], picked: Sequence[int], depth: int) -> Sequence[Any]:
    """The picked entries, repeated to the number of layers, in a sequence of the same type."""
    kinds = [entries[i] for i in picked]
    return type(entries)(kinds[i % len(kinds)] for i in range(depth))  # type: ignore[call-arg]


def _full_size(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except Exception:  # the class's defaults do not pass its own validation
        return None


@dataclasses.dataclass(frozen=True)
class _Part:
    """A configuration inside a composite one, and whether the composite does without it."""

    config_class: type[PreTrainedConfig]
    optional: bool


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, _Part]:
    """The configurations inside a composite one, by field name."""
    specs = getattr(config_class, "sub_configs_defaults", None)
    if specs is None:
        return _parts_before_specs(config_class)
    found = {}
    for key, part_class in config_class.sub_configs.items():
        spec = specs.get(key)
        if not issubclass(part_class, PreTrainedConfig):  # AutoConfig
            part_class = CONFIG_MAPPING[spec.model_type]
        found[key] = _Part(part_class, spec is not None and spec.optional)
    return found


def _parts_before_specs(config_class: type[PreTrainedConfig]) -> dict[str, _Part]:
    """The same where transformers does not say yet which parts are optional: those that a plain one is made without."""
    plain = _full_size(config_class)
    found = {}
    for key, part_class in config_class.sub_configs.items():
        made = getattr(plain, key, None)
        if isinstance(made, PreTrainedConfig):
            found[key] = _Part(type(made), optional=False)
        elif issubclass(part_class, PreTrainedConfig):  # no AutoConfig, which does not say which class it is
            found[key] = _Part(part_class, optional=plain is not None)
    return found


def _text_part(parts: Mapping[str, _Part]) -> str | None:
    return next((key for key in ("text_config", "decoder") if key in parts), None)


def cover(lists: Mapping[str, Sequence[Any]], at_least: int = MIN_LAYERS) -> list[int]:
    """Indices of layers, in order, in which every kind of layer that the lists tell apart occurs."""
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=False))
    picked = {kinds.index(kind) for kind in kinds}
    rest = (i for i in range(len(kinds)) if i not in picked)
    picked.update(islice(rest, max(0, at_least - len(picked))))
    return sorted(picked)
