"""What scoring all edges of a model costs, in forwards of the plain model over the same prompts.

    python benchmarks/interventions/circuits.py
    python benchmarks/interventions/circuits.py --model gpt2 --rounds 5 --pairs 16

A random model of SmolLM2-135M's shape (or GPT-2's). One forward runs all clean prompts in one batch. Scoring and plain
forwards alternate in one process; figures are medians of the ratios of each round. The audit's share is the difference
to a call without it; `faithfulness` is timed once.
"""

import argparse
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnterp import StandardizedTransformer
from nnterp.interventions import edge_attribution, faithfulness
from nnterp.testing import tiny_tokenizer


def built(name):
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config()).eval()
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=1536, vocab_size=49152)).eval()


def timed(call):
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("smollm2", "gpt2"), default="smollm2")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--audit", type=int, default=0, help="edges to audit, once")
    parser.add_argument("--sizes", type=float, nargs="*", default=[], help="sizes of faithfulness, once")
    args = parser.parse_args()
    model = StandardizedTransformer(built(args.model), tokenizer=tiny_tokenizer())
    clean = torch.randint(10, 400, (args.pairs, args.length))
    corrupted = clean.clone()
    corrupted[:, args.length // 2] = torch.randint(10, 400, (args.pairs,))
    pairs = clean.tolist(), corrupted.tolist()

    def metric(logits):
        return logits[:, 5] - logits[:, 9]

    @torch.no_grad()
    def forward():
        return model._module(input_ids=clean, use_cache=False)

    def scored(**options):
        return edge_attribution(model, *pairs, metric, progress=False, **{"audit": 0, **options})

    forward()
    circuit = scored()
    print(f"{circuit.total} edges, {args.pairs} pairs of {args.length} tokens")
    for name, options in (("gradient", {}), ("integrated, 5 steps", {"method": "integrated", "steps": 5})):
        ratios = []
        for _ in range(args.rounds):
            base = min(timed(forward)[0] for _ in range(2))
            ratios.append(timed(lambda options=options: scored(**options))[0] / base)
        print(f"{name}: {statistics.median(ratios):.1f} forwards")
    base = min(timed(forward)[0] for _ in range(3))
    if args.audit:
        seconds = timed(lambda: scored(audit=args.audit))[0] - timed(scored)[0]
        print(f"audit of {args.audit} edges: {seconds / base:.1f} forwards")
    for size in args.sizes:
        seconds, found = timed(lambda size=size: faithfulness(model, circuit, *pairs, metric, size, 0, progress=False))
        print(f"faithfulness of {int(found['edges'][0])} edges ({size:g}): {seconds / base:.1f} forwards")


if __name__ == "__main__":
    main()
