"""What the checks cost at load: construction with them, over construction without, on a GPT-2-small shape.

The last line is of a folder whose weights are loaded: its first load, which proves it, and later ones, which find the
proof on disk.

uv run python benchmarks/core/loading.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from functools import partial

import torch
import transformers

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_tokenizer

ROUNDS = 7


def gpt2_small() -> transformers.GPT2LMHeadModel:
    """12 layers, width 768, a vocabulary of 50257, random weights."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


def seconds(build, rounds: int = ROUNDS) -> list[float]:
    """Wall time of each round."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        build()
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Print medians."""
    os.environ["NNTERP_CACHE"] = "off"
    transformers.logging.set_verbosity_error()
    tokenizer = tiny_tokenizer()
    module = gpt2_small()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        module(ids)
        forward = statistics.median(seconds(lambda: module(ids)))
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cases = {
            "module, weights loaded": lambda check: StandardizedTransformer(
                module, tokenizer=tokenizer, check_renaming=check
            ),
            "folder, no weights": lambda check: StandardizedTransformer(folder, check_renaming=check),
        }
        print(f"GPT-2-small shape, {torch.get_num_threads()} threads; a forward of 12 tokens: {forward * 1e3:.0f} ms")
        for name, build in cases.items():
            build(True), build(False)
            with_checks, without = [], []
            for _ in range(ROUNDS):  # interleaved, so that both see the same machine
                with_checks += seconds(partial(build, True), 1)
                without += seconds(partial(build, False), 1)
            more = statistics.median(with_checks) - statistics.median(without)
            print(
                f"{name:24} with checks {statistics.median(with_checks):.3f} s, without "
                f"{statistics.median(without):.3f} s, "
                f"checks {more:.3f} s = {more / forward:.1f} forwards"
            )
        os.environ["NNTERP_CACHE"] = f"{folder}/cache"
        cold = seconds(lambda: StandardizedTransformer(folder).dispatch(), 1)[0]
        warm, without = [], []
        for _ in range(ROUNDS):
            warm += seconds(lambda: StandardizedTransformer(folder).dispatch(), 1)
            without += seconds(lambda: StandardizedTransformer(folder, check_renaming=False).dispatch(), 1)
        fast, plain = statistics.median(warm), statistics.median(without)
        print(
            f"{'folder, weights loaded':24} cold {cold:.3f} s, warm {fast:.3f} s, without checks {plain:.3f} s, "
            f"warm = {fast / plain:.2f} of without"
        )


if __name__ == "__main__":
    main()
