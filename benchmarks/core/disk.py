"""What writing activations to disk costs: the last token of all layers of a GPT-2-small shape, beside bare forwards.

    python benchmarks/core/disk.py                                   # 500 prompts of 32 tokens
    python benchmarks/core/disk.py --prompts 2000 20000              # also shows that memory stays flat
    python benchmarks/core/disk.py --prompts 2000 20000 --bare-every 5   # the same in half the time
    python benchmarks/core/disk.py --device cuda --batch 256

Random weights. Each number of prompts runs in a process of its own, whose peak memory nothing else has raised: bare
HuggingFace forwards and `collect(to=)` alternate, shard by shard, so that both see the same machine; with `--bare-every
5` only every fifth shard runs bare, and a prompt's mean counts. Times are CPU
time with one thread on the CPU, and the clock's otherwise. The bare forward is the model with its head, and its body
alone, which is all that hidden states need.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnterp import ActivationDataset, StandardizedTransformer
from nnterp.testing import tiny_tokenizer


def build(args: argparse.Namespace) -> StandardizedTransformer:
    torch.manual_seed(0)
    heads = args.width // 64
    config = GPT2Config(n_layer=args.layers, n_embd=args.width, n_head=heads, bos_token_id=0, eos_token_id=0)
    return StandardizedTransformer(GPT2LMHeadModel(config).eval().to(args.device), tokenizer=tiny_tokenizer())


def peak() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args: argparse.Namespace, prompts: int) -> dict[str, float]:
    model = build(args)
    module = model._module
    on_gpu = torch.device(args.device).type == "cuda"
    by_clock = on_gpu or args.threads > 1
    clock = time.perf_counter if by_clock else time.process_time
    own_clock = time.perf_counter if by_clock else time.thread_time  # without the thread that writes

    def rows():
        for i in range(prompts):
            yield torch.randint(8, 500, (args.tokens,), generator=torch.Generator().manual_seed(i)).tolist()

    def bare(run, ids):
        start = own_clock()
        with torch.no_grad():
            for batch in ids.split(args.batch):
                run(input_ids=batch.to(args.device), use_cache=False)
        if on_gpu:
            torch.cuda.synchronize()
        return own_clock() - start

    folder = Path(tempfile.mkdtemp(dir=args.folder))
    spent, ran = {"forward": 0.0, "body": 0.0}, [0]
    try:
        ids = torch.tensor([row for _, row in zip(range(args.batch), rows(), strict=False)])
        bare(module, ids)
        model.collect(ids, "layers_output", positions=-1, batch_size=args.batch, progress=False, to=folder / "warm")

        def timed():
            """The prompts as a stream; at the beginning of each shard the same prompts run bare."""
            source, done = rows(), 0
            while shard := list(itertools.islice(source, args.shard)):
                if done % args.bare_every == 0:
                    run_bare(torch.tensor(shard))
                done += 1
                yield from shard

        def run_bare(ids):
            spent["forward"] += bare(module, ids)
            spent["body"] += bare(module.transformer, ids)
            ran[0] += len(ids)

        before, start = peak(), clock()
        settings = {"positions": -1, "batch_size": args.batch, "prompts_per_shard": args.shard, "progress": False}
        dataset = model.collect(timed(), "layers_output", to=folder / "dataset", **settings)
        written = clock() - start - spent["forward"] - spent["body"]
        size = sum(path.stat().st_size for path in (folder / "dataset").rglob("*") if path.is_file())
        assert isinstance(dataset, ActivationDataset)
        assert len(dataset) == prompts
        dataset.verify()
        return {
            "written": written / prompts,
            **{name: seconds / ran[0] for name, seconds in spent.items()},
            "peak": peak(),
            "before": before,
            "size": size / 2**20,
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[500])
    defaults = {"tokens": 32, "layers": 12, "width": 768, "batch": 64, "shard": 1024, "threads": 1, "bare-every": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None, help="where the dataset is written, a temporary folder otherwise")
    parser.add_argument("--one", type=int, default=None, help="measure one number of prompts in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(measure(args, args.one)))
        return
    print(
        f"GPT-2 shape {args.layers} × {args.width}, {args.tokens} tokens, last token of all layers, {args.device}, "
        f"{args.threads} threads, batches of {args.batch}, {args.shard} prompts a shard"
    )
    for prompts in args.prompts:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", str(prompts)],
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"  {prompts:>6} prompts: {found['forward'] / found['written']:.3f} of the throughput of the bare forward, "
            f"{found['body'] / found['written']:.3f} of its body's; {found['written'] * 1e3:.2f} ms a "
            f"prompt; {found['size']:.0f} MiB on disk; peak memory {found['peak']:.0f} MiB, "
            f"{found['before']:.0f} before"
        )


if __name__ == "__main__":
    main()
