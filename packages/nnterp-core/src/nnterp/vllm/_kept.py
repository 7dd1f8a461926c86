"""Proofs of models in vLLM, kept on disk in the same folder as the other proofs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.certificate import Certificate, Line
from nnterp.files import read_tensors, write_tensors
from nnterp.identity import checkpoint_of, code_digest, digest
from nnterp.proofs import folder
from nnterp.versions import version_of

if TYPE_CHECKING:
    from nnterp.vllm._engine import TracedVLLM

KIND = "proof of a model in vLLM"
_DISTRIBUTIONS = ("nnterp-core", "nnsight", "transformers", "torch")


def versions() -> dict[str, str]:
    """Versions that the numbers depend on."""
    import vllm

    return {**{name: version_of(name) for name in _DISTRIBUTIONS}, "vllm": vllm.__version__}


def key_of(model: TracedVLLM) -> str:
    """Digest of what a proof depends on: the checkpoint's files, code, places, settings, versions and device.

    "" if the files cannot be told; then no proof is kept.
    """
    files = checkpoint_of(model.repo, model.dispatch_options).digest
    if not files:
        return ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    places = {name: [str(found) for found in mine] for name, mine in model.structure.layers.items()}
    whole = {name: str(found) for name, found in model.structure.whole.items()}
    settings = sorted((name, repr(value)) for name, value in model.dispatch_options.items())
    code = code_digest(model._module)
    return digest((os.path.abspath(model.repo), files, code, places, whole, settings, versions(), device))


def keep(model: TracedVLLM, certificate: Certificate, failed: list[tuple[str, int | None, str]]) -> None:
    """Write a proof to disk. An `OSError` is ignored: the model is then proven again next time."""
    path = _path(model)
    if path is not None:
        record = {"certificate": asdict(certificate), "failed": failed, "proven": sorted(model.proven)}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_tensors(path, {"none": torch.zeros(1)}, record, KIND)


def recall(model: TracedVLLM) -> bool:
    """Read the proof of exactly this model from disk into it; False if there is none."""
    path = _path(model)
    try:
        if path is None or path.stat().st_uid != os.getuid():
            return False
        record: dict[str, Any] = read_tensors(path, KIND)[1]
    except (OSError, ValueError):
        return False
    for name, layer, reason in record["failed"]:
        model.served = model.served.without(name, layer, reason)
    own = {**record["certificate"], "lines": tuple(Line(**line) for line in record["certificate"]["lines"])}
    model.proven, model.certificate = frozenset(record["proven"]), Certificate(**own)
    return True


def _path(model: TracedVLLM) -> Path | None:
    where, key = folder(), key_of(model)
    return where / "vllm" / f"{key}.safetensors" if where is not None and key else None
