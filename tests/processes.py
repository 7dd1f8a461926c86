"""New Python processes without the seconds that importing torch takes: forked from one that has imported it.

That one has imported what nnterp requires of other packages and nothing of nnterp, so a program imports nnterp anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# Forks a process for each line that it reads: a program's file, its arguments, and files for what it prints.
LAUNCHER = """
import gc
import json
import os
import runpy
import sys
import traceback

import nnsight
import torch
import transformers
from transformers import PreTrainedModel  # transformers imports a name's module when it is asked for
from transformers.generation import StoppingCriteriaList

assert not [name for name in sys.modules if name.split(".")[0] in ("nnterp", "plotly", "pandas")]
gc.collect()
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    program, arguments, out, err = json.loads(line)
    pid = os.fork()
    if not pid:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv, code = [program, *arguments], 1
        try:
            runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Child:
    """A running program.

    Attributes:
        pid: Its process.
        stdout: What it prints, as it prints it.
    """

    pid: int
    stdout: IO[str]
    _said: Path
    _launcher: Launcher
    _code: int | None = None

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it; waits for its end."""
        if self._code is None:
            self._code = self._launcher.answer()
        return self._code

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return self._said.read_text()


class Launcher:
    """Runs programs, one at a time, each in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.answers, self.requests = self.process.stdout, self.process.stdin
        assert self.answers.readline() == "ready\n"

    def answer(self) -> int:
        """The next number that it prints."""
        return int(self.answers.readline())

    def close(self) -> None:
        """End it."""
        self.requests.close()
        self.process.wait()

    @contextlib.contextmanager
    def running(self, program: str, *arguments: str) -> Iterator[Child]:
        """Run a program as a file; it is killed at the end of the block if it has not ended."""
        with tempfile.TemporaryDirectory() as folder:
            file, out, said = (Path(folder) / name for name in ("program.py", "out", "said"))
            file.write_text(program)
            said.touch()
            os.mkfifo(out)
            print(json.dumps([str(file), arguments, str(out), str(said)]), file=self.requests, flush=True)
            child = Child(self.answer(), out.open(), said, self)
            try:
                yield child
            finally:
                if child._code is None:
                    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                        child.send(signal.SIGKILL)
                    child.wait()
                child.stdout.close()

    def run(self, program: str, *arguments: str) -> tuple[str, str, int]:
        """What a program prints, what it writes to stderr, and its exit code."""
        with self.running(program, *arguments) as child:
            out = child.stdout.read()
            return out, child.said, child.wait()
