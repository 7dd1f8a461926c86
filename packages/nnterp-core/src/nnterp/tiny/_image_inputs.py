"""Prompts with an image for tiny models: random pixels in the shapes that a model's own processor gives."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ._image_rows import IMAGE_ROWS
from ._tokenizer import RESERVED_TOKEN_IDS

BEFORE, AFTER = (17, 301, 64, 222), (90, 410, 33, 127, 65)  # the text around the image
Tensors = dict[str, torch.Tensor]


def tiny_image_inputs(model: nn.Module, *, seed: int = 0, ids: tuple[int, ...] = ()) -> Tensors:
    """A prompt with one image for a `tiny_model`: what the model's processor would give for random pixels.

    Args:
        model: A model of `image_model_types()`, as `tiny_model(model_type, images=True)` builds it.
        seed: Of the pixels. The same seed gives the same pixels.
        ids: Token ids to put after the image, in place of the default ones.

    Returns:
        Keywords of the model's forward: `input_ids` `[1, seq]` with the image's tokens in the middle, `attention_mask`,
        the pixels, and what else the forward needs to place them. On the CPU, floats in the model's dtype.

    Example:
        llava = testing.tiny_model("llava", images=True)
        with torch.no_grad():
            logits = llava(**testing.tiny_image_inputs(llava)).logits  # [1, seq, vocab]
    """
    row = IMAGE_ROWS.get(_type_of(model), {})
    generator = torch.Generator().manual_seed(seed)
    names = inspect.signature(model.forward).parameters
    pixels = _FORMS[row.get("form") or _form(names)](_Vision.of(model, row), row, generator)
    dtype = next(model.parameters()).dtype
    pixels = {name: x.to(dtype) if x.is_floating_point() else x for name, x in pixels.items()}
    for name, extra in row.get("extra", {}).items():
        pixels[name] = extra(pixels)
    tokens = _image_tokens(model, row, pixels)
    after = ids or AFTER
    input_ids = torch.tensor([[*BEFORE, *tokens, *after]])
    inside = torch.tensor([[0] * len(BEFORE) + [1] * len(tokens) + [0] * len(after)])
    made = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}
    for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask"):
        if name in names and name not in row.get("without", ()):
            made[name] = inside.bool() if name == "image_embeds_position_mask" else inside
    return made


def _type_of(model: nn.Module) -> str:
    return model.config.model_type  # type: ignore[union-attr,return-value]


class _Vision:
    """Sizes of a model's images: of the tower's configuration, or what the row of the model type says."""

    def __init__(self, channels: int, size: int, patch: int, frames: int, merge: int) -> None:
        self.channels, self.size, self.patch, self.frames, self.merge = channels, size, patch, frames, merge

    @classmethod
    def of(cls, model: nn.Module, row: Mapping[str, Any]) -> _Vision:
        config: Any = model.config
        tower = getattr(config, "vision_config", None) or config

        def stated(default: int, *names: str) -> int:
            for owner in (row, tower, config):
                for name in names:
                    value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
                    if isinstance(value, (list, tuple)) and value:
                        value = value[0]
                    if isinstance(value, int) and not isinstance(value, bool):
                        return value
            return default

        return cls(
            stated(3, "num_channels", "in_channels", "in_chans"),
            stated(32, "image_size"),
            stated(16, "patch_size", "spatial_patch_size"),
            stated(1, "temporal_patch_size", "patch_temporal"),
            stated(1, "spatial_merge_size", "merge_size"),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image that is no square."""
        return 2 * self.merge, 3 * self.merge


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _square(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """One image, `[1, channels, height, width]`."""
    return {"pixel_values": _noise(generator, 1, vision.channels, vision.size, vision.size)}


def _sized(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """One image, with its height and width."""
    return {**_square(vision, row, generator), "image_sizes": torch.tensor([[vision.size, vision.size]])}


def _tiled(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """An image cut into tiles, with the whole of it in front, and its height and width."""
    tiles = row.get("tiles", 2)
    pixels = _noise(generator, 1, tiles, vision.channels, vision.size, vision.size)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([row.get("shape", [vision.size, vision.size])])}


def _several(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """A prompt's images with an axis for their number."""
    return {"pixel_values": _noise(generator, 1, 1, vision.channels, vision.size, vision.size)}


def _patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """All patches of all images in one list, with the grid that they make."""
    height, width = vision.grid
    size = vision.channels * vision.frames * vision.patch**2
    pixels = _noise(generator, height * width, size)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def _square_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """As `_patches`, each patch `[channels, height, width]`."""
    height, width = 4, 6
    pixels = _noise(generator, height * width, vision.channels, vision.patch, vision.patch)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def _placed_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches with a batch, each with its column and row."""
    side = row.get("side", 6)
    size = vision.channels * vision.patch**2
    places = torch.tensor([[(i % side, i // side) for i in range(side * side)]])
    return {"pixel_values": _noise(generator, 1, side * side, size).sigmoid(), "image_position_ids": places}


def _shaped_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches with a batch, with the shape of the image and a mask."""
    height, width = 4, 6
    pixels = _noise(generator, 1, height * width, vision.channels * vision.patch**2)
    mask = torch.ones(1, height * width, dtype=torch.long)
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor([[height, width]]), "pixel_attention_mask": mask}


def _two_resolutions(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """One image, small and large."""
    high = _noise(generator, 1, vision.channels, vision.size, vision.size)
    return {**_square(vision, row, generator), "high_res_pixel_values": high}


def _listed_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches of an image, with a batch."""
    return {"image_patches": _noise(generator, 1, 6, vision.channels * vision.patch**2)}


def _grid(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """All patches in one list, with their rows and columns."""
    pixels = _noise(generator, 24, vision.channels * vision.patch**2)
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor([[4, 6]])}


def _frames(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches `[patches, frames, height, width, channels]`."""
    return {"pixel_values": _noise(generator, 5, row["frames"], vision.patch, vision.patch, vision.channels)}


def _row_of_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches side by side, `[1, channels, patch, patches * patch]`."""
    pixels = _noise(generator, 1, vision.channels, vision.patch, 32 * vision.patch)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[4, 8]], dtype=torch.int32)}


def _merged_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """As `_patches`, with how many patches are merged."""
    pixels = _noise(generator, 24, vision.channels * vision.patch**2)
    return {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "image_merge_sizes": torch.tensor([2]),
    }


def _blocks(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Blocks of patches that are merged, `[blocks, height, width, channels]`, with the grid that they make."""
    side = vision.merge * vision.patch
    return {
        "pixel_values": _noise(generator, 6, side, side, vision.channels),
        "image_grid_thw": torch.tensor([[1, 2, 3]]),
    }


def _flattened_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches with a batch, each with its row and column in front."""
    places = torch.tensor([[(i // 3 + 1, i % 3 + 1) for i in range(12)]])
    pixels = _noise(generator, 1, 12, vision.channels * vision.patch**2)
    return {"flattened_patches": torch.cat([places.to(pixels.dtype), pixels], -1)}


def _attended_tiles(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Tiles of an image that layers attend to, `[1, images, tiles, channels, height, width]`."""
    tiles = _noise(generator, 1, 1, 4, vision.channels, vision.size, vision.size)
    tiles[:, :, 2:] = 0  # padding: the image has two tiles
    return {
        "pixel_values": tiles,
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
    }


def _pooled_patches(vision: _Vision, row: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Patches of one crop, and for each token of the image the patches that are pooled into it."""
    side = vision.size // vision.patch
    places = torch.arange(side * side).reshape(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    return {
        "pixel_values": _noise(generator, 1, side * side, vision.channels * vision.patch**2),
        "image_token_pooling": places,
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


_FORMS: dict[str, Callable[[_Vision, Mapping[str, Any], torch.Generator], Tensors]] = {
    "square": _square,
    "sized": _sized,
    "tiled": _tiled,
    "several": _several,
    "patches": _patches,
    "square patches": _square_patches,
    "placed patches": _placed_patches,
    "shaped patches": _shaped_patches,
    "two resolutions": _two_resolutions,
    "listed patches": _listed_patches,
    "grid": _grid,
    "frames": _frames,
    "blocks": _blocks,
    "flattened patches": _flattened_patches,
    "row of patches": _row_of_patches,
    "merged patches": _merged_patches,
    "attended tiles": _attended_tiles,
    "pooled patches": _pooled_patches,
}


def _form(names: Mapping[str, Any]) -> str:
    """The form that the arguments of a forward tell."""
    for name, form in (
        ("image_grid_thw", "patches"),
        ("image_position_ids", "placed patches"),
        ("spatial_shapes", "shaped patches"),
        ("pixel_attention_mask", "several"),
        ("image_sizes", "sized"),
    ):
        if name in names:
            return form
    return "square"


def _image_tokens(model: nn.Module, row: Mapping[str, Any], pixels: Tensors) -> list[int]:
    """The tokens at which the model puts an image: as many as the features that it makes of these pixels."""
    number = row.get("tokens")
    if number is None:
        number = _number_of_features(model, pixels)
    if number is None or number == 0:
        return []
    config: Any = model.config
    named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index", "image_patch_id"))
    token = next((i for i in named if isinstance(i, int)), RESERVED_TOKEN_IDS["image"])
    return [token] * number


def _number_of_features(model: nn.Module, pixels: Tensors) -> int | None:
    """How many positions the features of an image fill; None if the model has no function that makes them."""
    owner = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_image_features")), None)
    if owner is None:
        return None
    make: Any = owner.get_image_features
    takes = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    given = {name: x for name, x in pixels.items() if name in takes or open_ended}
    with torch.no_grad():
        made = make(**given)
    features = made if isinstance(made, (torch.Tensor, list, tuple)) else getattr(made, "pooler_output", None)
    if features is None:  # one set of features for each of several layers
        features = made.deepstack_features[0][1]
    width = model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    return _rows(features, width)


def _rows(features: Any, width: int) -> int:
    """Vectors of a width in a tensor, or in nested lists of them."""
    if isinstance(features, torch.Tensor):
        return math.prod(features.shape[:-1]) if features.shape[-1] == width else features.numel() // width
    return sum(_rows(part, width) for part in features)
