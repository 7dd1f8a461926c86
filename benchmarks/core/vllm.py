"""Collecting and steered generation in vLLM, in tokens per second, beside plain vLLM and the eager model.

    .venv-vllm/bin/python benchmarks/core/vllm.py                # SmolLM2-135M's shape, random weights, one thread
    .venv-vllm/bin/python benchmarks/core/vllm.py --layers 6     # fewer of its layers
    .venv-vllm/bin/python benchmarks/core/vllm.py --model FOLDER # another checkpoint
    .venv-vllm/bin/python benchmarks/core/vllm.py --model FOLDER --name SmolLM2-135M --page docs/vllm.md

CPU time of one thread, the median of the rounds; on a GPU, wall time. All that is compared is measured in turns in
every round, and a ratio is that of one round. The eager model runs in a process of its own, and waits while vLLM runs.
With --page, the table replaces what stands on the page between `<!-- figures NAME -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# In place of this folder, in which this file would be taken for vLLM.
sys.path[0] = str(Path(__file__).resolve().parents[1])
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "NNTERP_CACHE": "off",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
COLLECTED, LENGTH, STEERED, START, NEW, BATCH = 512, 16, 64, 16, 32, 16
AIMS = {"steer": 1.15}  # of plain vLLM's time
BESIDE = {"collect": "plain one pass", "steer": "plain generation"}
WORDS = {
    "collect": f"last token of all layers, {COLLECTED} prompts × {LENGTH} tokens",
    "steer": f"steered at every step, {STEERED} prompts × {START} tokens, {NEW} new ones",
}


def ids(prompts: int, length: int) -> list[list[int]]:
    import torch

    return torch.randint(5, 500, (prompts, length), generator=torch.Generator().manual_seed(3)).tolist()


def checkpoint(folder: str, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nnterp.testing import tiny_tokenizer

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=49152)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def clock() -> float:
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def eager(folder: str) -> None:
    """Run "collect" or "steer" for each line that is read, and print how long it took."""
    import torch

    from nnterp import StandardizedTransformer

    torch.set_num_threads(1)
    model = StandardizedTransformer(folder, dtype=torch.float32 if not torch.cuda.is_available() else torch.bfloat16)
    vector = torch.randn(model.hidden_size)

    def collect(share: int = 1) -> None:
        many = ids(COLLECTED // share, LENGTH)
        model.collect(many, "layers_output", positions=-1, batch_size=BATCH, progress=False)

    def steer(share: int = 1) -> None:
        few = torch.tensor(ids(STEERED // share, START))
        with model.steering(vector, layers=[1, 2]):
            model.generate(
                few, max_new_tokens=NEW // share, min_new_tokens=NEW // share, do_sample=False, pad_token_id=0
            )

    runs = {"collect": collect, "steer": steer}
    for run in runs.values():
        run(16)
    print("ready", flush=True)
    for line in sys.stdin:
        began = clock()
        runs[line.strip()]()
        print(f"took {clock() - began}", flush=True)


def answer(child: subprocess.Popen) -> list[str]:
    """What the eager model's process prints next."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(("ready", "took")):
            return line.split()
    raise RuntimeError("The process of the eager model ended.")


def served(folder: str) -> dict[str, Callable[..., object]]:
    """What is run in vLLM, by name; `share` divides the number of prompts."""
    import torch

    from nnterp.vllm import StandardizedVLLM

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model = StandardizedVLLM(folder, dtype=dtype, max_model_len=128, max_num_seqs=STEERED)
    vector = torch.randn(model.hidden_size)

    def steered(share: int = 1) -> None:
        with model.steering(vector, layers=[1, 2]):
            generation(share)

    def generation(share: int = 1) -> None:
        model.run(ids(STEERED // share, START), NEW, ignore_eos=True)

    runs: dict[str, Callable[..., object]] = {
        "plain one pass": lambda share=1: model.run(ids(COLLECTED // share, LENGTH), 1),
        "collect": lambda share=1: model.collect(ids(COLLECTED // share, LENGTH), "layers_output", positions=-1),
        "plain generation": generation,
        "steer": steered,
    }
    for run in runs.values():
        run(16)
    return runs


def table(took: dict[str, list[float]]) -> list[str]:
    """Tokens per second, and ratios of the times of the same round, as a Markdown table."""
    tokens = {"collect": COLLECTED * LENGTH, "steer": STEERED * (START + NEW)}
    rows = [
        "| | tokens/s | time beside plain vLLM | aim | how much faster than the eager model |",
        "|---|---|---|---|---|",
    ]

    def beside(one: str, other: str) -> str:
        ratios = [a / b for a, b in zip(took[one], took[other], strict=True)]
        return f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} – {max(ratios):.2f})"

    for what, plain in BESIDE.items():
        speed = {
            name: f"{tokens[what] / statistics.median(took[name]):,.0f}" for name in (what, plain, f"eager {what}")
        }
        mine, theirs = (beside(f"eager {what}", one) for one in (what, plain))
        rows += [
            f"| **{WORDS[what]}** | | | | |",
            f"| nnterp in vLLM | {speed[what]} | {beside(what, plain)} | {AIMS.get(what, '')} | {mine} |",
            f"| plain vLLM, nothing read or steered | {speed[plain]} | | | {theirs} |",
            f"| nnterp, the eager model | {speed[f'eager {what}']} | | | |",
        ]
    return rows


def machine(rounds: int) -> str:
    """What the figures were measured with."""
    import torch
    from measuring import device_name

    from nnterp.vllm._kept import versions

    on = device_name(torch.device("cuda")) if torch.cuda.is_available() else device_name(torch.device("cpu"))
    how = "time of the clock" if torch.cuda.is_available() else "CPU time of one thread"
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{on}, {how}, median and spread of {rounds} rounds; {made}"


def write(page: Path, name: str, lines: list[str]) -> None:
    """Replace a table of the page."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- figures {name} -->\n", "<!-- end of figures -->"
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), flags=re.DOTALL)
    if len(place.findall(text)) != 1:
        raise SystemExit(
            f"{page} does not have one place for figures of {name}: write {begin.strip()} and {end} there."
        )
    new = begin + "\n" + "\n".join(lines) + "\n\n" + end
    page.write_text(place.sub(lambda _: new, text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a checkpoint, in place of random weights")
    parser.add_argument("--name", help="what the figures are called")
    parser.add_argument("--page", type=Path, help="the page whose table of this name is replaced")
    parser.add_argument("--eager", help="used by the program itself")
    given = parser.parse_args()
    if given.eager:
        eager(given.eager)
        return
    os.environ.update(SETTINGS)
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.model is None:
            checkpoint(folder, given.layers)
        command = [sys.executable, str(Path(__file__)), "--eager", given.model or folder]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer(child)
        runs = served(given.model or folder)
        for turn in range(given.rounds):
            for name, run in runs.items():
                began = clock()
                run()
                took.setdefault(name, []).append(clock() - began)
                if name in ("collect", "steer"):
                    assert child.stdin is not None
                    child.stdin.write(f"{name}\n")
                    child.stdin.flush()
                    took.setdefault(f"eager {name}", []).append(float(answer(child)[1]))
            print(f"round {turn + 1}:", {name: round(seconds[-1], 2) for name, seconds in took.items()}, flush=True)
        child.kill()
    name = given.name or (f"{given.layers} layers of SmolLM2-135M's shape" if given.model is None else given.model)
    lines = [f"{name}: {machine(given.rounds)}.", "", *table(took)]
    print("\n".join(lines))
    if given.page:
        write(given.page, name, lines)


if __name__ == "__main__":
    main()
