"""What attribution costs, in forward passes of the plain HuggingFace model on the same prompts.

    python benchmarks/interventions/attribution.py [--rounds 7] [--threads 1] [--prompts 8] [--length 16] [--memory]

A random model of SmolLM2-135M's shape on the CPU. Plain model and attribution take turns in one process, and the median
over rounds of their ratio is printed, with the shortest and the longest beside it. `--memory` prints instead how the
process grows with the number of prompts.
"""

import argparse
import resource
import statistics

import torch
from costs import ids, ratios
from transformers import LlamaConfig, LlamaForCausalLM

from nnterp import StandardizedTransformer
from nnterp.interventions import direct_logit_attribution
from nnterp.testing import tiny_tokenizer


def built(eager=False):
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    )
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).eval()
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer(), enable_attention_probs=eager)


def direct(args):
    """(what, aim, plain forward, work) of direct logit attribution."""
    prompts = ids(args.prompts, args.length)
    for eager, ways in ((False, ("layer", "sublayer", "head", "neuron")), (True, ("position",))):
        model = built(eager)

        def plain(model=model):
            with torch.no_grad():
                model._module(input_ids=prompts, use_cache=False)

        for by in ways:
            aim = "1.3" if by in ("layer", "sublayer", "head") else ""
            work = lambda by=by, model=model: direct_logit_attribution(  # noqa: E731
                model, prompts, (7, 8), by, progress=False
            )
            yield f"direct logit attribution, by {by}, {args.prompts} prompts × {args.length} tokens", aim, plain, work


def memory(args):
    """Growth of the process with the number of prompts."""
    model = built()
    for count in (8, 32, 128):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        direct_logit_attribution(model, ids(count, args.length), (7, 8), "head", batch_size=8, progress=False)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{count:4} prompts, by head: peak memory {after / 1024:.0f} MiB, {(after - before) / 1024:+.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        memory(arguments)
    else:
        for what, aim, plain, work in direct(arguments):
            found = ratios(plain, work, arguments.rounds)
            spread = f"{min(found):.2f} to {max(found):.2f}"
            print(f"{what}: {statistics.median(found):.2f} ({spread}){f', aim {aim}' if aim else ''}", flush=True)
