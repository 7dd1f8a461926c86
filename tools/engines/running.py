"""Running engines as child processes, and comparing what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cells import CELLS
from comparing import Outcome, outcomes
from environments import BY_ADAPTER, CHECKPOINTS, REFERENCE, python_of
from results import Results
from safetensors.torch import load_file

HERE = Path(__file__).parent


def child(folder: Path, adapter: str, script: str, job: dict) -> int:
    """Run a script in an engine's environment, quietly and with low priority. Returns its exit status."""
    file = folder / "jobs" / f"{script}-{job.get('adapter', '')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = ["nice", "-n", "10", str(python_of(folder, adapter)), str(HERE / f"{script}.py"), str(file)]
    with open(file.with_suffix(".log"), "w") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode


def prepare(folder: Path, types: Sequence[str]) -> list[str]:
    """Make the checkpoints and the reference. Returns the types that have one."""
    job = {"types": list(types), "checkpoints": str(folder / "checkpoints"), "out": str(folder / "reference")}
    (folder / "reference").mkdir(parents=True, exist_ok=True)
    for adapter, script in ((CHECKPOINTS, "checkpoints"), (REFERENCE, "reference")):
        if status := child(folder, adapter, script, job):
            raise SystemExit(f"{script}.py ended with status {status}: see {folder / 'jobs'}")
    return [t for t in types if "none" not in facts_of(folder, t)]


def run(folder: Path, adapter: str, types: Sequence[str]) -> None:
    """Run one engine over types. One that ends the process is noted and passed over."""
    out = folder / adapter
    out.mkdir(parents=True, exist_ok=True)
    (out / "current").unlink(missing_ok=True)
    left = list(types)
    while left:
        job = {"adapter": adapter, "types": left, "out": str(out)}
        job |= {"checkpoints": str(folder / "checkpoints"), "reference": str(folder / "reference")}
        status = child(folder, adapter, "child", job)
        if status == 0:
            return
        if not (out / "current").exists():
            raise SystemExit(f"{adapter} did not begin (status {status}): see {folder / 'jobs'}")
        fatal = (out / "current").read_text()
        report = {"errors": {"load": f"the process ended with status {status}"}, "warned": {}, "seconds": 0}
        (out / f"{fatal}.json").write_text(json.dumps(report))
        (out / f"{fatal}.safetensors").unlink(missing_ok=True)
        left = left[left.index(fatal) + 1 :]


def facts_of(folder: Path, model_type: str) -> dict:
    return json.loads((folder / "reference" / f"{model_type}.json").read_text())


def offered(adapter: str) -> list[str]:
    """The cells that an adapter has a function for, read off its source: its engine need not be installed here."""
    source = (HERE / "adapters" / f"{adapter}.py").read_text(encoding="utf-8")
    return [cell for cell in CELLS if f"\ndef {cell}(" in source]


def compared(folder: Path, adapter: str, model_type: str) -> dict[str, Outcome]:
    """What came of all cells of one engine and model type."""
    report = json.loads((folder / adapter / f"{model_type}.json").read_text())
    written = folder / adapter / f"{model_type}.safetensors"
    given = load_file(written) if written.exists() else {}
    reference = load_file(folder / "reference" / f"{model_type}.safetensors")
    facts = facts_of(folder, model_type)
    return outcomes(facts, reference, given, report["errors"], offered(adapter), list(CELLS))


def collected(folder: Path, types: Sequence[str], every: int, adapters: Sequence[str] = tuple(BY_ADAPTER)) -> Results:
    """All outcomes of what was run in a folder. `types` are every `every`th of all."""
    facts = {t: facts_of(folder, t) for t in types}
    there = [t for t in types if "none" not in facts[t]]
    found, versions, seconds = {}, {}, {}
    for adapter in adapters:
        found[adapter] = {t: compared(folder, adapter, t) for t in there}
        versions[adapter] = json.loads((folder / adapter / "versions.json").read_text())
        times = [json.loads((folder / adapter / f"{t}.json").read_text())["seconds"] for t in there]
        seconds[adapter] = round(sorted(times)[len(times) // 2], 2)
    return Results(
        {
            "every": every,
            "date": datetime.now(UTC).date().isoformat(),
            "versions": versions,
            "median seconds a type": seconds,
        },
        found,
        {t: facts[t]["none"] for t in types if "none" in facts[t]},
        {t: facts[t]["huggingface"] for t in there if facts[t]["huggingface"]},
    )
