"""Progress bars: `progress=` means the same in every function."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

DELAY = 2.0  # seconds after which a bar that was not asked for appears


def bar(total: int | None, what: str, progress: bool | None, unit: str = "it") -> Any:
    """A progress bar, to be updated in a `with` block.

    Args:
        total: Number of steps, None where it is not known.
        what: What the bar says.
        progress: True for a bar, False for none; with None one appears if the work takes more than two seconds.
        unit: What is counted.

    Raises:
        TypeError: `progress` is something else.
    """
    check_progress(progress)
    if progress is None:
        return tqdm(total=total, desc=what, unit=unit, delay=DELAY, leave=False)
    return tqdm(total=total, desc=what, unit=unit, disable=not progress)


def check_progress(progress: Any) -> None:
    """Raise unless `progress` is True, False or None.

    Raises:
        TypeError: It is something else.
    """
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or None, not {progress!r:.80}.")
