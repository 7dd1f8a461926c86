"""`nnterp demo`: loads a small model and shows names, lens, steering, a patchscope and the certificate."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nnterp import plugins
from nnterp.cli.models import HELP, TOY, about_random, add_model_arguments, is_random, load_model, not_loaded
from nnterp.errors import RenamingError
from nnterp.interventions._commands import lens
from nnterp.interventions._commands._models import check_outputs, progress_bar, quiet
from nnterp.token_text import TokenNames

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from nnterp import StandardizedTransformer
    from nnterp.interventions import LensResult, PatchscopeResult

Found = TypeVar("Found")

help = "load a small model that comes with nnterp and show what can be done with it"
examples = ("demo", "demo --html lens.html", "demo --model openai-community/gpt2")

PROMPT = "The capital of France is"
SOURCE = "The capital of France"
STEERED = "The weather today is"
PLEASANT = [
    "I love the weather. The weather today is",
    "What a wonderful day. The weather here is",
    "I am happy. I think the weather is",
    "The sun is bright and warm. The weather this morning is",
]
UNPLEASANT = [
    "I hate the weather. The weather today is",
    "What a terrible day. The weather here is",
    "I am sad. I think the weather is",
    "The rain is cold and grey. The weather this morning is",
]
FACTOR = 2.0
_STEPS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnterp demo`."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        default=TOY,
        help=f"{HELP}; default: {TOY}",
    )
    parser.add_argument(
        "--prompt",
        metavar="PROMPT",
        default=PROMPT,
        help=f"the text that the layers go on with (default: {PROMPT!r})",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="where to write the figure (default: a file in a new temporary folder)",
    )
    add_model_arguments(parser)


@dataclass(frozen=True)
class Steering:
    """The next token after `STEERED`, without and with a direction added to the stream.

    Attributes:
        layer: The layer at which the direction was read and added.
        plain, pleasant, unpleasant: Token ids `[k]` and probabilities `[k]`, most probable first.
    """

    layer: int
    plain: tuple[torch.Tensor, torch.Tensor]
    pleasant: tuple[torch.Tensor, torch.Tensor]
    unpleasant: tuple[torch.Tensor, torch.Tensor]


def run(arguments: argparse.Namespace) -> int:
    """Show everything; 0, or 1 with the reason on the error output."""
    from rich.console import Console

    console = Console(highlight=False)
    drawn = plugins.load(plugins.FIGURES, "lens") is not None
    if arguments.html is not None and not drawn:
        print(f"nnterp demo: {lens.INSTALL}", file=sys.stderr)
        return 1
    try:
        check_outputs(arguments)
        with quiet(), progress_bar(console) as progress:
            task = progress.add_task("Loading the model and proving its names", total=_STEPS)
            model = load_model(arguments)
            progress.update(task, advance=1, description="Reading every layer")
            read = lens.read_lens(model, arguments.prompt, 4)
            progress.update(task, advance=1, description="Steering")
            steering = attempt(steer_weather, model)
            progress.update(task, advance=1, description="Patching a hidden state into another prompt")
            readings = attempt(read_source, model)
            progress.update(task, advance=1, description="Drawing")
            path = None
            if drawn:
                path = lens.write_lens(
                    model, read, arguments.html or Path(tempfile.mkdtemp(prefix="nnterp-")) / "lens.html"
                )
            progress.update(task, advance=1)
    except (RenamingError, OSError, ValueError, RuntimeError) as error:
        print(f"nnterp demo: {not_loaded(arguments.model, error)}", file=sys.stderr)
        return 1
    if is_random(arguments.model):
        console.print(about_random(arguments.model), markup=False)
    show(console, model, read, steering, readings, path)
    return 0


def attempt(step: Callable[[StandardizedTransformer], Found], model: StandardizedTransformer) -> Found | str:
    """What a step returns, or the message of its error if the model does not support it."""
    try:
        return step(model)
    except (RenamingError, ValueError, IndexError) as error:
        return str(error)


def steer_weather(model: StandardizedTransformer, k: int = 5) -> Steering:
    """Steer both ways along the mean difference of pleasant and unpleasant weather (Rimsky et al. 2024)."""
    import torch

    layer = model.num_layers // 2

    def last_state(prompt: str) -> torch.Tensor:
        with torch.no_grad(), model.trace(prompt):
            state = model.layers_output[layer][0, -1].save()
        return state

    pleasant, unpleasant = (torch.stack([last_state(text) for text in texts]) for texts in (PLEASANT, UNPLEASANT))
    direction = pleasant.mean(0) - unpleasant.mean(0)
    found = []
    for factor in (0.0, FACTOR, -FACTOR):
        with torch.no_grad(), model.trace(STEERED):
            model.steer(layer, direction, factor)
            probabilities = model.next_token_probs[0].float().cpu().save()
        values, ids = probabilities.topk(k)
        found.append((ids, values))
    return Steering(layer, *found)


def read_source(model: StandardizedTransformer) -> PatchscopeResult:
    """Write `SOURCE`'s last hidden state into a prompt that repeats words (Ghandeharioun et al. 2024)."""
    from nnterp.interventions import patchscope_table

    return patchscope_table(model, [SOURCE], top_k=3, progress=False)


def show(
    console: Console,
    model: StandardizedTransformer,
    read: LensResult,
    steering: Steering | str,
    readings: PatchscopeResult | str,
    path: Path | None,
) -> None:
    """Print all sections."""
    from rich.text import Text

    names = TokenNames(model.tokenizer)
    console.print()
    console.print(Text("nnterp", style="bold #009E73"), "one interface to the inside of any causal language model")
    heading(console, 1, "One set of names", "model = StandardizedTransformer(...); model.anatomy")
    console.print(model)
    heading(console, 2, "What each layer would say next", f"logit_lens(model, {str(read.labels['prompts'][0])!r})")
    show_lens(console, read, names)
    layer = model.num_layers // 2
    heading(console, 3, "Steering", f"model.steer({layer}, direction, factor=±{FACTOR:g})")
    show_steering(console, steering, names)
    heading(console, 4, "Patchscope", f"patchscope_lens(model, {SOURCE!r}, repeat_prompt())")
    show_readings(console, readings, names)
    heading(console, 5, "Proven, not hoped", "model.validate()")
    show_verdict(console, model)
    console.print()
    if path is None:
        console.print(Text(f"{lens.INSTALL}, and this command writes one of every layer and position.", style="dim"))
    else:
        where = Text("Every layer at every position, in a page that opens offline: ").append(str(path), style="bold")
        console.print(where, soft_wrap=True)
    console.print()


def heading(console: Console, number: int, what: str, code: str) -> None:
    """Print a section's title, and the code for it."""
    from rich.text import Text

    console.print()
    console.rule(Text(f"{number}. {what}", style="bold"), align="left", style="dim")
    console.print(Text(code, style="cyan"), soft_wrap=True)


def show_lens(console: Console, read: LensResult, names: TokenNames) -> None:
    """Print the lens at the last position, and the layer from which its final token is the most probable."""
    from rich.text import Text

    from nnterp.interventions._commands._tables import layer_table, layers_shown, percent

    layers = list(read.labels["layers"])
    ids, probabilities = read["top_ids"][0, :, -1], read["top_probs"][0, :, -1]
    console.print(layer_table(layers, ids, probabilities, names, first="next token", width=console.width))
    if said := layers_shown(layers):
        console.print(Text(f"{said}.", style="dim"))
    final = int(ids[-1, 0])
    since = len(layers) - 1
    while since and int(ids[since - 1, 0]) == final:
        since -= 1
    ends = percent(float(probabilities[-1, 0]))
    console.print(Text(f"{names(final)} leads from layer {layers[since]} on and ends at {ends}."))


def show_steering(console: Console, steering: Steering | str, names: TokenNames) -> None:
    """Print the next token without steering and with it in both directions."""
    from rich.text import Text

    from nnterp.interventions._commands._tables import side_by_side

    if isinstance(steering, str):
        console.print(Text(f"Not with this model: {steering}", style="dim"))
        return
    about = (
        f"After {STEERED!r}, with the mean difference between pleasant and unpleasant weather added to the residual "
        f"stream leaving layer {steering.layer}."
    )
    console.print(Text(about, style="dim"))
    columns = {"as it is": steering.plain, "more pleasant": steering.pleasant, "less pleasant": steering.unpleasant}
    console.print(side_by_side(columns, names, width=console.width))


def show_readings(console: Console, readings: PatchscopeResult | str, names: TokenNames) -> None:
    """Print which token the patchscope reads from each layer's hidden state."""
    from rich.text import Text

    from nnterp.interventions._commands._tables import layer_table, layers_shown

    if isinstance(readings, str):
        console.print(Text(f"Not with this model: {readings}", style="dim"))
        return
    word = SOURCE.split()[-1]
    about = f"The hidden state of {word!r}, put into a prompt that repeats words, after each layer."
    console.print(Text(about, style="dim"))
    best, shares, layers = readings["top_ids"][0], readings["top_probs"][0], list(readings.labels["layers"])
    console.print(layer_table(layers, best, shares, names, first="reads", width=console.width))
    if said := layers_shown(layers):
        console.print(Text(f"{said}.", style="dim"))
    hits = [str(layers[i]) for i, token in enumerate(best[:, 0].tolist()) if names(token).strip("·") == word]
    where = f"layer{'s' if len(hits) > 1 else ''} {', '.join(hits)}" if hits else "none of this model's layers"
    console.print(Text(f"{word!r} is read out of {where}."))


def show_verdict(console: Console, model: StandardizedTransformer) -> None:
    """Print the certificate in one line."""
    from rich.text import Text

    from nnterp.rendering import BAD, GOOD

    certificate = model.certificate
    assert certificate is not None
    held = sum(line.status == "passed" for line in certificate.lines)
    mark = Text("✓ " if certificate.ok else "✗ ", style=GOOD if certificate.ok else BAD)
    said = f"{certificate.verdict} ({held} of {len(certificate.lines)} checked, {certificate.seconds:.1f} s)"
    console.print(mark + Text(said, style="none"), soft_wrap=True)
