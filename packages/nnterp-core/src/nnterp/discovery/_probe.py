"""A short prompt of random tokens, and running the plain module on it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn

from nnterp.anatomy import Anatomy
from nnterp.devices import input_device
from nnterp.discovery._recording import Recording, record
from nnterp.huggingface import dtype_of, input_embedding, is_encoder_decoder, uncached

ROWS = 2
LENGTH = 11  # a prime, so that no product of heads and widths is mistaken for it
VOCABULARY = 4096  # probe tokens have smaller ids than this


def probe_ids(
    module: nn.Module, vocab_size: int | None, rows: int, length: int, seed: int = 0, avoid: Iterable[int] = ()
) -> torch.Tensor:
    """Random token ids without special tokens; the same on every machine.

    Args:
        module: The HuggingFace module.
        vocab_size: Size of its vocabulary; read from the embedding if None.
        rows, length: Shape of the result.
        seed: Of the random numbers.
        avoid: Further special ids; those that the config names are left out anyway.

    Returns:
        `[rows, length]`, int64, on the device that the model takes inputs on.
    """
    embedding: Any = input_embedding(module)
    embedded = VOCABULARY if embedding is None else embedding.weight.shape[0]
    vocabulary = min(embedded, vocab_size or embedded, VOCABULARY)
    special = {*avoid, *_special_ids(module.config)}
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (rows, length), generator=generator)].to(input_device(module))


def model_inputs(module: nn.Module, ids: torch.Tensor, avoid: Iterable[int] = ()) -> dict[str, torch.Tensor]:
    """What a model is given for the tokens that nnterp follows: `input_ids` for nearly all.

    In an encoder-decoder model these are the decoder's, and the encoder is given random tokens (or random sounds), the
    same in every row.

    Args:
        module: The HuggingFace module.
        ids: `[rows, seq]`.
        avoid: Special ids that the encoder is not given.
    """
    if not is_encoder_decoder(module):
        return {"input_ids": ids}
    name = getattr(module, "main_input_name", "input_ids")
    rows = ids.shape[0]
    if name == "input_ids":
        heard = probe_ids(module, None, 1, LENGTH, 7, avoid).to(ids.device)
    else:
        heard = _sounds(module.config).to(ids.device, dtype_of(module))
    return {name: heard.expand(rows, *heard.shape[1:]), "decoder_input_ids": ids}


def _sounds(config: Any) -> torch.Tensor:
    """Random log-mel features `[1, bins, frames]`, as many frames as Whisper's encoder takes.

    Raises:
        ValueError: The config does not say how many that are.
    """
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        raise ValueError(f"what the encoder of a {getattr(config, 'model_type', 'model')} hears has no known shape")
    return torch.randn((1, bins, 2 * positions), generator=torch.Generator().manual_seed(7))


def _special_ids(config: Any) -> set[int]:
    """Ids of the special tokens that a config names (`eos_token_id`, `image_token_index`, ...)."""
    owners = [owner for owner in (config, getattr(config, "text_config", None)) if owner is not None]
    named = (
        value for owner in owners for name, value in vars(owner).items() if name.endswith(("token_id", "token_index"))
    )
    return {value for value in named if isinstance(value, int)}


def rounding_of(module: nn.Module) -> float:
    """Relative size of a rounding error in the dtype that a model computes in."""
    dtype = dtype_of(module)
    return torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps


class Probe:
    """A short prompt for the plain module of a model whose layers are known.

    Args:
        module: The HuggingFace module.
        anatomy: Which module of it plays which part.
        repeated: Modules that run more than once in a forward pass.
        shape: Rows and tokens of the prompt.
    """

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        repeated: Container[str] = (),
        shape: tuple[int, int] = (ROWS, LENGTH),
    ) -> None:
        self.module, self.anatomy, self.repeated = module, anatomy, repeated
        self.tolerance = max(1e-5, 8 * rounding_of(module))
        self.ids = probe_ids(module, anatomy.sizes.vocab_size, *shape, seed=3)
        self.inputs: dict[str, Any] = {**model_inputs(module, self.ids), **uncached(module)}

    def record(self, until: str | None = None, **options: Any) -> Recording:
        """Run the module with `run(until)` and record it; `options` are those of `record`."""
        looped = dict.fromkeys(layer.path for layer in self.anatomy.blocks if layer.turns > 1)
        return record(self.module, lambda: self.run(until), looped=looped, **options)

    def run(self, until: str | None = None) -> None:
        """Run one forward pass that stops after the layer at `until`, by default the last.

        The pass does not stop early if the module of that layer runs several times.
        """
        layers = self.anatomy.blocks
        path = layers[-1].path if until is None else until
        last = self.module.get_submodule(path)
        once = sum(self.module.get_submodule(layer.path) is last for layer in layers) == 1
        if not once or path in self.repeated:
            self.module(**self.inputs)
            return

        def stop(*_: Any) -> None:
            raise _LastLayer

        handle = last.register_forward_hook(stop)
        try:
            self.module(**self.inputs)
        except _LastLayer:
            pass
        finally:
            handle.remove()

    def layers_modules(self) -> list[str]:
        """Paths of the layers and of all modules in them."""
        return [
            f"{layer.path}.{name}" if name else layer.path
            for layer in self.anatomy.blocks
            for name, _ in self.module.get_submodule(layer.path).named_modules()
        ]


class _LastLayer(Exception):
    """Raised to stop a forward pass after the layer it should reach."""
