"""How costs are measured: a plain HuggingFace run and the work take turns, and each round gives a ratio."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

Run = Callable[[], object]


@dataclass
class Line:
    """One cost.

    Attributes:
        group: What it belongs to.
        name: What is done.
        plain: The run of the plain HuggingFace model on the same input.
        work: What is measured.
        units: Into how many parts the work is divided (cells of a sweep, steps).
        aim: The ratio that it should not exceed.
        peers: Others' ways to the same result, measured in the same rounds.
    """

    group: str
    name: str
    plain: Run
    work: Run
    units: int = 1
    aim: float | None = None
    peers: dict[str, Run] = field(default_factory=dict)


@dataclass
class Figure:
    """Ratios of one way of one line, one for each round, and the seconds of the plain run."""

    group: str
    name: str
    way: str
    ratios: list[float]
    plain_seconds: float
    aim: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> str:
        return f"{min(self.ratios):.2f} – {max(self.ratios):.2f}"


def measure(line: Line, rounds: int, cpu: bool) -> list[Figure]:
    """The figures of a line: nnterp's own first, then its peers'."""
    ways = {"nnterp": line.work, **line.peers}
    spent = {name: [] for name in ways}
    plains = []
    timed(line.plain, cpu)
    for run in ways.values():
        timed(run, cpu)
    for turn in range(rounds):
        plains.append(timed(line.plain, cpu))
        for name in ways if turn % 2 else reversed(ways):
            spent[name].append(timed(ways[name], cpu) / plains[-1] / line.units)
    seconds = statistics.median(plains)
    return [
        Figure(line.group, line.name, name, ratios, seconds, line.aim if name == "nnterp" else None)
        for name, ratios in spent.items()
    ]


def timed(run: Run, cpu: bool) -> float:
    """Seconds of a run: of this process' CPU, or of the clock, a GPU's work included."""
    clock = time.process_time if cpu else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on and with."""
    packages = ("nnterp-core", "nnsight", "transformers", "torch", "interp-engine", "repeng")
    found = {"device": device_name(device), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
