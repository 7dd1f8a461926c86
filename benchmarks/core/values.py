"""What reading values costs, in forwards of the plain HuggingFace model on the same input in the same process.

    python benchmarks/core/values.py            the table of costs and of memory
    python benchmarks/core/values.py --quick    a smaller model and fewer rounds, to see that it runs

GPT-2-small's shape (12 layers, width 768), random weights, 32 prompts of 32 tokens, one thread unless --threads says
otherwise. Rounds of all rows are interleaved and the median is taken, so read the numbers as ratios.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from nnsight import TransformersModel
from transformers import GPT2Config, GPT2LMHeadModel

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_tokenizer

PROMPTS, LENGTH = 32, 32


def build(layers: int, width: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=50257, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave out the row about memory")
    parser.add_argument("--prompts", type=int, default=5000, help="for the row about memory")
    parser.add_argument("--memory-only", action="store_true", help="measure memory in this process and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_only:
        memory(arguments.prompts)
        return
    layers, width, rounds = (4, 128, 2) if arguments.quick else (12, 768, arguments.rounds)
    device = torch.device(arguments.device)

    plain = build(layers, width).to(device)
    model = StandardizedTransformer(build(layers, width).to(device), tokenizer=tiny_tokenizer())
    bare = TransformersModel(build(layers, width).to(device), tokenizer=tiny_tokenizer(), task="text-generation")
    ids = torch.randint(8, 500, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    rows = ids.tolist()

    def full() -> None:
        with torch.no_grad():
            plain(input_ids=ids, use_cache=False)

    def body() -> None:
        with torch.no_grad():
            plain.transformer(input_ids=ids, use_cache=False)

    def last_token() -> None:
        model.collect(rows, "layers_output", positions=-1, batch_size=PROMPTS, progress=False)

    def all_positions() -> None:
        model.collect(rows, "layers_output", batch_size=PROMPTS, progress=False)

    def four_values() -> None:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            found = []
            for i in range(layers):
                found.append(model.layers_input[i])
                found.append(model.attentions_output[i])
                found.append(model.mlps_output[i])
                found.append(model.layers_output[i])
            found.save()

    def four_values_bare() -> None:
        with torch.no_grad(), bare.trace(ids, use_cache=False):
            found = []
            for i in range(layers):
                layer = bare.transformer.h[i]
                found.append(layer.input)
                found.append(layer.attn.output[0])
                found.append(layer.mlp.output)
                found.append(layer.output)
            found.save()

    def heads() -> None:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            found = [model.attention_head_outputs[i] for i in range(layers)]
            found.save()

    rows_of_table: list[tuple[str, Callable[[], None], Callable[[], None], str, float | None]] = [
        ("collect, last token of all layers", last_token, body, "forwards of the body", 1.02),
        ("collect, all positions of all layers", all_positions, full, "forwards", 1.10),
        ("four values of every layer in a trace", four_values, four_values_bare, "× bare nnsight", 1.03),
        ("heads' outputs of every layer in a trace", heads, full, "forwards", None),
    ]
    times: dict[Callable, list[float]] = {f: [] for _, f, g, _, _ in rows_of_table for f in (f, g)}
    for function in times:
        function()
    # One thread's own time, which others on the same machine do not take from; on a GPU there is only the clock's.
    clock = time.process_time if device.type == "cpu" and arguments.threads == 1 else time.perf_counter
    for turn in range(rounds):
        for function in list(times) if turn % 2 else reversed(list(times)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[function].append(clock() - start)
    medians = {function: statistics.median(spent) for function, spent in times.items()}
    print(
        f"GPT-2 shape {layers} × {width}, {PROMPTS} prompts of {LENGTH} tokens, {device}, {arguments.threads} threads; "
        f"one forward {medians[full] * 1e3:.0f} ms, its body {medians[body] * 1e3:.0f} ms"
    )
    for name, function, reference, unit, target in rows_of_table:
        # The ratio within each round, because a shared machine drifts between rounds.
        ratio = statistics.median(a / b for a, b in zip(times[function], times[reference], strict=True))
        goal = "" if target is None else f"  (goal ≤ {target:.2f})"
        print(f"  {name:<42} {ratio:6.3f} {unit}{goal}")
    if arguments.no_memory:
        return
    # In a process of its own, whose peak nothing has raised before.
    count = 500 if arguments.quick else arguments.prompts
    subprocess.run([sys.executable, __file__, "--memory-only", "--prompts", str(count)], check=True)


def memory(count: int) -> None:
    """Peak memory over what the result takes, for many prompts through a small model."""
    small = StandardizedTransformer(build(4, 256), tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(2)
    rows = [
        torch.randint(8, 500, (n,), generator=generator).tolist()
        for n in torch.randint(4, 32, (count,), generator=generator).tolist()
    ]
    longest = sorted(rows, key=len)[-64:]
    for _ in range(3):  # what one batch takes is taken once
        small.collect(longest, "layers_output", positions=-1, batch_size=64, progress=False)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = small.collect(rows, "layers_output", positions=-1, batch_size=64, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result = got["layers_output"].nbytes / 2**20
    print(
        f"  {count} prompts, last token of all layers: peak memory grew by {peak / 1024:.0f} MiB, the result is "
        f"{result:.0f} MiB"
    )


if __name__ == "__main__":
    main()
