"""Cold starts: what a process pays that loads a model whose proofs are on disk, and then sweeps for the first time.

Each round starts two processes, one that loads with the kept proofs and one that loads without checks. The first then
runs each sweep of `SWEEPS` five times. Printed are medians of the CPU time of one thread, over the rounds:

- the load with kept proofs over the load without checks;
- the first of the five sweeps over the median of the later ones.

    uv run python benchmarks/core/cold.py                          # the shape of SmolLM2-135M, random weights
    uv run python benchmarks/core/cold.py --model FOLDER --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

CLEAN, CORRUPTED = (f"When Mary and John went to the store, {name} gave a drink to" for name in ("John", "Mary"))
SWEEPS = {
    "residual stream, layers × positions": {},
    "heads, layers × heads": {"values": "attention_head_outputs", "heads": "all"},
    "MLPs, layers × positions": {"values": "mlp_contributions"},
}
TIMES = 5


def worker(folder: str, checked: bool) -> dict[str, object]:
    """Load a folder in this process, and sweep if the names are checked: CPU seconds."""
    import transformers

    from nnterp import StandardizedTransformer
    from nnterp.interventions import activation_patching, logit_difference

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    began = time.process_time()
    model = StandardizedTransformer(folder, check_renaming=checked)
    model.dispatch()
    found: dict[str, object] = {"load": time.process_time() - began}
    metric = logit_difference(" Mary", " John")
    for name, options in SWEEPS.items() if checked else ():
        taken = []
        for _ in range(TIMES):
            began = time.process_time()
            activation_patching(model, CLEAN, CORRUPTED, metric, progress=False, **options)
            taken.append(time.process_time() - began)
        found[name] = taken
    return found


def child(folder: str, checked: bool) -> dict[str, object]:
    """What `worker` returns in a process of its own."""
    command = [sys.executable, __file__, "--model", folder, "--worker", "checked" if checked else "unchecked"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def random_folder(folder: str) -> str:
    """A checkpoint in the shape of SmolLM2-135M with random weights."""
    from lines import build

    from nnterp.testing import tiny_tokenizer

    build("135m", torch.device("cpu"), torch.float32)._module.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a checkpoint and its tokenizer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=("checked", "unchecked"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.model, args.worker == "checked")))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NNTERP_CACHE"] = f"{folder}/proofs"
        model = args.model or random_folder(f"{folder}/model")
        cold = child(model, True)
        rounds = [(child(model, True), child(model, False)) for _ in range(args.rounds)]
    kept, plain = (statistics.median(pair[i]["load"] for pair in rounds) for i in (0, 1))
    print(f"load: first {cold['load']:.2f} s, with its proofs {kept:.2f} s, without checks {plain:.2f} s")
    print(f"  with its proofs / without checks: {kept / plain:.2f}")
    for name in SWEEPS:
        ratios = [found[name][0] / statistics.median(found[name][1:]) for found, _ in rounds]
        warm = statistics.median(statistics.median(found[name][1:]) for found, _ in rounds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: a warm sweep {warm:.2f} s, the first / a warm one: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
