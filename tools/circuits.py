"""Find the circuits of two tasks, audit them and cut everything else: the tables of `docs/circuits-found.md`.

    uv run python tools/circuits.py toy                # the toy checkpoint: capitals
    uv run python tools/circuits.py smollm2 gemma3     # the real models of tools/real_models.py: IOI and greater-than

Tables are written to the page where it has a place for them, figures to docs/gallery. Without images (they need kaleido
and a Chrome or Chromium) pass `--no-images`.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import torch

import nnterp
from nnterp import StandardizedTransformer, display
from nnterp.interventions import (
    Faithfulness,
    attribution_patching,
    direct_logit_attribution,
    edge_attribution,
    faithfulness,
    head_scores,
    logit_difference,
    probability_difference,
)
from nnterp.prompts.tasks import Task, capitals, greater_than, ioi

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "circuits-found.md"
REAL = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser()
NAMES = {"toy": "The toy checkpoint", "smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
TASKS = {"toy": (capitals,), "smollm2": (ioi, greater_than), "gemma3": (ioi, greater_than)}
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PAIRS, CONTROLS, AUDITED = 8, 2, 20


def metric_of(task: Task):
    make = probability_difference if task.name == "greater_than" else logit_difference
    return make(task.correct, task.wrong)


def examine(name: str, model: StandardizedTransformer, task: Task, images: bool) -> str:
    metric = metric_of(task)
    given = (model, task.clean, task.corrupted, metric)
    begin = time.process_time()
    nodes = attribution_patching(*given, "attention_head_outputs", heads="all", audit=AUDITED, progress=False)
    circuit = edge_attribution(*given, method="integrated", steps=5, audit=AUDITED, progress=False)
    found = faithfulness(model, circuit, *given[1:], SIZES, CONTROLS, progress=False)
    seconds = time.process_time() - begin
    lines = [
        f"### {task.name.replace('_', ' ')}\n",
        f"{len(task)} pairs, such as “{task.clean[0]}” and “{task.corrupted[0]}”. Metric: {metric}; clean "
        f"{found['clean'].mean():.2f}, corrupted {found['corrupted'].mean():.2f}.\n",
        f"* Heads that carry most, by attribution patching: {heads_of(nodes)}. {sentence(nodes.audit)}",
        f"* Edges: {len(circuit.edges):,} scored. {sentence(circuit.audit)}",
        f"* Strongest edges: {', '.join(f'{e.sender} → {e.receiver} ({e.score:+.2f})' for e in circuit.edges[:4])}.",
    ]
    if task.name != "greater_than":
        direct = direct_logit_attribution(model, task.clean, (task.correct, task.wrong), by="head", progress=False)
        best = mean_top(direct.grid().mean(0), 4)
        lines.append(f"* Heads that write the answer, by direct logit attribution: {best}.")
    lines += ["", curve(found), ""]
    if images:
        image = f"faithfulness-{name}-{task.name.replace('_', '-')}.png"
        display.save(found.plot(), DOCS / "gallery" / image, width=900, height=420)
        lines.append(f"![How faithful circuits of each size are](gallery/{image})\n")
    lines.append(f"All of it took {seconds:.0f} s of CPU time.\n")
    return "\n".join(lines)


def sentence(audit: object) -> str:
    text = str(audit)
    return text[0].upper() + text[1:] + "."


def heads_of(nodes: object) -> str:
    return mean_top(nodes["scores"].mean(0).squeeze(), 5)


def mean_top(scores: torch.Tensor, k: int) -> str:
    """The heads of largest magnitude in `[layers, heads]`."""
    order = scores.flatten().nan_to_num(0).abs().argsort(descending=True)[:k]
    return ", ".join(
        f"{int(i) // scores.shape[1]}.{int(i) % scores.shape[1]} ({scores.flatten()[i]:+.2f})" for i in order
    )


def curve(found: Faithfulness) -> str:
    random = found.normalized_random
    rows = [
        f"| {size:g} | {int(edges):,} | {rounded(own)} | {rounded(low)} to {rounded(high)} |"
        for size, edges, own, low, high in zip(
            SIZES, found["edges"], found.normalized, random.min(0).values, random.max(0).values, strict=True
        )
    ]
    head = ["| part of the edges | kept | faithfulness | random circuits |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + f"\n\nCPR {found.cpr:.2f}, CMD {found.cmd:.2f}."


def rounded(value: torch.Tensor) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def kinds(model: StandardizedTransformer) -> str:
    lines = ["### Kinds of heads\n", "| kind | head | score | control |", "|---|---|---|---|"]
    for kind in ("previous_token", "induction", "duplicate_token"):
        cells = head_scores(model, kind, n=6, draws=3, progress=False).heads()[:2]
        lines += [
            f"| {kind.replace('_', ' ')} | {c['layers']}.{c['heads']} | {c['scores']:.2f} | {c['control']:.3f} |"
            for c in cells
        ]
    return "\n".join(lines) + "\n"


def insert(name: str, made: str) -> None:
    """Put what was made into its place on the page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    page = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + made + end, PAGE.read_text(), flags=re.S)
    PAGE.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=list(NAMES), default=["toy"])
    parser.add_argument("--no-images", action="store_true")
    args = parser.parse_args()
    for name in args.models:
        path = nnterp.toy_checkpoint() if name == "toy" else str(REAL / name)
        model = StandardizedTransformer(path, enable_attention_probs=True)
        parts = [f"## {NAMES[name]}\n"]
        for make in TASKS[name]:
            task = make(model, PAIRS)
            parts.append(examine(name, model, task, not args.no_images))
            print(parts[-1], flush=True)
        parts.append(kinds(model))
        insert(name, "\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
