"""Run the core of the test suite with the lowest and the highest versions allowed; write `docs/compatibility.md`.

    uv run python tools/versions.py                  # all settings
    uv run python tools/versions.py lowest highest   # some of them

Each setting gets an environment of its own in `build/versions`, made by uv for what the packages themselves allow: what
the workspace pins for its own tests has no say. The rows of the settings that ran are replaced on the page, with what
was installed and what came out; rows of other settings stay. A setting whose Python is not on the path is a row that
says so. The shims of pyenv find only the versions that PYENV_VERSION names: `PYENV_VERSION=3.11.7:3.12.1:3.13.0`.

Run it from a clone that nobody edits meanwhile: nnsight reads source files while it traces.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
ENVIRONMENTS = ROOT / "build" / "versions"

# What depends on the versions of others: how a model is found, proven, traced and written to, on every way of building
# one, looped ones and those with images or an encoder too; caches and generation; each package's main functions.
CORE = """
tests/core/test_certificate_zoo.py tests/core/test_looped.py tests/core/test_images.py
tests/core/test_encoder_decoder.py tests/core/test_generation.py tests/core/test_skipping.py
tests/core/values/test_attention.py tests/core/values/test_states.py tests/core/values/test_experts.py
tests/core/values/test_linear.py tests/interventions/test_lens.py tests/interventions/test_patching.py
tests/interventions/test_sweep.py tests/interventions/test_looped.py tests/interventions/test_images.py
tests/prompts/test_toy.py tests/display/test_figures.py
""".split()
# Certificates alone: do all ways of building a model load and hold?
CERTIFICATES = ["tests/core/test_certificate_zoo.py", "tests/core/values/test_attention.py"]
TESTS = {"core of the suite": (CORE, "not slow"), "certificates": (CERTIFICATES, "not slow")}
SHOWN = ("transformers", "torch", "nnsight", "accelerate", "huggingface-hub", "plotly", "pandas")
HEADING = ("setting", "Python", *SHOWN, "ran", "passed", "skipped", "failed")
UNTESTED = "untested: no such Python where this table was made"


@dataclass(frozen=True)
class Setting:
    """Versions to try, and the tests to try them with."""

    name: str
    python: str
    resolution: str = "highest"
    pins: tuple[str, ...] = ()
    tests: str = "core of the suite"


MINORS = [f"5.{minor}" for minor in range(17, 25)]
SETTINGS = (
    Setting("lowest", "3.11", resolution="lowest-direct"),
    # Not with 3.13: pandas 2.2.2 and sentencepiece 0.2.0 have no wheels for it, and an installer takes newer ones.
    Setting("lowest, 3.12", "3.12", resolution="lowest-direct", tests="certificates"),
    *(
        Setting(minor, "3.11", pins=(f"transformers=={minor}.*", "torch==2.13.*"), tests="certificates")
        for minor in MINORS
    ),
    Setting("highest", "3.13"),
    Setting("highest, 3.12", "3.12", tests="certificates"),
    Setting("highest, 3.11", "3.11", tests="certificates"),
)


@dataclass
class Outcome:
    """A row of the page."""

    setting: Setting
    installed: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    untested: str = ""

    def cells(self) -> list[str]:
        """The row's cells, in the order of `HEADING`."""
        python = self.installed.get("python", self.setting.python)
        if self.untested:
            return [self.setting.name, python, *["–"] * len(SHOWN), self.untested, "–", "–", "–"]
        versions = [self.installed.get(name, "–") for name in SHOWN]
        counts = [str(self.counts[status]) for status in ("passed", "skipped", "failed")]
        return [self.setting.name, python, *versions, self.setting.tests, *counts]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command away from this workspace's own environment."""
    kept = {
        name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"}
    }
    if "UV_FIND_LINKS" not in kept and kept.get("PIP_FIND_LINKS"):
        kept["UV_FIND_LINKS"] = ",".join(kept["PIP_FIND_LINKS"].split())
    return subprocess.run([*map(str, command)], cwd=ROOT, env=kept | environment, text=True, capture_output=True)


def requirements() -> list[str]:
    """The four packages with the extras that their tests need, and pytest."""
    extras = {"nnterp-interventions": "[probe,gguf]", "nnterp-prompts": "[dataframe]"}
    packages = sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml"))
    editable = [word for path in packages for word in ("-e", f"{path}{extras.get(path.name, '')}")]
    return [*editable, "pytest>=9", "pytest-xdist>=3.8", "ipython>=9"]


def install(setting: Setting, keep: bool = False) -> tuple[Path | None, str]:
    """Make the environment of a setting, or `keep` the one that is there: its Python; or None and why not."""
    if run("uv", "python", "find", "--no-project", setting.python).returncode:
        return None, UNTESTED
    folder = ENVIRONMENTS / re.sub(r"[^\w.]+", "-", setting.name)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if keep and python.exists():
        return python, ""
    made = run("uv", "venv", "--quiet", "--no-project", "--clear", "--python", setting.python, folder)
    if made.returncode == 0:
        wanted = [*requirements(), *setting.pins]
        options = ("--quiet", "--no-config", "--resolution", setting.resolution, "--python", python)
        made = run("uv", "pip", "install", *options, *wanted)
    if made.returncode:
        print(made.stderr, file=sys.stderr)
        return None, "untested: could not be installed"
    return python, ""


def versions_in(python: Path) -> dict[str, str]:
    """What is installed."""
    program = (
        "import platform; from importlib.metadata import version; print('python', platform.python_version())\n"
        f"for name in {SHOWN}: print(name, version(name))"
    )
    return dict(line.split() for line in run(python, "-c", program).stdout.splitlines())


def examine(setting: Setting, keep: bool) -> Outcome:
    """Install a setting and run its tests."""
    outcome = Outcome(setting)
    python, outcome.untested = install(setting, keep)
    if python is None:
        return outcome
    outcome.installed = versions_in(python)
    files, marks = TESTS[setting.tests]
    report = ENVIRONMENTS / f"{python.parents[1].name}.xml"
    options = ("-q", "-p", "no:cacheprovider", "-m", marks, f"--junit-xml={report}", *pytest_options())
    done = run(python, "-m", "pytest", *options, *files, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    (ENVIRONMENTS / f"{python.parents[1].name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode not in (0, 1):
        sys.exit(f"{setting.name}: pytest did not run\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    read_report(report, outcome)
    return outcome


def pytest_options() -> list[str]:
    """Options for pytest from the environment variable PYTEST_VERSIONS, such as "-n auto"."""
    return os.environ.get("PYTEST_VERSIONS", "-n auto").split()


def read_report(report: Path, outcome: Outcome) -> None:
    """Count what pytest's report says."""
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        status = "skipped" if found == {"skipped"} else "failed" if found else "passed"
        outcome.counts[status] += 1
        if status == "failed":
            outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows that the page has, by setting."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row for row in cells if len(row) == len(HEADING) and row[0] in {s.name for s in SETTINGS}}


def page(rows: dict[str, list[str]]) -> str:
    """The page's text."""
    listed = [rows.get(setting.name) or Outcome(setting, untested="untested").cells() for setting in SETTINGS]
    lines = [
        "# Compatibility",
        "",
        "What the tests ran with, from the lowest versions that the packages allow to the highest. An installer",
        "chooses any versions in between.",
        "",
        *(f"| {' | '.join(row)} |" for row in (HEADING, ["---"] * len(HEADING), *listed)),
        "",
        "- **core of the suite**: certificates of every way of building a model, attention's values, states,",
        "  experts, linear attention, generation, skipping, lenses, patching, prompts and figures; models whose layers",
        "  run several times, models with images and models with an encoder. **certificates**: the first two.",
        "- Skipped tests are of model types that an older transformers does not have yet.",
        "",
        "All tests run with the versions of `requirements.lock`, a file of this repository with hashes for plain pip:",
        "`pip install --require-hashes -r requirements.lock`.",
        "",
        "Written by `uv run python tools/versions.py`, which makes each environment and runs the tests; do not edit.",
        "[CONTRIBUTING](../CONTRIBUTING.md) says when to run it.",
    ]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    """Examine settings and write the page."""
    parser = argparse.ArgumentParser(description="Run the core of the suite with the lowest and the highest versions.")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(s.name for s in SETTINGS)}")
    parser.add_argument("--keep", action="store_true", help="run in the environments that are there already")
    given = parser.parse_args(words)
    chosen = given.settings
    known = {setting.name: setting for setting in SETTINGS}
    if unknown := set(chosen) - known.keys():
        parser.error(f"no setting is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = rows_of(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    failed = False
    for setting in (known[name] for name in chosen or known):
        outcome = examine(setting, given.keep)
        print(" | ".join(outcome.cells()), *outcome.failed, sep="\n  ", flush=True)
        rows[setting.name] = outcome.cells()
        PAGE.write_text(page(rows), encoding="utf-8")
        failed |= bool(outcome.failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
