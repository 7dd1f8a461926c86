"""What peers' interventions cost in forward passes of the plain model; run by `costs.py` with a peer's own interpreter.

    PEER_PYTHON benchmarks/interventions/peers.py FOLDER [--rounds 3]

FOLDER holds the model and its tokenizer. Prints a line of JSON for each measurement: the peer, what was measured, and
the ratios, one for each round. It imports nothing of this repository, so that it runs beside nnterp 1.x on nnsight 0.7,
or beside TransformerLens.
"""

import argparse
import json
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 500, (rows, length), generator=generator)


def texts(tokenizer, rows, length, seed):
    return [tokenizer.decode(row) for row in ids(rows, length, seed)]


def ratios(plain, work, rounds, units):
    """Of long work one round, between several plain forwards."""
    times = 1 if units == 1 else 10
    plain()
    if units == 1:
        work()
    found = []
    for _ in range(rounds if units == 1 else 1):
        start = time.perf_counter()
        for _ in range(times):
            plain()
        middle = time.perf_counter()
        work()
        end = time.perf_counter()
        for _ in range(times):
            plain()
        forwards = (middle - start + time.perf_counter() - end) / 2 / times
        found.append((end - middle) / forwards / units)
    return found


def forward(module, tokens):
    def run():
        with torch.no_grad():
            module(input_ids=tokens)

    return run


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def nnterp_lines(folder):
    """(what, plain forward, work, how many units the work is) of nnterp 1.x."""
    from nnterp import StandardizedTransformer
    from nnterp.interventions import TargetPrompt, logit_lens, patchscope_lens

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = StandardizedTransformer(folder, tokenizer=tokenizer, device_map="cpu", check_renaming=False)
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ids(8, 8)
    yield "logit lens", forward(module, prompts), lambda: logit_lens(model, prompts.tolist()), 1
    (text,) = texts(tokenizer, 1, 10, 1)
    target = ids(8, len(tokenizer(text).input_ids), 2)
    scope = TargetPrompt(text, -1)
    yield "patchscope lens", forward(module, target), lambda: patchscope_lens(model, prompts.tolist(), scope), 1


def lens_lines(folder):
    """The same of TransformerLens 4, whose bridge runs the HuggingFace model."""
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = TransformerBridge.boot_transformers(
        "gpt2", hf_model=AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer=tokenizer, device="cpu"
    )
    prompts = ids(8, 8)

    def lens():
        with torch.no_grad():
            _, cache = model.run_with_cache(prompts)
            states, _ = cache.accumulated_resid(layer=-1, apply_ln=False, pos_slice=-1, return_labels=True)
            return model.unembed(model.ln_final(states)).softmax(-1)

    yield "logit lens", forward(module, prompts), lens, 1
    clean, corrupted = ids(1, 16, 4), ids(1, 16, 5)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)

    def patch():
        with torch.no_grad():
            patching.get_act_patch_resid_pre(
                model, corrupted, cache, lambda logits: logits[0, -1, 7] - logits[0, -1, 8]
            )

    yield "layer × position, 16 tokens", forward(module, corrupted), patch, 192

    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    def attribute():
        attribution_patch(model, clean, corrupted, lambda logits: (logits[:, -1, 7] - logits[:, -1, 8]).sum())

    yield "attribution of heads and feed-forwards", forward(module, corrupted), attribute, 1


PEERS = {"nnterp": nnterp_lines, "transformer_lens": lens_lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, lines in PEERS.items():
        if not installed(name):
            continue
        for what, plain, work, units in lines(options.folder):
            found = ratios(plain, work, options.rounds, units)
            print(json.dumps({"peer": f"{name} {installed(name)}", "what": what, "ratios": found}), flush=True)


if __name__ == "__main__":
    main()
