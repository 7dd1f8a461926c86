"""Wheels of all five distributions, built once, and fresh environments to install them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    """The longest tests first, which keeps them in the first worker's share and out of the end."""
    items.sort(key=lambda item: item.get_closest_marker("packaging") is None)


def clean_environment() -> dict[str, str]:
    """This process's environment without what ties it to the workspace."""
    dropped = {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "UV_PROJECT_ENVIRONMENT"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("PYTEST")}
    if "UV_FIND_LINKS" not in kept and kept.get("PIP_FIND_LINKS"):
        kept["UV_FIND_LINKS"] = ",".join(kept["PIP_FIND_LINKS"].split())
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, cwd: Path = ROOT, bytecode: Path | None = None) -> str:
    """Output of a command; a failed one fails the test with all it printed."""
    environment = clean_environment()
    if bytecode is not None:
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def uv() -> str:
    """The uv that runs the tests, or the one on the path."""
    found = os.environ.get("UV") or shutil.which("uv")
    if found is None:
        pytest.fail("Packages are built and installed with uv, which is not here: pip install uv")
    return found


@pytest.fixture(scope="session")
def wheels(uv, tmp_path_factory) -> dict[str, Path]:
    """Distribution name → its wheel, built from this working tree."""
    folder = tmp_path_factory.mktemp("wheels")
    run(uv, "build", "--quiet", "--all-packages", "--wheel", "--out-dir", folder)
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in sorted(folder.glob("*.whl"))}


@dataclass
class Environment:
    """A virtual environment with nothing in it but what a test installs."""

    uv: str
    folder: Path

    @property
    def bytecode(self) -> Path:
        return self.folder.parent / "bytecode"

    @property
    def programs(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def install(self, *wheels: Path) -> None:
        """Install wheels as a user would: their dependencies come from wherever uv finds them."""
        # Run in the workspace's root for its [tool.uv]: the same dated registry, the same torch.
        run(self.uv, "pip", "install", "--quiet", "--python", self.folder, *wheels)
        run(self.uv, "pip", "check", "--python", self.folder)

    def installed(self) -> set[str]:
        """The distributions that are there, with their versions."""
        return set(run(self.uv, "pip", "list", "--quiet", "--format", "freeze", "--python", self.folder).split())

    def nnterp(self, *arguments: str) -> str:
        """Output of the `nnterp` command."""
        return run(self.programs / "nnterp", *arguments, cwd=self.folder, bytecode=self.bytecode)

    def python(self, code: str) -> str:
        """Output of a program, run from a file in an empty folder."""
        folder = self.folder.parent / "empty"
        folder.mkdir(exist_ok=True)
        program = folder.parent / "program.py"
        program.write_text(textwrap.dedent(code))
        return run(self.programs / "python", program, cwd=folder, bytecode=self.bytecode)


@pytest.fixture
def environment(uv, tmp_path_factory) -> Environment:
    """A fresh virtual environment of this interpreter."""
    folder = (
        tmp_path_factory.getbasetemp() / "environment" / "venv"
    )  # one place, so that bytecode compiled once serves all
    run(uv, "venv", "--quiet", "--no-project", "--clear", "--python", sys.executable, folder)
    return Environment(uv, folder)
