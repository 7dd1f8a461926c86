"""What the commands check before they load a model, and what the terminal shows meanwhile."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnterp.cli.models import require_device, require_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def check_outputs(arguments: argparse.Namespace) -> None:
    """Check the file of `--html` and the device before a model is loaded.

    Raises:
        ValueError: The file cannot be written, there is no such device, or `--top-k` is not positive.
    """
    require_file(arguments.html, "--html")
    if getattr(arguments, "top_k", 1) < 1:
        raise ValueError(f"--top-k is at least 1, not {arguments.top_k}.")
    require_device(arguments.device)


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
