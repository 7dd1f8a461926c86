"""Write `docs/reference/architectures.md`: what is proven for every causal language model of transformers.

    uv run python tools/architectures.py

Every type that transformers maps to a causal LM is built tiny and random (`nnterp.testing`), loaded, and certified; the
page says what came out. Nothing on it is typed by hand.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from nnterp import StandardizedTransformer
from nnterp.anatomy import Anatomy
from nnterp.certificate import FILLED, IDENTITY, PADDING, READOUT
from nnterp.errors import RenamingError
from nnterp.testing import (
    encoder_decoder_types,
    model_types,
    multimodal_model_types,
    tiny_encoder_decoder,
    tiny_model,
    tiny_tokenizer,
    unavailable_model_types,
)

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
EAGER = {"attn_implementation": "eager"}
COMMAND = "uv run python tools/architectures.py"

STATEFUL = ("linear_attention", "state_space", "convolution", "recurrent")
# The columns on the inside of layers: heading, values that all have to be there, and the layers they apply to.
INSIDE: tuple[tuple[str, tuple[str, ...], Callable[[Anatomy], Iterable[int]]], ...] = (
    ("scores, pattern", ("attention_scores", "attention_probabilities"), lambda a: a.indices("self_attn")),
    (
        "q, k, v",
        ("attention_queries", "attention_keys", "attention_values"),
        lambda a: a.indices("self_attn"),
    ),
    ("z", ("attention_head_outputs",), lambda a: a.indices("self_attn")),
    ("state", ("mixer_states",), lambda a: [b.index for b in a.blocks if b.kind in STATEFUL]),
    ("neurons", ("mlp_neurons",), lambda a: [b.index for b in a.blocks if b.mlp and not b.mixture_of_experts]),
)


@dataclass
class Row:
    """One architecture."""

    model_type: str
    refused: str = ""
    model_class: str = ""
    kinds: str = ""
    lines: str = ""
    padding: str = ""
    identity: str = ""
    readout: str = ""
    inside: tuple[str, ...] = ()


def examine(model_type: str, load: Callable[[str], StandardizedTransformer] | None = None) -> Row:
    """Load and certify one tiny model."""
    row = Row(model_type)
    try:
        model = (load or load_causal)(model_type)
    except RenamingError as error:
        text = str(error).split("\ncheck_renaming")[0]
        row.refused = " ".join(re.sub(r"^.*behave as the names found for it say:\s*", "", text, flags=re.S).split())
        return row
    anatomy, certificate = model.anatomy, model.certificate
    assert certificate is not None
    row.model_class = anatomy.model_class
    row.kinds = "; ".join(dict.fromkeys(block.description for block in anatomy.blocks))
    passed = sum(line.status == "passed" for line in certificate.lines)
    row.lines = f"{passed}/{sum(line.name != FILLED for line in certificate.lines)}"
    row.padding = "exact" if certificate[PADDING].status == "passed" else "refused"
    identity = certificate[IDENTITY]
    row.identity = identity.detail if identity.status == "passed" else "–"
    row.readout = certificate[READOUT].detail if certificate[READOUT].status == "passed" else "–"
    support = model.support()
    row.inside = tuple(mark(support, values, tuple(applies(anatomy))) for _, values, applies in INSIDE)
    return row


def load_causal(model_type: str) -> StandardizedTransformer:
    """The tiny model, with attention probabilities where it has them."""
    try:
        return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    except (ValueError, RenamingError):  # no eager attention to switch to, or no probabilities in it
        return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer())


def mark(support, values: tuple[str, ...], applicable: tuple[int, ...]) -> str:
    """Whether values are there on every layer where they can be meant."""
    if not applicable:
        return ""
    have = set(applicable).intersection(*(support.layers.get(value, ()) for value in values))
    return "✓" if have >= set(applicable) else (f"{len(have)}/{len(applicable)}" if have else "–")


def examine_encoder_decoder(model_type: str) -> Row:
    """Load and certify one tiny encoder-decoder model."""
    return examine(
        model_type,
        lambda name: StandardizedTransformer(tiny_encoder_decoder(name, **EAGER), tokenizer=tiny_tokenizer()),
    )


def page(rows: list[Row], multimodal: list[Row], encoded: list[Row]) -> str:
    """The page's text."""
    unavailable = unavailable_model_types()
    loaded = [row for row in rows if not row.refused]
    refused = [row for row in rows if row.refused]
    total = len(rows) + len(unavailable)
    lines = [
        "# Architectures",
        "",
        f"Of the {total} model types that transformers {version('transformers')} maps to a causal language model, "
        f"**{len(loaded)} load and are proven**, {len(refused)} are refused at load with the reason, and "
        f"{len(unavailable)} cannot be built from a configuration alone. "
        f"{sum(row.padding == 'exact' for row in loaded)} are exact under left padding; for the others batches of "
        "different "
        f"lengths are refused. Besides these, {sum(not row.refused for row in multimodal)} multimodal models were "
        "proven "
        f"on text, and {sum(not row.refused for row in encoded)} of {len(encoded)} encoder-decoder models with both of "
        "their inputs.",
        "",
        f"Generated by `{COMMAND}` on tiny random models with loud weights; do not edit.",
        "",
        "* **certificate**: lines of the certificate that hold, of all that concern a random model; see [the "
        "certificate](../certificate.md).",
        "* **sum**: how a layer's parts are added to the residual stream, solved for and proven.",
        "* **readout**: how `project_on_vocab` makes logits of a hidden state, proven equal to the model's.",
        "* **scores, pattern, q, k, v, z**: whether these values are served on every layer with softmax attention "
        "(scores and pattern under eager attention); **state**: the same of the recurrent state of mixers of other "
        "kinds; **neurons**: of feed-forwards that are no mixture of experts. See [values](../values.md).",
        "",
    ]
    heading = ["model type", "class", "layers", "certificate", "padding", "sum", "readout", *(h for h, _, _ in INSIDE)]
    for title, table in (
        ("Causal language models", loaded),
        ("Multimodal models, on text", [r for r in multimodal if not r.refused]),
        ("Encoder-decoder models", [r for r in encoded if not r.refused]),
    ):
        lines += [f"## {title}", "", f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
        for row in table:
            cells = [
                f"`{row.model_type}`",
                row.model_class,
                row.kinds,
                row.lines,
                row.padding,
                row.identity,
                row.readout,
                *row.inside,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Refused at load", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{row.model_type}` | {row.refused} |" for row in [*refused, *(r for r in encoded if r.refused)]]
    lines += ["", "## Not built", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{model_type}` | {reason} |" for model_type, reason in unavailable.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Examine all types and write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = [examine(model_type) for model_type in tqdm(model_types(), desc="causal language models")]
    multimodal = [examine(model_type) for model_type in tqdm(multimodal_model_types(), desc="multimodal models")]
    encoded = [
        examine_encoder_decoder(model_type) for model_type in tqdm(encoder_decoder_types(), desc="encoder-decoders")
    ]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows, multimodal, encoded), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
