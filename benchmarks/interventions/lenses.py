"""What reading through a fitted lens costs beside the logit lens, and what fitting one costs on the toy checkpoint.

    python benchmarks/interventions/lenses.py
    python benchmarks/interventions/lenses.py --rounds 9 --prompts 32

Reading: the two ways alternate in one process on a random model of SmolLM2-135M's shape; the figure is the median of
the ratios of each round. Fitting: seconds, and plain forwards of the same texts, once.
"""

import argparse
import importlib
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nnterp
from nnterp import StandardizedTransformer
from nnterp.interventions import fit_jacobian_lens, fit_tuned_lens, logit_lens
from nnterp.interventions._fitted._belonging import Origin
from nnterp.interventions._fitted._lens import Lens
from nnterp.testing import tiny_tokenizer

TOY = Path(__file__).parents[2] / "tools" / "toy"


def timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def reading(args):
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    )
    torch.manual_seed(0)
    model = StandardizedTransformer(LlamaForCausalLM(config).eval(), tokenizer=tiny_tokenizer())
    weights = {i: torch.eye(576) + 0.01 * torch.randn(576, 576) for i in range(29)}
    lens = Lens("tuned", weights, {i: torch.randn(576) for i in range(29)}, Origin.of(model))
    prompts = torch.randint(10, 400, (args.prompts, args.length)).tolist()
    for way in ({}, {"top_k": 5}, {"targets": 7}):
        plain = lambda way=way: logit_lens(model, prompts, progress=False, **way)  # noqa: E731
        through = lambda way=way: logit_lens(model, prompts, lens=lens, progress=False, **way)  # noqa: E731
        plain(), through()
        ratios = []
        for _ in range(args.rounds):
            base = timed(plain)
            ratios.append(timed(through) / base)
        print(f"reading {way or 'probabilities'}: {statistics.median(ratios):.3f} of the logit lens")


def fitting():
    sys.path.insert(0, str(TOY))
    corpus = importlib.import_module("corpus")
    model = StandardizedTransformer(nnterp.toy_checkpoint())
    model.dispatch()
    texts = [t for t in itertools.islice(corpus.documents(5), 400) if len(model.tokenizer(t).input_ids) >= 20]
    encoded = [torch.tensor([model.tokenizer(t).input_ids]) for t in texts]
    with torch.no_grad():
        forward = timed(lambda: [model._module(input_ids=ids) for ids in encoded])
    tuned = timed(lambda: fit_tuned_lens(model, texts, progress=False))
    print(f"tuned lens, {len(texts)} texts: {tuned:.1f} s, {tuned / forward:.0f} forwards of all texts one by one")
    few = timed(lambda: [model._module(input_ids=ids) for ids in encoded[:20]])
    jacobian = timed(lambda: fit_jacobian_lens(model, texts[:20], skip_first=4, held_out=0, progress=False))
    print(f"Jacobian lens, 20 texts: {jacobian:.1f} s, {jacobian / few:.0f} forwards of all texts one by one")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=24)
    arguments = parser.parse_args()
    fitting()
    reading(arguments)
