"""Train the dictionaries that come with the toy checkpoint: one sparse autoencoder and a transcoder of every MLP.

    uv run python tools/features.py --out DIR                    # all of them
    uv run python tools/features.py --out DIR --only transcoder_4
    uv run python tools/features.py --measure                    # the table of the card: those that are shipped

Plain torch on one core. Training is BatchTopK (Bussmann, Leask, Nanda 2024): of a batch, the `k` times batch size
largest features stay. What is saved is a JumpReLU dictionary with one threshold, at which on average `k` features of a
position are active. Features that stay silent are given the error to explain (Gao et al. 2024, A.2).

The MLP of layer 0 tells tokens apart, so its transcoder has more features, of which fewer are active, and they begin as
copies of activations that are far from one another; those of the other dictionaries begin at random activations.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import nnterp
from nnterp import StandardizedTransformer
from nnterp.interventions import dictionary_fit
from nnterp.traced import JumpRelu

HERE = Path(__file__).parent
RESIDUAL_LAYER = 4
FEATURES = {"residual": 768, "transcoder": 384, "transcoder_0": 1280}
ACTIVE = {"residual": 16, "transcoder": 12, "transcoder_0": 4}
APART = {"transcoder_0"}
DOCUMENTS, BATCH, STEPS, RATE = 16_000, 1024, 2500, 3e-3
CANDIDATES, LEAST_COSINE, RATE_APART = 16_384, 0.7, 1e-3
SILENT_AFTER, REVIVED, REVIVAL = 50, 64, 1 / 32


def texts(seed: int, count: int) -> list[str]:
    """Documents of the toy's training text."""
    sys.path.insert(0, str(HERE / "toy"))
    corpus = importlib.import_module("corpus")
    return list(itertools.islice(corpus.documents(seed), count))


@torch.no_grad()
def activations(seed: int, count: int, wanted: set[str]) -> dict[str, torch.Tensor]:
    """Of what the MLPs are given and return and the stream at the middle those wanted, `[tokens, hidden]` by name."""
    model = AutoModelForCausalLM.from_pretrained(nnterp.toy_checkpoint()).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(nnterp.toy_checkpoint())
    kept: dict[str, list[torch.Tensor]] = {}
    running: dict[str, torch.Tensor] = {}

    def watch(name: str, inputs: tuple, output: Any) -> None:
        running[name] = output[0] if isinstance(output, tuple) else output

    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, a, i=i: watch(f"mlps_input[{i}]", a, a))
        layer.mlp.register_forward_hook(lambda _, a, b, i=i: watch(f"mlps_output[{i}]", a, b))
        if i == RESIDUAL_LAYER:
            layer.register_forward_hook(lambda _, a, b, i=i: watch(f"layers_output[{i}]", a, b))
    rows = sorted((tokenizer(text).input_ids for text in texts(seed, count)), key=len)
    for _, group in itertools.groupby(rows, key=len):
        for batch in torch.tensor(list(group)).split(128):
            model(input_ids=batch)
            for name in wanted:
                value = running[name]
                kept.setdefault(name, []).append(value.flatten(0, 1))
    return {name: torch.cat(parts) for name, parts in kept.items()}


def far_apart(x: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of `x`, each chosen to be far in angle from all that were chosen before, `[count]`."""
    some = torch.randperm(len(x))[:CANDIDATES]
    unit = torch.nn.functional.normalize(x[some], dim=-1)
    chosen = [0]
    nearest = unit @ unit[0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    return some[chosen]


def beginning(x: torch.Tensor, y: torch.Tensor, features: int, apart: bool) -> list[torch.Tensor]:
    """Weights to begin with: encoder, its bias, decoder, its bias.

    Args:
        x, y: What is encoded and decoded to.
        features: How many.
        apart: Each feature is a copy of one activation and what the MLP makes of it, active within an angle.
    """
    if not apart:
        encoder = torch.nn.functional.normalize(x[torch.randperm(len(x))[:features]], dim=-1)
        decoder = torch.nn.functional.normalize(encoder @ torch.linalg.lstsq(x, y).solution, dim=-1)
        return [encoder, torch.zeros(features), decoder, torch.zeros(y.shape[1])]
    rows = far_apart(x, features)
    length = x[rows].norm(dim=-1).clamp(min=float(x.norm(dim=-1).mean()))
    scale = y[rows].norm(dim=-1) / length / (1 - LEAST_COSINE)
    encoder, decoder = (torch.nn.functional.normalize(t[rows], dim=-1) for t in (x, y))
    return [encoder * scale[:, None], -LEAST_COSINE * length * scale, decoder, torch.zeros(y.shape[1])]


def trained(
    x: torch.Tensor, y: torch.Tensor, features: int, active: int, steps: int, size: int = BATCH, apart: bool = False
) -> dict[str, torch.Tensor]:
    """The weights of a JumpReLU dictionary that maps activations `x` to `y`, both `[tokens, hidden]`."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x_scale, y_scale = ((t - t.mean(0)).square().sum(-1).mean().div(t.shape[1]).sqrt() for t in (x, y))
    x, y = (x - x_mean) / x_scale, (y - y_mean) / y_scale
    rate, weights = RATE_APART if apart else RATE, beginning(x, y, features, apart)
    for weight in weights:
        weight.requires_grad_()
    encoder, encoder_bias, decoder, decoder_bias = weights
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99))
    silent = torch.zeros(features)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        chosen = torch.randint(len(x), (size,))
        given, wanted = x[chosen], y[chosen]
        pre = given @ encoder.T + encoder_bias
        found = pre.relu()
        least = found.flatten().topk(active * size, sorted=False).values.min()
        kept = found * (found >= least)
        error = wanted - (kept @ decoder + decoder_bias)
        loss = error.square().sum(-1).mean() / wanted.square().sum(-1).mean()
        silent = torch.where((kept > 0).any(0), 0, silent + 1)
        asleep = silent > SILENT_AFTER
        if asleep.any():
            largest = pre.masked_fill(~asleep, -torch.inf).topk(min(REVIVED, int(asleep.sum())), dim=-1)
            woken = torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu())
            target = error.detach()
            loss = loss + REVIVAL * (target - woken @ decoder).square().sum(-1).mean() / target.square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        some = torch.randint(len(x), (16 * BATCH,))
        pre = (x[some] @ encoder.T + encoder_bias).relu()
        threshold = pre.flatten().topk(active * len(some), sorted=False).values.min()
        scale = y_scale / x_scale
        return {
            "W_enc": (encoder * scale).T,
            "b_enc": encoder_bias * y_scale - encoder @ x_mean * scale,
            "W_dec": decoder,
            "b_dec": decoder_bias * y_scale + y_mean,
            "threshold": (threshold * y_scale).expand(features),
        }


def measured(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Explained variance, features active at a position, and features never active, of the weights as saved."""
    w = {name: weight.half().float() for name, weight in weights.items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    found = torch.where(pre > w["threshold"], pre, 0).relu()
    error = y - (found @ w["W_dec"] + w["b_dec"])
    return {
        "explained variance": round(1 - float(error.square().sum() / (y - y.mean(0)).square().sum()), 4),
        "active": round(float((found > 0).sum(-1).float().mean()), 2),
        "never active": int((found == 0).all(0).sum()),
    }


def main() -> None:
    """Train, save, and print what each dictionary explains of text that it was not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the dictionaries, one folder each")
    parser.add_argument("--measure", action="store_true", help="train nothing, measure those that are shipped")
    parser.add_argument("--only", nargs="*", help="names of some of them")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", type=int)
    parser.add_argument("--active", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        return measure(arguments.seed)
    if arguments.out is None:
        parser.error("--out or --measure")
    began = time.process_time()
    layers = AutoConfig.from_pretrained(nnterp.toy_checkpoint()).num_hidden_layers
    sites = {f"residual_{RESIDUAL_LAYER}": (f"layers_output[{RESIDUAL_LAYER}]",) * 2}
    sites |= {f"transcoder_{i}": (f"mlps_input[{i}]", f"mlps_output[{i}]") for i in range(layers)}
    sites = {name: pair for name, pair in sites.items() if not arguments.only or name in arguments.only}
    wanted = {site for pair in sites.values() for site in pair}
    training = activations(arguments.seed + 11, arguments.documents, wanted)
    held_out = activations(arguments.seed + 12, 1000, wanted)
    some = next(iter(training.values()))
    print(f"{len(some):,} tokens to train on, {time.process_time() - began:.0f} s", flush=True)
    for name, (reads, writes) in sites.items():
        torch.manual_seed(arguments.seed)
        began = time.process_time()
        kind = name.partition("_")[0]
        features = arguments.features or FEATURES.get(name, FEATURES[kind])
        active = arguments.active or ACTIVE.get(name, ACTIVE[kind])
        options = (features, active, arguments.steps, arguments.batch, name in APART)
        weights = trained(training[reads], training[writes], *options)
        figures = measured(weights, held_out[reads], held_out[writes])
        print(name, figures, f"{time.process_time() - began:.0f} s", flush=True)
        save(arguments.out / name, weights, reads, writes)


def save(folder: Path, weights: dict[str, torch.Tensor], reads: str, writes: str) -> None:
    """Write a dictionary, its weights as float16."""
    made = nnterp.Dictionary(
        encoder=weights["W_enc"].T,
        encoder_bias=weights["b_enc"],
        decoder=weights["W_dec"],
        decoder_bias=weights["b_dec"],
        activation=JumpRelu(weights["threshold"]),
        reads=reads,
        writes=writes,
        source="tools/features.py",
        model_name="nnterp toy",
        prepend_bos=False,
    )
    nnterp.save_dictionary(made, folder, dtype=torch.float16)


def measure(seed: int) -> None:
    """Print what the shipped dictionaries explain of held-out texts, and the loss with each in place."""
    model = StandardizedTransformer(nnterp.toy_checkpoint())
    chosen = [text for text in texts(seed + 13, 300) if len(model.tokenizer(text).input_ids) > 1]
    print("| name | features | explained variance | L0 | never active | loss | with it | with the mean | with zeros |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in (f"residual_{RESIDUAL_LAYER}", *(f"transcoder_{i}" for i in range(model.num_layers))):
        dictionary = nnterp.toy_dictionary(name)
        fit = dictionary_fit(model, dictionary, chosen, progress=False)
        losses = " | ".join(f"{fit.losses[kind]:.3f}" for kind in ("clean", "spliced", "mean", "zero"))
        print(
            f"| `{name}` | {dictionary.num_features} | {fit.explained_variance:.3f} | {fit.l0:.1f} | {fit.dead} | "
            f"{losses} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
