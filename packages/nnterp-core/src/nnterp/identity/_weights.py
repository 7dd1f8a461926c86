"""A checksum of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nnterp.identity._checkpoint import Checkpoint
from nnterp.identity._mapped import places_in_files

_WORDS = 1024  # numbers of 8 bytes of each tensor that are hashed themselves
_BLOCK = 127  # words that are added up; a prime, so that blocks do not end where rows of matrices do
_BLOCKS = 512  # that are multiplied at once; more do not stay in a processor's cache
_BLOCKS_ELSEWHERE = 1 << 15  # on other devices, where starting a computation costs more than memory


def checksum(module: nn.Module) -> str:
    """Return a checksum of the parameters and persistent buffers of a module, 16 hexadecimal digits.

    It holds the name, shape and dtype of each tensor, the sum of its bits as 64-bit integers, and numbers sampled at
    equal distances, which tell apart tensors with the same numbers in another order. The cost is one read of the
    weights; offloaded ones are read from where they are kept. Of a tensor without numbers (on the meta device) only
    name, shape and dtype count. Buffers that are not saved with the model are left out, because they may differ between
    devices in their last bit.
    """
    named = (*module.named_parameters(), *_persistent_buffers(module))
    return checksum_of_tensors((name, _with_numbers(module, name, tensor)) for name, tensor in named)


def checksum_of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the checksum of named tensors; see `checksum`."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        for plain in _plain_tensors(tensor.detach()):
            if plain.numel() and not plain.is_meta and not plain.is_quantized:
                digest.update(_words(plain).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _with_numbers(root: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a module; if accelerate has offloaded it, what would be brought in."""
    path, _, own = name.rpartition(".")
    hook = getattr(root.get_submodule(path), "_hf_hook", None) if tensor.is_meta else None
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None and own in kept:
            return kept[own].to(tensor.dtype)
    return tensor


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensor, or the tensors that a subclass (a quantised or a distributed one) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in _plain_tensors(getattr(tensor, name))]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's bits and samples of them, a 1-d int64 tensor on its device."""
    words, rest = _bits(tensor.to_dense() if tensor.layout != torch.strided else tensor)
    step = max(1, len(words) // _WORDS)
    return torch.cat((words.sum().view(1), words[::step], rest.to(torch.int64)))


def digest_of_weights(named: Iterable[tuple[str, torch.Tensor]], files: Checkpoint) -> str:
    """Return a digest of the names, shapes, dtypes and numbers of tensors, 16 hexadecimal digits.

    Of a tensor whose memory is known to be still what a file holds, the place in the file and the digest of the files
    stand for the numbers. Of others it holds a sum of the bits of every 127 words of 8 bytes, as 64-bit integers, each
    word times an odd factor of its own, so that a number that changes, or numbers that change places, change the
    digest; the cost is one read.

    Args:
        named: The tensors.
        files: What they were loaded from.
    """
    tensors = list(named)
    places = places_in_files((tensor for _, tensor in tensors), files)
    if any(places) and not files.unchanged():
        places = [""] * len(tensors)
    found = hashlib.sha256(files.digest.encode() if any(places) else b"")
    for (name, tensor), place in zip(tensors, places, strict=True):
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype} {place};".encode())
        if not place:
            _add_bits(found, tensor.detach())
    return found.hexdigest()[:16]


def _add_bits(found: Any, tensor: torch.Tensor) -> None:
    words, rest = _bits(tensor)
    whole, on_cpu = len(words) - len(words) % _BLOCK, words.device.type == "cpu"
    factors = torch.arange(1, 2 * _BLOCK, 2, device=words.device)
    some = (own.view(-1, _BLOCK) for own in words[:whole].split(_BLOCK * (_BLOCKS if on_cpu else _BLOCKS_ELSEWHERE)))
    # a product of integer matrices is the faster of the two, and only a CPU has it
    sums = [own.mv(factors) if on_cpu else (own * factors).sum(1) for own in some]
    found.update(torch.cat((*sums, words[whole:])).cpu().numpy().tobytes())
    found.update(rest.cpu().numpy().tobytes())


def _bits(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor's bits: whole words of 8 bytes as int64, and the bytes that are left; 1-d, on its device."""
    data = tensor.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    whole = len(data) - len(data) % 8
    words = data[:whole]
    return (words.clone() if words.storage_offset() % 8 else words).view(torch.int64), data[whole:]
