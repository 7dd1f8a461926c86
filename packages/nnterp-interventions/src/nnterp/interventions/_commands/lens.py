"""`nnterp lens MODEL PROMPT`: the next token that every layer would predict."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnterp import plugins
from nnterp.cli.models import HELP, about_random, add_model_arguments, is_random, load_model, not_loaded
from nnterp.errors import RenamingError
from nnterp.interventions._commands._models import check_outputs, progress_bar, quiet

if TYPE_CHECKING:
    from rich.console import Console

    from nnterp import StandardizedTransformer
    from nnterp.interventions import LensResult

WRITERS = "nnterp.writers"
INSTALL = "Figures need nnterp-display: pip install nnterp-display"

help = "print what the layers of a model would say next after a prompt (logit lens); of many layers, some"
examples = (
    'lens toy "The capital of France is"',
    'lens openai-community/gpt2 "The Eiffel Tower is in" --html lens.html',
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnterp lens`."""
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="the text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the figure of all layers and positions")
    parser.add_argument("--all-layers", action="store_true", help="print all layers, also where there are more than 24")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens to keep of each layer (default: 5)")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and write the figure. Returns 0, or 1 after printing the reason on stderr."""
    from rich.console import Console

    if arguments.html is not None and plugins.load(plugins.FIGURES, "lens") is None:
        print(f"nnterp lens: {INSTALL}", file=sys.stderr)
        return 1
    console = Console(highlight=False)
    try:
        check_outputs(arguments)
        with quiet(), progress_bar(console) as progress:
            task = progress.add_task(f"Loading {arguments.model}", total=None)
            model = load_model(arguments)
            progress.update(task, description="Reading every layer")
            result = read_lens(model, arguments.prompt, arguments.top_k)
            written = None if arguments.html is None else write_lens(model, result, arguments.html)
    except (RenamingError, OSError, ValueError, RuntimeError) as error:
        print(f"nnterp lens: {not_loaded(arguments.model, error)}", file=sys.stderr)
        return 1
    if is_random(arguments.model):
        console.print(about_random(arguments.model), markup=False)
    print_lens(console, model, result, every=arguments.all_layers)
    if written is not None:
        console.print(f"Every layer at every position: {written}", markup=False, soft_wrap=True)
    return 0


def read_lens(model: StandardizedTransformer, prompt: str, top_k: int) -> LensResult:
    """The lens at all layers and positions of one prompt."""
    from nnterp.interventions import logit_lens_table

    return logit_lens_table(model, [prompt], top_k=top_k, progress=False)


def print_lens(console: Console, model: StandardizedTransformer, result: LensResult, *, every: bool = False) -> None:
    """Print the table of the last position, and which layers it leaves out."""
    from nnterp.interventions._commands._tables import layer_table, layers_shown
    from nnterp.token_text import TokenNames

    layers = list(result.labels["layers"])
    table = layer_table(
        layers,
        result["top_ids"][0, :, -1],
        result["top_probs"][0, :, -1],
        TokenNames(model.tokenizer),
        first="next token",
        width=console.width,
        every=every,
    )
    console.print(table)
    if not every and (said := layers_shown(layers)):
        console.print(f"{said}. --all-layers prints all.", markup=False)


def write_lens(model: StandardizedTransformer, result: LensResult, path: Path) -> Path:
    """Draw the lens, write the figure to a file and return its path.

    Raises:
        ValueError: nnterp-display is not installed, or cannot write such a file.
    """
    draw, save = plugins.load(plugins.FIGURES, "lens"), plugins.load(WRITERS, "figure")
    if draw is None or save is None:
        raise ValueError(INSTALL)
    return save(draw(result, model.tokenizer), path)
