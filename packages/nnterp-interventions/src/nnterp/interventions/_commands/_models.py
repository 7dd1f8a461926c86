"""Loading the model of a command, and what the terminal shows meanwhile."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nnterp.cli.models import source_of
from nnterp.files import require_writable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from nnterp import StandardizedTransformer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--trust-remote-code` and `--device`."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the checkpoint"
    )
    parser.add_argument("--device", help="where to load the weights, e.g. cpu or cuda (default: wherever they fit)")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Check the file of `--html` and the device before a model is loaded.

    Raises:
        OSError: The file cannot be written.
        ValueError: There is no such device, or `--top-k` is not positive.
    """
    if arguments.html is not None:
        require_writable(arguments.html)
    if getattr(arguments, "top_k", 1) < 1:
        raise ValueError(f"--top-k is at least 1, not {arguments.top_k}.")
    try:
        if arguments.device not in (None, "auto"):
            torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from None


def load_model(arguments: argparse.Namespace) -> StandardizedTransformer:
    """Load the model that was named (a hub id, a folder or "toy") with its weights."""
    from nnterp import StandardizedTransformer

    placed = {"device_map": arguments.device} if arguments.device else {}
    model = StandardizedTransformer(source_of(arguments.model), trust_remote_code=arguments.trust_remote_code, **placed)
    model.dispatch()
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of other libraries, which would interrupt a table."""
    import transformers
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before[0])
        if before[1]:
            logging.enable_progress_bar()


def progress_bar(console: Console) -> Progress:
    """A progress bar that disappears at the end; shown only in a terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
