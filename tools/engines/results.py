"""The stored result: one small JSON file, from which the page is made."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparing import LETTERS, WRONG, Outcome

FILE = Path(__file__).with_name("result.json")
KEPT = 200
KINDS = {letter: kind for kind, letter in LETTERS.items()}


@dataclass(frozen=True)
class Results:
    """All outcomes.

    Attributes:
        about: When and how they were made: date, versions by engine, seconds of CPU time by engine.
        outcomes: By engine, model type and cell.
        unreferenced: Model types without a reference, each with the reason.
        huggingface: What is remarkable about HuggingFace's own outputs, by model type.
    """

    about: dict[str, Any]
    outcomes: dict[str, dict[str, dict[str, Outcome]]]
    unreferenced: dict[str, str]
    huggingface: dict[str, list[str]]

    def counts(self, engine: str, cell: str | None = None) -> Counter[str]:
        """How many outcomes of each kind an engine has, in one cell or in all."""
        return Counter(
            outcome.kind
            for by_cell in self.outcomes[engine].values()
            for name, outcome in by_cell.items()
            if cell in (None, name)
        )

    def wrong(self, engine: str) -> dict[str, dict[str, str]]:
        """The numbers of an engine that differ, by cell and model type, with how much."""
        found: dict[str, dict[str, str]] = {}
        for model_type, by_cell in self.outcomes[engine].items():
            for cell, outcome in by_cell.items():
                if outcome.kind == WRONG:
                    found.setdefault(cell, {})[model_type] = outcome.detail
        return found

    def write(self, file: Path = FILE) -> None:
        """One letter for each cell; details beside them, each text once."""
        texts: dict[str, int] = {}
        engines: dict[str, Any] = {}
        for engine, by_type in self.outcomes.items():
            letters, details = {}, {}
            for model_type, by_cell in by_type.items():
                letters[model_type] = "".join(LETTERS[outcome.kind] for outcome in by_cell.values())
                said = [
                    texts.setdefault(shortened(outcome.detail), len(texts)) if outcome.detail else -1
                    for outcome in by_cell.values()
                ]
                if max(said) >= 0:
                    details[model_type] = said[0] if len(set(said)) == 1 else said
            engines[engine] = {"letters": letters, "details": details}
        cells = list(next(iter(next(iter(self.outcomes.values())).values())))
        kept = {
            "about": self.about,
            "cells": cells,
            "letters": KINDS,
            "unreferenced": self.unreferenced,
            "huggingface": self.huggingface,
            "engines": engines,
            "texts": list(texts),
        }
        file.write_text(_lines(kept), encoding="utf-8")

    @classmethod
    def read(cls, file: Path = FILE) -> Results:
        kept = json.loads(file.read_text(encoding="utf-8"))
        cells, texts = kept["cells"], [*kept["texts"], ""]
        outcomes = {}
        for engine, stored in kept["engines"].items():
            by_type = {}
            for model_type, letters in stored["letters"].items():
                said = stored["details"].get(model_type, -1)
                said = said if isinstance(said, list) else [said] * len(cells)
                by_type[model_type] = {
                    cell: Outcome(KINDS[letter], texts[i]) for cell, letter, i in zip(cells, letters, said, strict=True)
                }
            outcomes[engine] = by_type
        return cls(kept["about"], outcomes, kept["unreferenced"], kept["huggingface"])


def shortened(text: str) -> str:
    """A text without what differs from machine to machine, and not too long."""
    text = re.sub(r"(/[\w.+-]+){3,}", lambda found: ".../" + found[0].rpartition("/")[2], text)
    text = re.sub(r"0x[0-9a-f]+", "0x...", text)
    return text if len(text) <= KEPT else f"{text[: KEPT * 2 // 3]} ... {text[-KEPT // 3 :]}"


def _lines(kept: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of the second level, so that a change of one type is a change of few lines."""
    parts = []
    for name, value in kept.items():
        if isinstance(value, dict) and value:
            inner = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
            parts.append(f"{json.dumps(name)}: {{\n  {inner}\n }}")
        elif isinstance(value, list) and value:
            inner = ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in value)
            parts.append(f"{json.dumps(name)}: [\n  {inner}\n ]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"
