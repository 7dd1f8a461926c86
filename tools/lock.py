"""Write `requirements.lock`: the versions that the tests run with, with hashes, for plain pip.

    uv run python tools/lock.py
    pip install --require-hashes -r requirements.lock

It is what uv resolves from `pyproject.toml` as it stands, for every platform and Python that the packages allow,
without the packages themselves. It names no registry: pip takes the files from the one that it is set up for, and the
hashes say whether they are the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEAD = """\
# What nnterp's tests run with, for plain pip: pip install --require-hashes -r requirements.lock
# Then the packages themselves:
#   pip install --no-deps nnterp nnterp-core nnterp-interventions nnterp-prompts nnterp-display
# Written by `uv run python tools/lock.py`; do not edit.
"""


def resolved(root: Path = ROOT) -> str:
    """The text of the file.

    Raises:
        RuntimeError: uv could not resolve; with what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:  # uv.lock of the working tree stays as it is
        for project in (root / "pyproject.toml", *sorted((root / "packages").glob("*/pyproject.toml"))):
            copy = Path(scratch) / project.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project, copy)
        # A folder with a build of torch of this machine's own is no part of what others get.
        kept = {name: value for name, value in os.environ.items() if name not in {"UV_FIND_LINKS", "VIRTUAL_ENV"}}
        what = ("--package", "nnterp", "--extra", "all", "--no-dev", "--no-emit-workspace")
        command = ("uv", "export", "--quiet", "--no-header", "--no-annotate", *what)
        done = subprocess.run(command, cwd=scratch, env=kept, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return HEAD + "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("#"))


def pinned(text: str) -> dict[str, str]:
    """Package → version, of the text of such a file."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+]+)", text, flags=re.MULTILINE))


def main() -> int:
    """Write the file."""
    text = resolved()
    LOCK.write_text(text, encoding="utf-8")
    print(f"wrote {LOCK.relative_to(ROOT)}: {len(pinned(text))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
