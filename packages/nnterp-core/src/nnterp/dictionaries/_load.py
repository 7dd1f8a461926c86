"""`load_dictionary` and `load_transcoders`: what others have published, brought to one form."""

from __future__ import annotations

import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nnterp.arguments import check_dtype, device_of, path_of
from nnterp.dictionaries import _circuit_tracer, _gemma, _openmoss, _saelens, _sparsify
from nnterp.dictionaries._files import read_settings
from nnterp.dictionaries._hub import downloaded
from nnterp.dictionaries._sites import site_of_hook
from nnterp.record import replace
from nnterp.traced import CrossLayerTranscoder, Dictionary

_ONE = (
    *("cfg.json", "config.json", "hyperparams.json", "config.yaml"),
    *("sae_weights.safetensors", "sae.safetensors", "params.npz", "params.safetensors"),
    *_openmoss.WEIGHTS[1:],
)
_LAYERS = ("config.yaml", "layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors")
KNOWN = (
    "cfg.json with sae_weights.safetensors (SAELens), cfg.json with sae.safetensors (sparsify), params.npz "
    "(Gemma Scope), config.json with params.safetensors (Gemma Scope 2), hyperparams.json or config.json with "
    "checkpoints/final.safetensors or sae_weights.safetensors (Llama Scope), layer_5.safetensors (circuit-tracer)"
)


def load_dictionary(
    source: str | PathLike[str],
    path: str = "",
    *,
    revision: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    average_norm: float | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Dictionary:
    """Load a published sparse autoencoder or transcoder from a folder, a file, or the Hugging Face hub.

    Reads weights and settings only, nothing that could hold code: the formats of SAELens, Gemma Scope 1 and 2, Llama
    Scope (OpenMOSS), EleutherAI's sparsify, and the layers of circuit-tracer's transcoders. If a dictionary was trained
    on activations scaled by a constant, the constant is folded into its weights, so that it takes unscaled activations.

    Args:
        source: A folder, a file (`layer_5.safetensors`, `params.npz`), or a repository, `owner/name`.
        path: The folder or file within `source`.
        revision: Branch, tag or commit of a repository. Give a commit to read the same numbers later.
        reads: The value that it encodes, such as `"layers_output[12]"` or `"blocks.12.hook_resid_post"`, where the
            files do not say, or name something that is not a value of nnterp.
        writes: The value that it decodes to.
        average_norm: The mean norm of the activations that it was trained on. Needed where they were divided by it and
            the files do not hold it.
        device: Where its tensors are put.
        dtype: Their dtype; None keeps that of the file.

    Returns:
        A `Dictionary` with an encoder `[features, width]` and a decoder `[features, output width]`, on `device`, in
        `dtype`. Its `source` says where it is from, with the commit.

    Raises:
        FileNotFoundError: There is no such file, folder, repository or revision, or it cannot be reached and is not in
            the hub's cache.
        ValueError: The files are damaged, of a format or architecture that is not read, or hold several dictionaries;
            or `device` is not there.
        TypeError: `dtype` is no torch dtype, or `device` no device.

    Example:
        nnterp.save_dictionary(nnterp.toy_dictionary("residual_4"), "folder", model)
        dictionary = nnterp.load_dictionary("folder")  # or a hub id, with the path in the repository
    """
    check_dtype(dtype)
    target = device_of(device)
    at, name = _found(source, path, revision, _ONE)
    found = _read(at, name, average_norm)
    if reads is not None or writes is not None:
        encodes = _site(reads, "reads") or found.reads
        decodes = _site(writes, "writes") or (found.writes if found.is_transcoder else encodes)
        found = replace(found, reads=encodes, writes=decodes)
    found = replace(found, source=name)
    return found.to(target) if dtype is None else found.to(target, dtype)


def load_transcoders(
    source: str | PathLike[str],
    path: str = "",
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> dict[int, Dictionary] | CrossLayerTranscoder:
    """Load the transcoders of all layers, in circuit-tracer's format, from a folder or the Hugging Face hub.

    Args:
        source: A folder, or a repository, `owner/name`. It holds `config.yaml`, and `layer_0.safetensors`, ..., or
            `W_enc_0.safetensors` and `W_dec_0.safetensors`, ... (a cross-layer transcoder).
        path: A folder within it.
        revision: As in `load_dictionary`.
        device: Where the tensors are put.
        dtype: Their dtype; None keeps that of the files, which the operating system then reads when they are used.

    Returns:
        Layer → `Dictionary`, or a `CrossLayerTranscoder`, on `device`, in `dtype`.

    Raises:
        FileNotFoundError, ValueError, TypeError: As `load_dictionary`. A `config.yaml` that lists files of other
            repositories is a ValueError: load each with `load_dictionary`.

    Example:
        transcoders = nnterp.load_transcoders("mntss/clt-gemma-2-2b-426k")
    """
    check_dtype(dtype)
    target = device_of(device)
    at, name = _found(source, path, revision, _LAYERS)
    if not at.is_dir():
        raise ValueError(f"{at} is a file; a folder with the transcoders of all layers was expected.")
    listed = read_settings(at / "config.yaml").get("transcoders") if (at / "config.yaml").is_file() else None
    files = {int(m[1]): p for p in at.iterdir() if (m := re.fullmatch(r"layer_(\d+)\.safetensors", p.name))}
    if listed and not files:
        raise ValueError(
            f"{at / 'config.yaml'} lists {len(listed)} files of other places, such as {str(listed[0])!r:.100}. Load "
            "each with load_dictionary()."
        )
    if (at / "W_enc_0.safetensors").is_file():
        crossed = _circuit_tracer.read_cross_layer(at, name)
        return crossed.to(target) if dtype is None else crossed.to(target, dtype)
    if not files:
        raise _unknown(at)
    found = {layer: _circuit_tracer.read_layer(files[layer], f"{name}/{files[layer].name}") for layer in sorted(files)}
    return {layer: d.to(target) if dtype is None else d.to(target, dtype) for layer, d in found.items()}


def _found(source: str | PathLike[str], path: str, revision: str | None, names: tuple[str, ...]) -> tuple[Path, str]:
    """The folder or file, and what it is called."""
    here = path_of(source, "source")
    if here.exists():
        at = here / path if path else here
        if not at.exists():
            raise FileNotFoundError(f"There is no {at}.")
        return at, str(at)
    inner = PurePosixPath(path)
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"path is a folder or file within the repository, not {path!r}.")
    repository = str(source)
    if len(Path(repository).parts) != 2 or repository.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no file or folder {repository}, and it is no owner/name on the hub.")
    alone = inner.suffix in (".safetensors", ".npz")
    folder = str(inner.parent if alone else inner)
    folder = "" if folder == "." else folder
    wanted = (inner.name, "config.yaml", "config.json") if alone else names
    at, commit = downloaded(repository, folder, wanted, revision)
    return (at / inner.name if alone else at), f"{repository}@{commit}/{path}".rstrip("/")


def _read(at: Path, name: str, average_norm: float | None) -> Dictionary:
    """The one dictionary of a file or folder.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is of no format that is known.
    """
    if at.is_dir():
        for marks, read in _READERS:
            if all(any((at / mark).is_file() for mark in either) for either in marks):
                return _saelens.read_saelens(at, average_norm) if read is None else read(at, name)
        raise _unknown(at)
    if not at.is_file():
        raise FileNotFoundError(f"There is no file {at}.")
    if at.suffix == ".npz":
        return _gemma.read_first(at, name)
    if at.name == _gemma.SECOND:
        return _gemma.read_second(at, name)
    if at.name in (_saelens.WEIGHTS, _sparsify.WEIGHTS):
        return _read(at.parent, str(PurePosixPath(name).parent), average_norm)
    if at.suffix == ".safetensors":
        return _circuit_tracer.read_layer(at, name)
    raise ValueError(
        f"{at} is not read: only safetensors and npz files are, because others can hold code. Known: {KNOWN}."
    )


_READERS: tuple[tuple[tuple[tuple[str, ...], ...], Callable[[Path, str], Dictionary] | None], ...] = (
    ((("cfg.json",), ("sae_weights.safetensors",)), None),
    ((("cfg.json",), ("sae.safetensors",)), _sparsify.read_sparsify),
    ((("params.npz",),), lambda at, name: _gemma.read_first(at / "params.npz", name)),
    ((("config.json",), ("params.safetensors",)), lambda at, name: _gemma.read_second(at / "params.safetensors", name)),
    ((("hyperparams.json", "config.json"), _openmoss.WEIGHTS), _openmoss.read_openmoss),
)


def _unknown(at: Path) -> ValueError:
    there = sorted(str(p.relative_to(at)) for p in at.iterdir())
    shown = f"It holds {', '.join(there[:12])}{', ...' if len(there) > 12 else ''}" if there else "It is empty"
    within = [p.name for p in at.iterdir() if p.is_dir()]
    hint = " Its folders may each hold one: give one of them as path." if within else ""
    whole = any(re.fullmatch(r"(layer_|W_enc_)\d+\.safetensors", name) for name in there)
    hint = " It holds transcoders of all layers: use load_transcoders()." if whole else hint
    return ValueError(f"{at} holds no dictionary of a known format. {shown}. Known: {KNOWN}.{hint}")


def _site(given: Any, name: str) -> str | None:
    if given is None:
        return None
    found = site_of_hook(given)
    if found is None:
        raise ValueError(f"{name} is a value with its layer, such as 'layers_output[12]', not {given!r:.60}.")
    return found
