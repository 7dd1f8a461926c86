"""What steering every step of a generation costs, in plain HuggingFace generations of the same prompt.

    python benchmarks/core/generation.py            # SmolLM2-135M's shape, 32 new tokens
    python benchmarks/core/generation.py --rounds 9 --tokens 64
    python benchmarks/core/generation.py --cpu      # CPU time of one thread, for a machine that others use too

All ways alternate in one process; the figures are medians of the ratios of each round. The model is random. repeng and
interp-engine run beside nnterp where they are installed.
"""

import argparse
import importlib.util
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_tokenizer


def build(args):
    config = LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 192),
        intermediate_size=round(args.hidden * 8 / 3),
        vocab_size=args.vocab,
    )
    torch.manual_seed(0)
    return StandardizedTransformer(LlamaForCausalLM(config).eval(), tokenizer=tiny_tokenizer())


def ways(model, args):
    module, layer = model._module, args.layers // 2
    vector = torch.randn(args.hidden)
    ids = torch.randint(10, 400, (1, args.prompt))
    encoding = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}

    def plain():
        return module.generate(**encoding, **settings)

    def hooks():
        handle = module.model.layers[layer].register_forward_hook(lambda m, a, out: out + vector)
        try:
            return module.generate(**encoding, **settings)
        finally:
            handle.remove()

    def steer():
        with model.generate(encoding, **settings) as tracer:
            model.steer(layer, vector)
            out = tracer.result.save()
        return out

    def last_token():
        with model.generate(encoding, **settings) as tracer:
            model.steer(layer, vector, token_positions=-1)
            out = tracer.result.save()
        return out

    def all_layers():
        with model.generate(encoding, **settings) as tracer:
            model.steer(None, vector, mode="project_out")
            out = tracer.result.save()
        return out

    def steering():
        with model.steering(vector, layer):
            return model.generate(encoding, **settings)

    def untouched():
        return model.generate(encoding, **settings)

    return peers(module, layer, vector, encoding, settings) | {
        "plain HuggingFace": plain,
        "plain hook": hooks,
        "nnterp, no edit": untouched,
        "model.steer": steer,
        "model.steer, last token": last_token,
        "with model.steering": steering,
        "a direction out of all layers": all_layers,
    }


def peers(module, layer, vector, encoding, settings):
    found = {}
    if importlib.util.find_spec("repeng"):
        np.float_ = np.float64  # repeng 0.4 reads the name that NumPy 2 removed
        from repeng import ControlModel

        def repeng():
            wrapped = ControlModel(module, [layer])
            try:
                wrapped.set_raw_control({layer: vector})
                return wrapped.generate(**encoding, **settings)
            finally:
                wrapped.unwrap()

        found["repeng"] = repeng
    if importlib.util.find_spec("interp_engine"):
        from interp_engine.model import EagerModel
        from interp_engine.steer import SteerSpec
        from interp_engine.steer import steer as steering

        engine = EagerModel("benchmark", hf_model=module, tokenizer=tiny_tokenizer())

        def interp_engine():
            with steering(engine, [SteerSpec(vector, layer)]):
                return module.generate(**encoding, **settings)

        found["interp-engine"] = interp_engine
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 576, "layers": 30, "vocab": 49152, "prompt": 16, "tokens": 32, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu else time.perf_counter
    model = build(args)
    found = ways(model, args)
    ratios = {name: [] for name in found}
    results = {}
    with torch.no_grad():
        for name, run in found.items():
            results[name] = run()
        for _ in range(args.rounds):
            times = {}
            for name, run in found.items():
                start = clock()
                run()
                times[name] = clock() - start
            for name, taken in times.items():
                ratios[name].append(taken / times["plain HuggingFace"])
    for name in ("model.steer", "with model.steering", *({"repeng", "interp-engine"} & results.keys())):
        assert torch.equal(results[name], results["plain hook"]), name
    print(
        f"{args.layers} × {args.hidden}, {args.tokens} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name, found_ratios in ratios.items():
        low, high = min(found_ratios), max(found_ratios)
        print(f"  {name:30} {statistics.median(found_ratios):.3f} plain generations ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
