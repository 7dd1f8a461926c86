"""Runs one engine's adapter over checkpoints, in the engine's own environment.

    python child.py JOB.json

Of each model type it writes the tensors that the engine gave, and what it said where it gave none. A cell or a layer
that raises does not stop the others; what takes longer than a minute of CPU time is given up.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from cells import CELLS, HEAD, left_padded, own_tokens
from safetensors.torch import load_file, save_file

SECONDS = 60
KEPT = 400


@contextmanager
def limited():
    """An error where a block takes more than `SECONDS` of CPU time."""

    def late(*args):
        raise TimeoutError(f"given up after {SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def said(error: BaseException) -> str:
    """An error in one line: its kind, and its message, or the last line of that if it is a traceback."""
    text = str(error).strip()
    text = text.splitlines()[-1] if text.startswith("Traceback") else " ".join(text.split())
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= KEPT else f"{text[: KEPT // 2]} ... {text[-KEPT // 2 :]}"


class Loudness(logging.Handler):
    """What an engine says through logging, beside what it says through warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(" ".join(record.getMessage().split())[:KEPT])


class Run:
    """One engine on one model type."""

    def __init__(self, adapter, folder: Path, facts: dict, vector: torch.Tensor | None) -> None:
        self.adapter, self.folder, self.facts, self.vector = adapter, folder, facts, vector
        self.tensors: dict[str, torch.Tensor] = {}
        self.errors: dict[str, str] = {}
        self.warned: dict[str, list[str]] = {}
        self.rows = facts["rows"]
        self.ids = torch.tensor([self.rows[0]])
        self.batch = left_padded(self.rows, facts["padding"])

    def everything(self) -> None:
        model = self.attempt("load", lambda: self.adapter.load(self.folder), kept=False)
        if "load" in self.errors:
            return
        for cell in CELLS:
            places = self.facts["cells"].get(cell, ())
            if not places or not hasattr(self.adapter, cell):
                continue
            if cell == "pattern" and getattr(self.adapter, "PATTERN_IS_LOADED", False):
                eager = self.attempt("load for patterns", lambda: self.adapter.load(self.folder, True), kept=False)
                if "load for patterns" in self.errors:
                    self.errors |= {f"pattern.{i}": self.errors["load for patterns"] for i in places}
                    continue
            else:
                eager = model
            for place in places:
                self.attempt(f"{cell}.{place}", lambda c=cell, p=place, m=eager: self.one(m, c, p))

    def one(self, model, cell: str, place: int | str) -> torch.Tensor:
        adapter = self.adapter
        if cell in ("stream", "pattern", "attention", "mlp"):
            return getattr(adapter, cell)(model, self.ids, place)
        if cell == "readout":
            return adapter.readout(model, self.ids, self.facts["last"])
        if cell == "write":
            return adapter.write(model, self.ids, place, self.vector)
        if cell == "head":
            return adapter.head(model, self.ids, place, HEAD)
        if place == "logits":
            both = adapter.padded_logits(model, self.rows, *self.batch)
        else:
            both = adapter.padded(model, self.rows, *self.batch, place)
        return own_tokens(torch.as_tensor(both), self.rows)

    def attempt(self, what: str, work, kept: bool = True):
        loud = Loudness()
        logging.getLogger().addHandler(loud)
        try:
            with warnings.catch_warnings(record=True) as caught, torch.no_grad(), limited():
                warnings.simplefilter("always")
                value = work()
            if kept:
                self.tensors[what] = torch.as_tensor(value).detach().float().clone().contiguous()
            return value
        except Exception as error:
            self.errors[what] = said(error)
            return None
        finally:
            logging.getLogger().removeHandler(loud)
            own = [w for w in caught if self.adapter.NAME in str(w.filename)]
            texts = [*loud.texts, *(" ".join(str(w.message).split())[:KEPT] for w in own)]
            if texts:
                self.warned[what] = list(dict.fromkeys(texts))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    adapter = importlib.import_module(f"adapters.{job['adapter']}")
    out, reference = Path(job["out"]), Path(job["reference"])
    (out / "versions.json").write_text(json.dumps({name: version(name) for name in adapter.PACKAGES}))
    for model_type in job["types"]:
        facts = json.loads((reference / f"{model_type}.json").read_text())
        vector = load_file(reference / f"{model_type}.safetensors").get("vector")
        (out / "current").write_text(model_type)
        begun = time.process_time()
        run = Run(adapter, Path(job["checkpoints"]) / model_type, facts, vector)
        run.everything()
        save_file(run.tensors, out / f"{model_type}.safetensors")
        report = {"errors": run.errors, "warned": run.warned, "seconds": round(time.process_time() - begun, 2)}
        (out / f"{model_type}.json").write_text(json.dumps(report))
    (out / "current").unlink(missing_ok=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
