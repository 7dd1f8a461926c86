"""Say how to install a package of the nnterp namespace that is imported, or whose command is called, but not there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

DISTRIBUTIONS = {
    "nnterp.interventions": "nnterp-interventions",
    "nnterp.prompts": "nnterp-prompts",
    "nnterp.prompt_utils": "nnterp-prompts",
    "nnterp.display": "nnterp-display",
}
COMMANDS = {"demo": "nnterp-interventions", "lens": "nnterp-interventions"}  # of `nnterp`, beside those of core


class _MissingSibling:
    """The last finder asked: whatever reaches it was found nowhere."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name in DISTRIBUTIONS:
            raise ModuleNotFoundError(
                f"{name} is in a package of its own, which is not installed: pip install {DISTRIBUTIONS[name]}",
                name=name,
            )
        return None


def explain_missing() -> None:
    """Make importing an absent sibling name the `pip install` that cures it."""
    if not any(finder is _MissingSibling for finder in sys.meta_path):
        sys.meta_path.append(_MissingSibling)
