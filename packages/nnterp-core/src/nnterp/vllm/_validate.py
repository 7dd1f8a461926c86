"""Compare the values of a model in vLLM with HuggingFace's model of the same checkpoint, run in another process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.certificate import Certificate, Line
from nnterp.collection import Collected
from nnterp.table import VALUES
from nnterp.vllm._collect import collect
from nnterp.vllm._kept import keep, versions

if TYPE_CHECKING:
    from nnterp.vllm._engine import TracedVLLM

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PROMPTS, LENGTH, NEW = 3, 9, 6

# A process of its own: once vLLM's Transformers backend ran, transformers loads no model of the same class.
_REFERENCE = """
import json, sys, torch
from transformers import GenerationConfig
from nnterp import StandardizedTransformer
from nnterp.errors import Unavailable

job = json.loads(sys.argv[1])
model = StandardizedTransformer(job["model"], dtype=getattr(torch, job["dtype"]), device_map="cpu", **job["options"])
there = []
for name, layers in job["values"].items():
    for layer in layers:
        try:
            model.place(name, layer)
            there.append(name if layer is None else f"{name}[{layer}]")
        except Unavailable:
            pass
model.collect(job["prompts"], [*there, "logits", "next_token_probs"]).save(job["out"])
new = []
model._module.generation_config = GenerationConfig()  # no end token and no penalties
with torch.no_grad():
    for ids in job["prompts"]:
        given = torch.tensor([ids])
        out = model._module.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=job["new"],
                                     do_sample=False, pad_token_id=0)
        new.append(out[0, len(ids):].tolist())
print("tokens:" + json.dumps(new))
"""


def validate(model: TracedVLLM, tolerance: float | None) -> Certificate:
    """See `StandardizedVLLM.validate`."""
    if model._installed_edits:
        raise RuntimeError("validate() proves the model as it is: leave the steering, or clear the edits, first.")
    began = time.perf_counter()
    model._warned = True
    model.dispatch()
    config = model.vllm_entrypoint.llm_engine.vllm_config.model_config
    allowed = TOLERANCE.get(config.dtype, 1e-1) if tolerance is None else tolerance
    prompts = probe(config.get_vocab_size())
    model.served = model.structure
    values: dict[str, list[int | None]] = {
        **{name: [None] for name, found in model.served.whole.items() if not isinstance(found, str)},
        **{name: list(mine) for name in model.served.layers if (mine := model.served.having(name))},
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reference.safetensors"
        job = {
            "model": model.repo,
            "dtype": str(config.dtype).removeprefix("torch."),
            "options": {k: model.dispatch_options[k] for k in ("revision",) if k in model.dispatch_options},
            "values": values,
            "prompts": prompts,
            "out": str(out),
            "new": NEW,
        }
        tokens = _reference(job)
        reference = Collected.load(out)
    lines, proven, refused = [], set(), []
    outputs: dict[str, list[int | None]] = {"logits": [None], "next_token_probs": [None]}
    for name, layers in {**values, **outputs}.items():
        line, failed = _line(model, name, layers, prompts, reference, allowed)
        lines.append(line)
        for layer, error in failed.items():
            reason = f"it differs from HuggingFace's by {error:.2g} of its size, above {allowed:.2g}"
            if name in values:
                refused.append((name, layer, reason))
                model.served = model.served.without(name, layer, reason)
        if line.status == "passed":
            proven.add(name)
    lines.append(_greedy(model, prompts, tokens))
    model.proven = frozenset(proven)
    model.certificate = Certificate(
        model.repo,
        model.dispatch_options.get("revision"),
        f"vLLM's {model.model_class}",
        job["dtype"],  # type: ignore[arg-type]
        str(model.vllm_entrypoint.llm_engine.vllm_config.device_config.device),
        versions(),
        tuple(lines),
        time.perf_counter() - began,
    )
    keep(model, model.certificate, refused)
    return model.certificate


def probe(vocabulary: int) -> list[list[int]]:
    """`PROMPTS` prompts of random token ids, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocabulary, (LENGTH - 2 * i,), generator=generator).tolist() for i in range(PROMPTS)]


def _reference(job: dict[str, Any]) -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE, json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"HuggingFace's model of {job['model']} could not be run:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.rpartition("tokens:")[2])


def _line(
    model: TracedVLLM, name: str, layers: list[int | None], prompts: Any, reference: Collected, allowed: float
) -> tuple[Line, dict[int | None, float]]:
    """The line of one value, and the layers that failed, each with its relative error."""
    claim = f"{name} equals HuggingFace's"
    there = [layer for layer in layers if (name if layer is None else (name, layer)) in reference]
    if not there:
        return Line(claim, "skipped", detail="HuggingFace's model does not prove this value"), {}
    try:
        ours = collect(model, prompts, name)
    except (OutOfOrderError, RuntimeError, TypeError) as error:
        everywhere: dict[int | None, float] = dict.fromkeys(layers, float("inf"))
        return Line(claim, "failed", detail=f"it could not be read: {error}"), everywhere
    compared: dict[int | None, float] = {}
    for layer in there:
        key: Any = name if layer is None else (name, layer)
        mine, theirs = ours[key].double(), reference[key].double()
        same = mine.shape == theirs.shape
        compared[layer] = float((mine - theirs).abs().max() / theirs.abs().max()) if same else float("inf")
    failed = {layer: error for layer, error in compared.items() if not error <= allowed}
    missing = [layer for layer in layers if layer not in compared]
    detail = f"not compared on layers {missing}" if missing else ""
    if failed:
        detail = f"layers {list(failed)} are served no more" if name in VALUES else "it is wrong"
    status = "failed" if failed else "skipped" if missing else "passed"
    return Line(claim, status, max(compared.values()), allowed, detail), failed  # type: ignore[arg-type]


def _greedy(model: TracedVLLM, prompts: list[list[int]], tokens: list[list[int]]) -> Line:
    outputs = model.run(prompts, NEW, ignore_eos=True)
    equal = [list(output.outputs[0].token_ids) == mine for output, mine in zip(outputs, tokens, strict=True)]
    claim = f"{NEW} greedy tokens are those of HuggingFace's generate"
    return Line(claim, "passed" if all(equal) else "failed", detail="" if all(equal) else f"equal: {equal}")
