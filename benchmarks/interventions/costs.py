"""What interventions cost, in forward passes of the plain HuggingFace model on the same input.

    python benchmarks/interventions/costs.py [--rounds 7] [--threads 1] [--only patchscope] [--memory]
                                             [--peer-python PYTHON]...

A GPT-2-small shape with random weights on the CPU. Everything runs in one process; plain model and intervention take
turns, and the median over rounds of their ratio is printed, with the shortest and the longest beside it. `--memory`
prints instead how the process grows with the number of cells of a sweep, on a smaller model.

Peers cannot live in one environment with nnterp 2: give the Python of an environment that has `nnterp==1.3.0` with
`nnsight==0.7.0`, or `transformer-lens`, by `--peer-python` (or in NNTERP_PEER_PYTHON, separated like a PATH). They run
in processes of their own, on the same weights and inputs, each against its own plain forwards of the HuggingFace model.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnterp import StandardizedTransformer
from nnterp.interventions import (
    TargetPrompt,
    TargetPromptBatch,
    activation_patching,
    logit_difference,
    logit_lens,
    patchscope_lens,
)
from nnterp.testing import tiny_tokenizer


def ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 500, (rows, length), generator=generator)


def ratios(plain, work, rounds):
    plain()
    work()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        plain()
        middle = time.perf_counter()
        work()
        found.append((time.perf_counter() - middle) / (middle - start))
    return found


def lines(model, module):
    """(what, unit, aim, plain forward, work, how many units the work is)."""

    def forward(tokens):
        def run():
            with torch.no_grad():
                module(input_ids=tokens)

        return run

    prompts = ids(8, 8)
    yield (
        "logit lens, 8 prompts × 8 tokens, 12 layers",
        "1.5 (1.25)",
        forward(prompts),
        lambda: logit_lens(model, prompts),
        1,
    )
    reduced = {"targets": 5, "top_k": 5}
    yield (
        "the same, reduced to targets and top 5",
        "",
        forward(prompts),
        lambda: logit_lens(model, prompts, **reduced),
        1,
    )

    target = TargetPrompt(model.tokenizer.decode(ids(1, 10, 1)[0]), -1)
    length = len(model.tokenizer(target.prompt).input_ids)
    targets = ids(8, length, 2)
    yield (
        f"patchscope lens, 8 sources × 12 layers, target of {length} tokens",
        "2.0 (1.3)",
        forward(targets),
        lambda: patchscope_lens(model, prompts, target),
        1,
    )
    many = TargetPromptBatch.from_prompts([model.tokenizer.decode(row) for row in ids(8, 10, 3)], -1)
    yield (
        "the same, a target prompt of its own for each source",
        "",
        forward(targets),
        lambda: patchscope_lens(model, prompts, many),
        1,
    )
    yield from patching_lines(model, forward)


def patching_lines(model, forward):
    metric = logit_difference(7, 8)
    for length in (16, 32, 64):
        clean, corrupted = ids(1, length, 4), ids(1, length, 5)
        cells = 12 * length
        yield (
            f"activation patching, layer × position, {length} tokens, {cells} cells; per cell",
            "0.2 (0.1)" if length == 16 else "",
            forward(corrupted),
            partial(activation_patching, model, clean, corrupted, metric, progress=False),
            cells,
        )
    clean, corrupted = ids(1, 16, 4), ids(1, 16, 5)
    by_head = partial(activation_patching, values="attention_head_outputs", heads="all", progress=False)
    yield (
        "activation patching, layer × head, 16 tokens, 144 cells; per cell",
        "",
        forward(corrupted),
        partial(by_head, model, clean, corrupted, metric),
        144,
    )


def memory():
    """Growth of the process with the cells of a sweep: pairs of prompts of 16 tokens, 12 layers."""
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_embd=128, n_head=4, n_layer=12, vocab_size=8192)).eval()
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    for pairs in (8, 16, 64):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        activation_patching(model, ids(pairs, 16, 4), ids(pairs, 16, 5), logit_difference(7, 8), progress=False)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{pairs * 192:6} cells: peak memory {after / 1024:.0f} MiB, {(after - before) / 1024:+.0f} MiB", flush=True
        )


def peers(module, pythons, options):
    """What peers make of the same model, by what is measured: [(peer, ratios)]."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        script = str(Path(__file__).with_name("peers.py"))
        for python in pythons:
            command = [python, script, folder, "--rounds", str(options.rounds), "--threads", str(options.threads)]
            # The folder of this script holds nothing of theirs; without PYTHONPATH nothing of ours is found.
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or not lines:
                print(f"{python}: {(done.stderr.strip().splitlines() or ['it has none of the peers'])[-1]}", flush=True)
            for line in map(json.loads, lines):
                found.setdefault(line["what"], []).append((line["peer"], line["ratios"]))
    return found


def of_peer(name, line):
    """Whether a peer's line measures what one of ours does."""
    if line.startswith("layer"):
        return "layer × position, 16 tokens" in name
    return name.startswith(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peer-python", action="append", default=[], help="Python of an environment with a peer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return memory()
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config()).eval()
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    pythons = options.peer_python or [p for p in os.environ.get("NNTERP_PEER_PYTHON", "").split(os.pathsep) if p]
    beside = peers(module, pythons, options) if pythons else {}
    print(f"{'':78} forwards   (min – max)   at most (aim)")
    for name, aim, plain, work, units in lines(model, module):
        if options.only not in name:
            continue
        found = [ratio / units for ratio in ratios(plain, work, options.rounds)]
        spread = f"({min(found):.2f} – {max(found):.2f})"
        print(f"{name:78} {statistics.median(found):8.3f}   {spread:13} {aim}", flush=True)
        for line, measured in beside.items():
            for peer, ratios_ in measured if of_peer(name, line) else ():
                spread = f"({min(ratios_):.2f} – {max(ratios_):.2f})"
                print(f"{'    ' + peer:78} {statistics.median(ratios_):8.3f}   {spread}", flush=True)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
