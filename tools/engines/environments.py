"""The engines that are compared, and the environment that each gets: `FOLDER/environments/NAME`, made by uv."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = "3.11"
NEWEST = "2026-11-15T00:00:00Z"
SAME = ("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "safetensors==0.8.0")


@dataclass(frozen=True)
class Engine:
    """One engine: the name of its adapter, its name on the page, what is installed for it."""

    adapter: str
    title: str
    packages: tuple[str, ...]
    how: str


ENGINES = (
    Engine(
        "nnterp_2",
        "nnterp 2 (this repository)",
        ("nnsight==0.8.1", str(ROOT / "packages" / "nnterp-core")),
        "`StandardizedTransformer(folder)`, with `enable_attention_probs=True` for attention probabilities; traces.",
    ),
    Engine(
        "nnterp_1",
        "nnterp 1.3.0, nnsight 0.7.0",
        ("nnterp==1.3.0", "nnsight==0.7.0"),
        "The same calls of the original. It does not import with nnsight 0.8. It has no name for one head's output.",
    ),
    Engine(
        "transformerlens",
        "TransformerLens 4.3.0",
        ("transformer-lens==4.3.0",),
        "`TransformerBridge.boot_transformers(folder)`, `run_with_cache`, `run_with_hooks`, `logit_lens`, "
        "`attention_mask=` for the padded batch. `HookedTransformer` is no more since 4.0.",
    ),
    Engine(
        "interp_engine_eager",
        "interp-engine 1.14.2",
        ("interp-engine==1.14.2",),
        '`load_model(folder, backend="eager")`, `capture` with `attention_mask=`, `decode_residuals`, `steer`; a head '
        "by `HookManager` at the point `z`. Its backends in vLLM need a GPU and are not compared.",
    ),
    Engine(
        "hooks",
        "plain hooks",
        (),
        "`AutoModelForCausalLM` and torch hooks, as written for the module names of Llama: `model.model.layers[i]`, "
        "`model.lm_head(model.model.norm(stream))`, `output_attentions=True`, the batch with its attention mask.",
    ),
)
REFERENCE, CHECKPOINTS = "hooks", "nnterp_2"  # whose environments make the reference and the checkpoints
BY_ADAPTER = {engine.adapter: engine for engine in ENGINES}


def python_of(folder: Path, adapter: str) -> Path:
    """The interpreter of an engine's environment."""
    return folder / "environments" / adapter / "bin" / "python"


def set_up(folder: Path, engine: Engine) -> str:
    """Make an engine's environment. Returns why it could not be made, "" if it could."""
    where = folder / "environments" / engine.adapter
    install = ["uv", "pip", "install", "--quiet", "--python", str(where / "bin" / "python")]
    make = ["uv", "venv", "--quiet", "--clear", "--python", PYTHON, str(where)]
    for command in (make, [*install, "--exclude-newer", NEWEST, *SAME, *engine.packages]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip()[-600:]
    return ""
