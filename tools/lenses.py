"""Fit both lenses and compare them on text that neither has seen: the table of `docs/lenses.md`.

    uv run python tools/lenses.py                   # the toy checkpoint
    uv run python tools/lenses.py toy smollm2       # a real model too; about half an hour each on two cores

A table is printed, and written to the page where the page has a place for it. The texts of a real model are written by
the model itself, from a fixed seed: they need no download, and they are what it predicts best.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import sys
import time
from pathlib import Path

import torch

import nnterp
from nnterp import StandardizedTransformer
from nnterp.interventions import evaluate_lens, fit_jacobian_lens, fit_tuned_lens

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "lenses.md"
REAL = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser()
NAMES = {"toy": "toy checkpoint", "smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
HELD_OUT = 12


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
    model = StandardizedTransformer(nnterp.toy_checkpoint() if name == "toy" else str(REAL / name))
    model.dispatch()
    texts = toy_texts() if name == "toy" else written_texts(model, 60, 60)
    skip, fitted, few = 4, texts[:-HELD_OUT], 100 if name == "toy" else 6
    tuned_kwargs = {"epochs": 10} if name == "toy" else {"epochs": 3, "batch_size": 4}
    begin = time.perf_counter()
    tuned = fit_tuned_lens(model, fitted, skip_first=skip, max_length=64, held_out=0.1, **tuned_kwargs)
    middle = time.perf_counter()
    jacobian = fit_jacobian_lens(model, fitted[:few], skip_first=skip, max_length=64, held_out=0)
    end = time.perf_counter()
    found = [
        evaluate_lens(model, lens, texts[-HELD_OUT:], skip_first=skip, max_length=64) for lens in (tuned, jacobian)
    ]
    layers = list(tuned.layers)
    chosen = sorted({layers[round(k * (len(layers) - 1) / 5)] for k in range(6)})
    rows = {
        layer: [cell(found[0]["logit_lens_kl"], i), cell(found[0]["kl"], i), cell(found[1]["kl"], i)]
        for layer in chosen
        for i in [layers.index(layer)]
    }
    return {
        "name": NAMES[name],
        "rows": rows,
        "worse": {"tuned": found[0].worse, "jacobian": found[1].worse},
        "seconds": [round(middle - begin), round(end - middle)],
        "texts": [len(fitted), few],
        "layers": len(layers),
    }


def cell(values: torch.Tensor, index: int) -> str:
    own = values[:, index]
    return f"{own.mean():.2f} ± {own.std(unbiased=False):.2f}"


def table(found: dict) -> str:
    lines = ["| layer | logit lens | tuned lens | Jacobian lens |", "|---|---|---|---|"]
    lines += [f"| {layer} | {' | '.join(cells)} |" for layer, cells in found["rows"].items()]
    worse = {kind: ", ".join(map(str, own)) or "none" for kind, own in found["worse"].items()}
    return (
        "\n".join(lines)
        + f"\n\nWorse than the logit lens: tuned at {worse['tuned']}, Jacobian at {worse['jacobian']} of the "
        + f"{found['layers']} layers. Fitted in {found['seconds'][0]} s on {found['texts'][0]} texts and in "
        + f"{found['seconds'][1]} s on {found['texts'][1]} texts, on two cores.\n"
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
