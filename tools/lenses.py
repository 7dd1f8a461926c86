"""Fit the lenses and compare them on text that none has seen: the tables of `docs/lenses.md`.

    uv run python tools/lenses.py                   # the toy checkpoint
    uv run python tools/lenses.py smollm2 gemma3    # the real models of tools/real_models.py: minutes to an hour

A table is printed, and written to the page where the page has a place for it. The texts of a real model are written by
the model itself, from a fixed seed: they need no download, and they are what it predicts best. With the environment
variable NNTERP_LENSES, a folder, lenses are kept there, and a run that was cut short goes on from it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nnterp
from nnterp import StandardizedTransformer
from nnterp.interventions import Lens, evaluate_lens, fit_jacobian_lens, fit_tuned_lens

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "lenses.md"
REAL = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser()
KEPT = os.environ.get("NNTERP_LENSES")
NAMES = {"toy": "toy checkpoint", "smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}


@dataclass(frozen=True)
class Plan:
    """What a model's lenses are fitted on and measured on.

    Attributes:
        fitted, held_out: Texts of the fits, and of the table.
        few: Texts of the Jacobian lens.
        length: Tokens of a text that are used.
        tuned: Arguments of `fit_tuned_lens`.
    """

    fitted: int
    held_out: int
    few: int
    length: int
    tuned: dict[str, Any]


PLANS = {
    "toy": Plan(1000, 12, 100, 64, {"epochs": 10, "held_out": 0.1}),
    "smollm2": Plan(30, 8, 3, 48, {"epochs": 3, "batch_size": 2, "held_out": 0.17}),
    "gemma3": Plan(20, 6, 3, 32, {"epochs": 2, "batch_size": 2, "held_out": 0.2}),
}
SKIP = 4


def toy_texts() -> list[str]:
    sys.path.insert(0, str(HERE / "toy"))
    corpus = importlib.import_module("corpus")
    tokenizer = StandardizedTransformer(nnterp.toy_checkpoint()).tokenizer
    found = itertools.islice(corpus.documents(5), 600)
    return [text for text in found if len(tokenizer(text).input_ids) >= 20]


def written_texts(model: StandardizedTransformer, count: int, length: int) -> list[list[int]]:
    """Texts that the model writes, after openings that leave it free."""
    openings = ["The", "In the", "A", "When", "It was", "How to", "Scientists", "My", "There are", "She", "We", "After"]
    torch.manual_seed(0)
    found: list[list[int]] = []
    while len(found) < count:
        encoded = model.tokenizer(openings, return_tensors="pt", padding=True)
        with torch.no_grad():
            rows = model._module.generate(
                **encoded, max_new_tokens=length, min_new_tokens=length, do_sample=True, top_p=0.95, pad_token_id=0
            )
        for row, mask in zip(rows, encoded["attention_mask"], strict=True):
            found.append(row[int((mask == 0).sum()) :].tolist())
    return found[:count]


def measure(name: str) -> dict:
    plan = PLANS[name]
    model = StandardizedTransformer(nnterp.toy_checkpoint() if name == "toy" else str(REAL / name))
    model.dispatch()
    texts = toy_texts() if name == "toy" else written_texts(model, plan.fitted + plan.held_out, plan.length)
    fitted, others = texts[: -plan.held_out][: plan.fitted], texts[-plan.held_out :]
    some = {"skip_first": SKIP, "max_length": plan.length, "progress": False}
    few = {"texts": fitted[: plan.few], **some, "offset": True, "held_out": 0}
    affine, jacobian_seconds = kept(f"{name}-jacobian", model, fit_jacobian_lens, few)
    tuned, tuned_seconds = kept(f"{name}-tuned", model, fit_tuned_lens, {"texts": fitted, **some, **plan.tuned})
    jacobian = Lens(affine.kind, affine.weights, {}, affine.origin, affine.details)
    found = [evaluate_lens(model, lens, others, **some) for lens in (tuned, jacobian, affine)]
    layers = list(tuned.layers)
    chosen = layers if len(layers) < 8 else sorted({layers[round(k * (len(layers) - 1) / 9)] for k in range(10)})
    rows = {
        layer: [cell(found[0]["logit_lens_kl"], i), *(cell(own["kl"], i) for own in found)]
        for layer in chosen
        for i in [layers.index(layer)]
    }
    ids = model.tokenizer(fitted[0]).input_ids if isinstance(fitted[0], str) else fitted[0]
    one = torch.tensor([ids[: plan.length]])
    forward = min(timed(lambda: model._module(input_ids=one))[1] for _ in range(5))
    return {
        "name": NAMES[name],
        "rows": rows,
        "worse": [evaluation.worse for evaluation in found],
        "seconds": [tuned_seconds, jacobian_seconds],
        "forward": forward,
        "texts": [len(fitted), plan.few, plan.held_out],
        "epochs": tuned.details["epochs"],
        "length": plan.length,
        "hidden": model.hidden_size,
        "layers": len(layers),
    }


def kept(name: str, model: StandardizedTransformer, fit: Callable, arguments: dict) -> tuple[Lens, float]:
    """A lens and the CPU time of its fit in seconds; read from the folder NNTERP_LENSES if the same fit is there."""
    file = None if KEPT is None else Path(KEPT) / f"{name}.safetensors"
    if file is not None and file.exists():
        lens = Lens.load(file, model)
        if lens.details["arguments"] == repr(arguments):
            return lens, lens.details["seconds"]
    lens, seconds = timed(lambda: fit(model, **arguments))
    print(f"{name}: {seconds:.0f} s", flush=True)
    lens.details.update(arguments=repr(arguments), seconds=seconds)
    if file is not None:
        lens.save(file)
    return lens, seconds


@torch.no_grad()
def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU time in seconds."""
    begin = time.process_time()
    found = call()
    return found, time.process_time() - begin


def cell(values: torch.Tensor, index: int) -> str:
    own = values[:, index]
    return f"{own.mean():.2f} ± {own.std(unbiased=False):.2f}"


def table(found: dict) -> str:
    lines = [f"{found['name']}:\n", "| layer | logit lens | tuned lens | Jacobian lens | with offset |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {layer} | {' | '.join(cells)} |" for layer, cells in found["rows"].items()]
    tuned_worse, jacobian_worse, affine_worse = (", ".join(map(str, own)) or "none" for own in found["worse"])
    tuned, jacobian = (
        f"{seconds:.0f} s of CPU time, as long as {seconds / found['forward']:.0f} forward passes of one text"
        for seconds in found["seconds"]
    )
    fitted, few, others = found["texts"]
    return (
        "\n".join(lines)
        + f"\n\nWorse than the logit lens, of all {found['layers']} layers: tuned at {tuned_worse}; Jacobian at "
        + f"{jacobian_worse}; with offset at {affine_worse}. Measured on {others} texts; texts have up to "
        + f"{found['length']} tokens.\n"
        + f"Tuned: {fitted} texts, {found['epochs']} epochs, {tuned}.\n"
        + f"Jacobian: {few} texts, {found['hidden']} vector-Jacobian products of each, {jacobian}.\n"
    )


def insert(name: str, made: str) -> None:
    """Put a table into its place on the page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    page = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + made + end, PAGE.read_text(), flags=re.S)
    PAGE.write_text(page)


def main() -> None:
    wanted = sys.argv[1:] or ["toy"]
    for name in wanted:
        made = measure(name)
        print(table(made), flush=True)
        insert(name, table(made))


if __name__ == "__main__":
    main()
