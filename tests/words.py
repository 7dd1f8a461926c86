"""Whose words an error is in: for tests that give functions wrong arguments."""

import traceback
from pathlib import Path


def error_of(call):
    """The error that a call raises, None if it raises none."""
    try:
        call()
    except Exception as error:
        return error
    return None


def is_ours(error):
    """Whether an error was raised by a `raise` of this library, and not by what it called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename)
    lines = file.read_text(encoding="utf-8").splitlines()
    return "nnterp" in file.parts and "raise" in " ".join(lines[last.lineno - 1 : (last.end_lineno or last.lineno)])
