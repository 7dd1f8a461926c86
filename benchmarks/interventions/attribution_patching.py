"""What attribution patching costs, in forward passes of the plain HuggingFace model on the same prompts.

    python benchmarks/interventions/attribution_patching.py [--rounds 7] [--threads 1] [--memory]
                                                            [--peer-python PYTHON]...

A GPT-2-small shape with random weights on the CPU: plain model and attribution take turns in one process, and the
median over rounds of their ratio is printed, with the shortest and the longest beside it. The audit is what
`audit=50` adds to `audit=0`. `--memory` prints instead how the process grows with the number of pairs, on a smaller
model. `--peer-python` is the Python of an environment with TransformerLens, as for `costs.py`.
"""

import argparse
import resource
import statistics
import time
from functools import partial

import torch
from costs import peers
from transformers import GPT2Config, GPT2LMHeadModel

from nnterp import StandardizedTransformer
from nnterp.interventions import attribution_patching, logit_difference
from nnterp.testing import tiny_tokenizer

METRIC = logit_difference(7, 8)
EVERY_STREAM = ["layers_input", "layers_output", "attention_contributions", "mlp_contributions"]


def ids(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 500, (rows, length), generator=generator)


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def lines(model):
    """(what, aim, pairs, how often the work is in it, the work)."""
    for pairs in (1, 8):
        attribute = partial(
            attribution_patching, model, ids(pairs, 16, 4), ids(pairs, 16, 5), METRIC, audit=0, progress=False
        )
        what = f"{pairs} pair{'s' if pairs > 1 else ''} × 16 tokens, 12 layers: "
        yield what + "streams, by position", "4", pairs, 1, attribute
        yield what + "streams and contributions, by position", "4", pairs, 1, partial(attribute, EVERY_STREAM)
        heads = {"heads": "all", "positions": list(range(16))}
        yield what + "heads, by position", "4", pairs, 1, partial(attribute, "attention_head_outputs", **heads)
        yield what + "neurons, by position", "4", pairs, 1, partial(attribute, "mlp_neurons", **heads)

        def both(attribute=attribute, heads=heads):
            attribute("attention_head_outputs", **heads)
            attribute("mlp_contributions")

        yield what + "heads and feed-forwards, two calls", "", pairs, 1, both
        for value in ("attention_queries", "attention_keys"):
            through = partial(attribute, value, method="attention-aware", **heads)
            yield f"{what}{value.removeprefix('attention_')} through the softmax", "", pairs, 1, through
        without = partial(attribute, "attention_head_outputs", graddrop=True, **heads)
        yield what + "heads, without one layer at a time", "", pairs, 1, without
        yield what + "integrated, 5 steps; per step", "4", pairs, 5, partial(attribute, method="integrated")


def audits(model):
    for pairs in (1, 8):
        for value, units in (("layers_output", None), ("attention_head_outputs", "all")):
            call = partial(
                attribution_patching,
                model,
                ids(pairs, 16, 4),
                ids(pairs, 16, 5),
                METRIC,
                value,
                heads=units,
                progress=False,
            )
            yield f"{pairs} pair{'s' if pairs > 1 else ''}: audit of 50 of {value}", pairs, call


def memory():
    """Growth of the process with the pairs, of 16 tokens and 12 layers."""
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_embd=128, n_head=4, n_layer=12, vocab_size=8192)).eval()
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    for pairs in (16, 64, 256):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call = partial(attribution_patching, model, ids(pairs, 16, 4), ids(pairs, 16, 5), METRIC, progress=False)
        call("mlp_neurons", heads="all", positions="all")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{pairs:4} pairs: peak memory {after / 1024:.0f} MiB, {(after - before) / 1024:+.0f} MiB", flush=True)


def shown(what, found, aim):
    spread = f"({min(found):.2f} – {max(found):.2f})"
    print(f"{what:78} {statistics.median(found):8.2f}   {spread:15} {aim}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peer-python", action="append", default=[], help="Python of an environment with a peer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return memory()
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config()).eval()
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), enable_attention_probs=True)

    def plain(pairs):
        with torch.no_grad():
            module(input_ids=ids(pairs, 16, 5))

    print(f"{'':78} forwards   (min – max)    at most")
    for what, aim, pairs, times, work in lines(model):
        plain(pairs), work()
        shown(what, [timed(work) / timed(partial(plain, pairs)) / times for _ in range(options.rounds)], aim)
    for what, measured in (peers(module, options.peer_python, options) if options.peer_python else {}).items():
        for peer, found in measured if what.startswith("attribution") else ():
            shown(f"{peer}, 1 pair × 16 tokens, 12 layers: {what}", found, "")
    for what, pairs, call in audits(model):
        call()
        found = []
        for _ in range(options.rounds):
            base = timed(partial(plain, pairs))
            found.append((timed(call) - timed(partial(call, audit=0))) / base)
        shown(what, found, "8")


if __name__ == "__main__":
    main()
