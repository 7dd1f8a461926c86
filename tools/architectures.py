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
from nnterp.certificate import FILLED, IDENTITY, IMAGE_ENTERS, PADDING, READOUT
from nnterp.errors import RenamingError
from nnterp.testing import (
    encoder_decoder_types,
    image_model_types,
    model_types,
    model_types_without_images,
    tiny_encoder_decoder,
    tiny_image_inputs,
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


@dataclass
class ImageRow:
    """One architecture that takes images.

    Attributes:
        text, image: Lines of the two certificates that hold, of all that concern a random model; "" if one fails.
        enters: Where the image enters the stream.
        tower: Number of layers of the vision tower that are served, and whether their attention is.
        projector: The module that `image_features` is read at.
        refused: Why it is not proven.
    """

    model_type: str
    model_class: str = ""
    text: str = ""
    padding: str = ""
    image: str = ""
    enters: str = ""
    tower: str = ""
    projector: str = ""
    refused: str = ""


def examine_images(model_type: str) -> ImageRow:
    """Load one tiny model with its images, and certify it on text and on text with an image."""
    row = ImageRow(model_type)
    module = tiny_model(model_type, images=True)
    row.model_class = type(module).__name__
    try:
        model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    except RenamingError as error:
        row.refused = " ".join(str(error).split("\n")[1].split())
        return row
    assert model.certificate is not None
    row.text = held([line for line in model.certificate.lines if line.name != FILLED])
    row.padding = "exact" if model.certificate[PADDING].status == "passed" else "refused"
    certificate = model.validate_images(tiny_image_inputs(module))
    if not certificate.ok:
        row.refused = f"{certificate.failures[0].name}: {certificate.failures[0].detail}"
        return row
    vision = model.facts.vision
    assert vision is not None
    row.image, row.enters = held(certificate.lines), certificate[IMAGE_ENTERS].detail
    if vision.joined:
        row.enters += f", and after layers {', '.join(map(str, vision.joined))}"
    row.tower = f"{len(vision.layers)} layers" if vision.layers else "–"
    row.tower += "" if vision.attentions or not vision.layers else ", no attention"
    row.projector = f"`{vision.projector}`" if vision.projector else "–"
    return row


def held(lines) -> str:
    """How many of these lines hold."""
    return f"{sum(line.status == 'passed' for line in lines)}/{len(lines)}"


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


def page(rows: list[Row], pictured: list[ImageRow], encoded: list[Row]) -> str:
    """The page's text."""
    unavailable, without = unavailable_model_types(), model_types_without_images()
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
        f"lengths are refused.",
        "",
        f"Of the {len(pictured) + len(without)} model types that it maps to a model of images and text, "
        f"**{sum(not row.refused for row in pictured)} are proven on text with an image**, "
        f"{sum(bool(row.text) for row in pictured)} on text, and {len(pictured)} are built; {len(without)} are not, "
        "each with the reason ([below](#images-and-text)).",
        "",
        f"Of the {len(encoded)} encoder-decoder models that are built, "
        f"**{sum(not row.refused for row in encoded)} are proven** with both of their inputs.",
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
    lines += _image_section(pictured, without)
    lines += ["## Refused at load", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{row.model_type}` | {row.refused} |" for row in [*refused, *(r for r in encoded if r.refused)]]
    lines += ["", "## Not built", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{model_type}` | {reason} |" for model_type, reason in unavailable.items()]
    return "\n".join(lines) + "\n"


def _image_section(pictured: list[ImageRow], without: dict[str, str]) -> list[str]:
    """The part of the page on models of images and text."""
    lines = [
        "## Images and text",
        "",
        "* **text**, **with an image**: lines of the two certificates that hold; see [images](../images.md).",
        "* **image enters**: at how many of the image's tokens another image changes the stream that enters layer 0, "
        "and after which layers the tower adds to it again.",
        "* **tower**: layers of the vision tower that are served (`vision_layers_output`), with their attention unless "
        "it says otherwise; **image_features**: the module they are read at.",
        "",
        "| model type | class | text | padding | with an image | image enters | tower | image_features |",
        f"|{'---|' * 8}",
    ]
    for row in (row for row in pictured if not row.refused):
        cells = (row.model_class, row.text, row.padding, row.image, row.enters, row.tower, row.projector)
        lines.append(f"| `{row.model_type}` | {' | '.join(cells)} |")
    lines += ["", "Not proven with an image:", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{row.model_type}` | {row.refused} |" for row in pictured if row.refused]
    lines += [f"| `{model_type}` | {reason} |" for model_type, reason in without.items()]
    return [*lines, ""]


def main() -> int:
    """Examine all types and write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = [examine(model_type) for model_type in tqdm(model_types(), desc="causal language models")]
    pictured = [examine_images(model_type) for model_type in tqdm(image_model_types(), desc="models of images")]
    encoded = [
        examine_encoder_decoder(model_type) for model_type in tqdm(encoder_decoder_types(), desc="encoder-decoders")
    ]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows, pictured, encoded), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
