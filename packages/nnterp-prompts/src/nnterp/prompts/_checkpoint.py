"""Saving the results during a run, and handing them on if the run breaks off."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from nnterp.prompts._identity import mark_changes
from nnterp.prompts._results import IncompleteRunError, PromptResults
from nnterp.warn import warn

SAVE_EVERY = 30.0  # seconds between two writes of a checkpoint


class Keeper:
    """Keeps the results of a run: in a folder if there is a checkpoint, and with the error if the run breaks off.

    Args:
        results: The results, which the run fills in.
        folder: The folder of the checkpoint, or None.
        get_probs: The function of the run, or None.
        kwargs: Its further arguments.
    """

    def __init__(
        self,
        results: PromptResults,
        folder: str | Path | None,
        get_probs: Callable[..., Any] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.results, self.folder, self.get_probs, self.kwargs = results, folder, get_probs, kwargs
        self.saved = time.monotonic()

    def begin(self) -> None:
        """Write the checkpoint before anything is run, so that a folder that cannot be written costs nothing.

        Raises:
            OSError: The folder cannot be written.
        """
        try:
            self._save()
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                error.errno, f"The checkpoint {self.folder} cannot be written, so nothing was run ({error})"
            ) from error

    def save_if_due(self) -> None:
        """Write the checkpoint if the last write was a while ago. A failure is a warning, and the run goes on."""
        if self.folder is None or time.monotonic() - self.saved < SAVE_EVERY:
            return
        try:
            self._save()
        except Exception as error:
            warn(
                f"The checkpoint {self.folder} could not be written after {self._count()} "
                f"({type(error).__name__}: {error}). The run goes on, and tries again in {SAVE_EVERY:.0f} seconds."
            )
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Write the checkpoint after the last batch.

        Raises:
            IncompleteRunError: It cannot be written. The error holds all results.
        """
        self.results._fill()
        try:
            self._save()
        except Exception as error:
            raise IncompleteRunError(
                f"All prompts were run, but the checkpoint {self.folder} could not be written ({type(error).__name__}: "
                f"{error}). The results are in this error's `partial`: error.partial.save(another_folder) keeps them.",
                self.results,
            ) from error
        except BaseException as error:
            self._attach(error, "")
            raise

    def break_off(self, error: BaseException, where: str) -> NoReturn:
        """Save what there is, attach it to the error that ended the run, and raise that.

        Args:
            error: The error. An `Exception` becomes the cause of an `IncompleteRunError`; an interrupt is raised as it
                is, with the results as its attribute `partial`.
            where: Which batch failed, for the message.

        Raises:
            IncompleteRunError: `error` is an `Exception`.
        """
        self.results._fill()
        place = ""
        try:
            self._save()
            place = f" and in {self.folder}" if self.folder is not None else ""
        except Exception as second:
            place = f" (not in {self.folder}, which could not be written: {type(second).__name__}: {second})"
        if isinstance(error, Exception):
            raise IncompleteRunError(
                f"{where} failed after {self._count()} ({type(error).__name__}: {error}). What was computed is in this "
                f"error's `partial`{place}: run_prompts(..., resume=error.partial) goes on from there.",
                self.results,
            ) from error
        self._attach(error, place)
        raise error

    def _save(self) -> None:
        mark_changes(self.results.settings, self.get_probs, self.kwargs)
        if self.folder is not None:
            self.results.save(self.folder)

    def _attach(self, error: BaseException, place: str) -> None:
        error.partial = self.results  # type: ignore[attr-defined]
        error.add_note(
            f"run_prompts was interrupted after {self._count()}; they are in this exception's `partial`{place}."
        )

    def _count(self) -> str:
        return f"{int(self.results.done.sum())} of {len(self.results.done)} prompts"
