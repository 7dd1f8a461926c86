"""What an attached dictionary costs: a splice, beside the dictionary's own products; memory of sparse features.

    python benchmarks/core/features.py            both tables
    python benchmarks/core/features.py --quick    a smaller model and fewer rounds, to see that it runs

GPT-2's code with random weights, a dictionary of 8 times the width at the middle layer, one thread. The splice reads
the features and writes them back. It is compared with the HuggingFace model's forward plus the two products that the
dictionary cannot do without, encoder times activations and features times decoder, timed in the same rounds by
processor time. Memory is the peak of a process of its own that collects the 16 largest features of short prompts.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnterp import Dictionary, StandardizedTransformer, attach, collect_features
from nnterp.testing import tiny_tokenizer
from nnterp.traced import JumpRelu

K = 16


def build(layers: int, width: int, vocabulary: int = 50257) -> StandardizedTransformer:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    return StandardizedTransformer(GPT2LMHeadModel(config).eval(), tokenizer=tiny_tokenizer())


def dictionary_of(width: int, features: int) -> Dictionary:
    g = torch.Generator().manual_seed(1)
    encoder, decoder = (torch.randn(features, width, generator=g) / width**0.5 for _ in range(2))
    threshold = torch.full((features,), 2.0)
    return Dictionary(encoder, torch.zeros(features), decoder, torch.zeros(width), JumpRelu(threshold))


def measured(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each case, in interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            begin = time.process_time()
            run()
            if turn:
                taken[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def splice(layers: int, width: int, rows: int, length: int, rounds: int) -> None:
    model, layer = build(layers, width), layers // 2
    dictionary = dictionary_of(width, 8 * width)
    attach(model, dictionary, f"layers_output[{layer}]")
    ids = torch.randint(8, 500, (rows, length), generator=torch.Generator().manual_seed(2))
    x, features = torch.randn(rows, length, width), torch.rand(rows, length, 8 * width)

    def forward() -> None:
        model._module(input_ids=ids)

    def products() -> None:
        x @ dictionary.encoder.T
        features @ dictionary.decoder

    def traced() -> None:
        with model.trace({"input_ids": ids}):
            model.logits.save()

    def spliced() -> None:
        with model.trace({"input_ids": ids}):
            model.features[layer] = model.features[layer]
            model.logits.save()

    with torch.no_grad():
        cases = {"forward": forward, "products": products, "trace": traced, "splice": spliced}
        found = measured(cases, rounds)
    own = found["forward"] + found["products"]
    print(f"{layers} layers of width {width}, {rows} x {length} tokens, {8 * width} features at layer {layer}")
    for name, seconds in found.items():
        print(f"  {name:<10} {1000 * seconds:8.1f} ms  {seconds / own:5.2f} of forward + products")


def memory(prompts: int, length: int = 8) -> None:
    """Collect in this process, and print its peak."""
    model = build(4, 128, 600)
    for layer in (1, 2):
        attach(model, dictionary_of(128, 4096), f"layers_output[{layer}]")
    ids = torch.randint(8, 500, (prompts, length), generator=torch.Generator().manual_seed(2)).tolist()
    collect_features(model, ids[:64], k=K, progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = collect_features(model, ids, k=K, progress=False)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(t.numel() * t.element_size() for t in (found.collected["features", layer] for layer in found)) / 2**20
    dense = 2 * prompts * length * 4096 * 4 / 2**20
    print(
        f"  {prompts:6d} prompts: peak {after:6.0f} MiB, {after - before:5.0f} above that of 64; the result has "
        f"{size:.1f} MiB (all features: {dense:.0f} MiB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", type=int, help="measure memory for so many prompts in this process alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        memory(arguments.memory_of)
        return
    shape = (4, 128, 4, 16) if arguments.quick else (12, 768, 8, 32)
    splice(*shape, rounds=2 if arguments.quick else arguments.rounds)
    print(f"the {K} largest of 4096 features at 2 of 4 layers, prompts of 8 tokens")
    for prompts in (100, 200) if arguments.quick else (1000, 10000):
        subprocess.run([sys.executable, __file__, "--memory-of", str(prompts)], check=True)


if __name__ == "__main__":
    main()
