"""Collecting and steered generation in vLLM, in tokens per second, beside plain vLLM and the eager model.

    .venv-vllm/bin/python benchmarks/core/vllm.py                # SmolLM2-135M's shape, random weights, one thread
    .venv-vllm/bin/python benchmarks/core/vllm.py --layers 6     # fewer of its layers

CPU time of one thread, the least of the rounds; on a GPU, wall time. What is compared is measured in turns.
The eager model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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


def least(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, the least of some rounds after one that is not counted."""
    import torch

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = clock()
            run()
            if turn:
                best[name] = min(best[name], clock() - began)
    return best


def eager(folder: str, rounds: int) -> dict[str, float]:
    import torch

    from nnterp import StandardizedTransformer

    torch.set_num_threads(1)
    model = StandardizedTransformer(folder, dtype=torch.float32 if not torch.cuda.is_available() else torch.bfloat16)
    vector = torch.randn(model.hidden_size)
    many, few = ids(COLLECTED, LENGTH), torch.tensor(ids(STEERED, START))

    def steered() -> None:
        with model.steering(vector, layers=[1, 2]):
            model.generate(few, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    return least(
        {
            "collect": lambda: model.collect(many, "layers_output", positions=-1, batch_size=BATCH, progress=False),
            "steer": steered,
        },
        rounds,
    )


def served(folder: str, rounds: int) -> dict[str, float]:
    import torch

    from nnterp.vllm import StandardizedVLLM

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model = StandardizedVLLM(folder, dtype=dtype, max_model_len=128, max_num_seqs=STEERED)
    vector = torch.randn(model.hidden_size)
    many, few = ids(COLLECTED, LENGTH), ids(STEERED, START)

    def steered() -> None:
        with model.steering(vector, layers=[1, 2]):
            model.run(few, NEW, ignore_eos=True)

    return least(
        {
            "plain one pass": lambda: model.run(many, 1),
            "collect": lambda: model.collect(many, "layers_output", positions=-1),
            "plain generation": lambda: model.run(few, NEW, ignore_eos=True),
            "steer": steered,
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", help="used by the program itself")
    given = parser.parse_args()
    if given.eager:
        print(json.dumps(eager(given.eager, given.rounds)))
        return
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(folder, given.layers)
        command = [sys.executable, str(Path(__file__)), "--eager", folder, "--rounds", str(given.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        plain = json.loads(done.stdout.splitlines()[-1])
        fast = served(folder, given.rounds)
    tokens = {"collect": COLLECTED * LENGTH, "steer": STEERED * (START + NEW)}
    print("| | tokens/s | beside plain vLLM | beside the eager model |\n|---|---|---|---|")
    for what, beside in (("collect", "plain one pass"), ("steer", "plain generation")):
        print(
            f"| {what}, vLLM | {tokens[what] / fast[what]:.0f} | {fast[what] / fast[beside]:.2f} × its time | "
            f"{plain[what] / fast[what]:.2f} × faster |"
        )
        print(f"| {beside}, plain vLLM | {tokens[what] / fast[beside]:.0f} | 1 | |")
        print(f"| {what}, eager | {tokens[what] / plain[what]:.0f} | | 1 |")


if __name__ == "__main__":
    main()
