"""Cost and memory of `run_prompts`, in forwards of the plain HuggingFace model on the same batches.

    python benchmarks/prompts/bench_run_prompts.py                        # 512 prompts, GPT-2-small shape
    python benchmarks/prompts/bench_run_prompts.py --prompts 10000 --hidden 32

Every measurement is made in a process of its own. Times are CPU seconds of one thread, so that other work on the
machine does not count. Memory is the peak of the resident set during the run over what was resident when it began, with
a first batch of both the plain model and the function behind it.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time

WAYS = ("plain", "own", "sequence", "logit_lens")


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def forget_peak():
    """Make the peak what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(way, args):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from nnterp import StandardizedTransformer
    from nnterp.inputs import batches, encode
    from nnterp.prompts import Prompt, run_prompts
    from nnterp.testing import tiny_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=args.layers, n_embd=args.hidden, n_head=max(1, args.hidden // 64), vocab_size=args.vocab
    )
    module = GPT2LMHeadModel(config).eval()
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    draw = random.Random(0)

    def prompt(_):
        ids = [draw.randrange(8, 500) for _ in range(draw.randint(args.shortest, args.longest))]
        targets = {name: [draw.randrange(args.vocab) for _ in range(2)] for name in ("target", "other")}
        return Prompt(ids, targets, {"target": "a city", "other": "the river"})

    prompts = [prompt(i) for i in range(args.prompts)]

    @torch.no_grad()
    def plain(some):
        for batch in batches(model, encode(model, [p.prompt for p in some]), args.batch_size):
            mask = batch.attention_mask
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            module(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False)

    def run(some):
        if way == "plain":
            return plain(some)
        options = {"scoring": "sequence"} if way == "sequence" else {}
        if way == "logit_lens":
            from nnterp.interventions import logit_lens

            options["get_probs_func"] = logit_lens
        return run_prompts(model, some, batch_size=args.batch_size, tqdm=None, **options)

    longest = sorted(prompts, key=lambda p: -len(p.prompt))[: args.batch_size]
    plain(longest)
    run(longest)
    forget_peak()
    before, began = resident(), time.process_time()
    run(prompts)
    seconds = time.process_time() - began
    return {"seconds": seconds, "growth_mb": peak() - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--shortest", type=int, default=6)
    parser.add_argument("--longest", type=int, default=24)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    command = [sys.executable, *sys.argv]
    found = {}
    for way in dict.fromkeys(("plain", *args.ways)):
        output = subprocess.run([*command, "--one", way], check=True, capture_output=True, text=True).stdout
        found[way] = json.loads(output.strip().splitlines()[-1])
    shape = (
        f"{args.prompts} prompts of {args.shortest} to {args.longest} tokens, {args.layers} layers, width {args.hidden}"
    )
    print(f"{shape}, vocabulary {args.vocab}, batches of {args.batch_size}")
    for way, figures in found.items():
        figures["forwards"] = figures["seconds"] / found["plain"]["seconds"]
        print(
            f"  {way:<12} {figures['seconds']:7.1f} s  {figures['forwards']:5.2f} forwards  "
            f"{figures['growth_mb']:+7.0f} MB"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": found}, file, indent=1)


if __name__ == "__main__":
    main()
