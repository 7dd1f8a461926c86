"""Everything that saves: killed, interrupted, or on a full disk, it leaves what was there before or what was to come.

It stands here because every package's files are written in it, and figures need them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

# `save(n)` writes something made of the number n to `path`; `load()` returns the number, and fails if it is not whole.
SAVERS = {
    "Result": """
        from nnterp.interventions import Result
        def save(n):
            Result({"x": torch.full((SIZE,), float(n))}, {"x": ("a",)}, {"a": ROWS}, about={"n": n}).save(path)
        def load():
            found = Result.load(path)
            assert bool((found["x"] == found.about["n"]).all())
            return found.about["n"]
    """,
    "Collected": """
        from nnterp.collection import Collected
        from nnterp.inputs import Row
        def save(n):
            whole = torch.full((1, SIZE), float(n))
            mask = torch.ones(1, 1, dtype=torch.bool)
            Collected({"logits": whole}, {"logits": ()}, ((n,),), mask, (Row((n,)),)).save(path)
        def load():
            found = Collected.load(path)
            assert bool((found["logits"] == found.rows[0].ids[0]).all())
            return found.positions[0][0]
    """,
    "PromptResults": """
        from nnterp.prompts import PromptResults
        def save(n):
            prompts = [f"prompt {n}"] * (SIZE // 10)
            made = PromptResults(["target"], prompts, [{}] * len(prompts), {"scoring": "first_token", "n": n}, prompts)
            for i in range(len(prompts)):
                made._record(i, torch.full((1,), -float(n)), None)
            made._fill()
            made.save(path)
        def load():
            found = PromptResults.load(path)
            assert bool((found.log_probs[0] == -found.settings["n"]).all())
            assert set(found.texts) == {f"prompt {found.settings['n']}"}
            return found.settings["n"]
    """,
    "Certificate": """
        from nnterp.certificate import Certificate, Line
        def save(n):
            lines = tuple(Line(f"line {n}", "ok") for _ in range(SIZE // 20))
            fields = {f.name: "" for f in dataclasses.fields(Certificate)}
            Certificate(**{**fields, "lines": lines, "seconds": n}).save(path)
        def load():
            found = Certificate.load(path)
            assert {line.name for line in found.lines} == {f"line {found.seconds}"}
            return found.seconds
    """,
    "figure": """
        import plotly.graph_objects as go
        from nnterp import display
        def save(n):
            display.save(go.Figure(go.Scatter(y=[n] * (SIZE // 20))), path.with_suffix(".html"), title=str(n))
        def load():
            page = path.with_suffix(".html").read_text()
            assert page.endswith("</body></html>\\n")
            return int(page.split("<title>")[1].split("</title>")[0])
    """,
}

# Runs in a process of its own, which forks one for each trial and prints what became of it.
PROGRAM = """
import dataclasses, json, os, random, resource, signal, sys, time, traceback
from pathlib import Path
import torch
SIZE = 40_000
ROWS = tuple(range(SIZE))

def forked(work):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)

def killed(save, load):
    save(0)
    for _ in range(4):
        def work():
            n = 0
            while True:
                n += 1
                save(n)
        pid = forked(work)
        time.sleep(random.uniform(0.01, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        load()

def interrupted(save, load):
    save(0)
    told, tell = os.pipe()
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        last = n = stopped = 0
        while stopped < 6:
            try:
                os.write(tell, b".")
                while True:
                    n += 1
                    save(n)
                    last = n
            except KeyboardInterrupt:
                stopped += 1
                there = load()
                assert there in (last, n), (there, last, n)
    pid = forked(work)
    for _ in range(6):
        os.read(told, 1)
        time.sleep(random.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGINT)
    assert os.waitpid(pid, 0)[1] == 0

def full(save, load):
    save(1)
    def work():
        there = sorted(p.name for p in path.parent.rglob("*"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(2)
        except OSError:
            assert load() == 1
            assert sorted(p.name for p in path.parent.rglob("*")) == there
        else:
            raise AssertionError("nothing was raised")
    assert os.waitpid(forked(work), 0)[1] == 0

found = {}
for name, code in json.loads(sys.argv[2]).items():
    for trial in (killed, interrupted, full):
        folder = Path(sys.argv[1]) / f"{name} {trial.__name__}"
        folder.mkdir()
        path = folder / "saved"
        scope = {"path": path, "SIZE": SIZE, "ROWS": ROWS, "torch": torch, "dataclasses": dataclasses}
        exec(code, scope)
        try:
            trial(scope["save"], scope["load"])
            found[f"{name} {trial.__name__}"] = "whole"
        except BaseException:
            found[f"{name} {trial.__name__}"] = traceback.format_exc()
print(json.dumps(found))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and signals of POSIX")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Saver and trial → "whole", or what went wrong."""
    savers = json.dumps({name: textwrap.dedent(code) for name, code in SAVERS.items()})
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("saved")), savers]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


@pytest.mark.parametrize("trial", ["killed", "interrupted", "full"])
@pytest.mark.parametrize("saver", SAVERS)
def test_it_is_whole(found, saver, trial):
    assert found[f"{saver} {trial}"] == "whole", found["stderr"]
