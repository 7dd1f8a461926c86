"""Everything that saves: killed, interrupted, or on a full disk, it leaves what was there before or what was to come.

It stands here because every package's files are written in it, and figures need them all.
"""

from __future__ import annotations

import random
import signal
import sys
import textwrap
import time

import pytest

# `save(n)` writes something made of the number n; `load()` returns the number, and raises if the file is not whole.
SAVERS = {
    "Result": """
        from nnterp.interventions import Result
        def save(n):
            Result({"x": torch.full((SIZE,), float(n))}, {"x": ("a",)}, {"a": ROWS}, about={"n": n}).save(PATH)
        def load():
            found = Result.load(PATH)
            assert bool((found["x"] == found.about["n"]).all())
            return found.about["n"]
    """,
    "Collected": """
        from nnterp.collection import Collected
        from nnterp.inputs import Row
        def save(n):
            whole = torch.full((1, SIZE), float(n))
            mask = torch.ones(1, 1, dtype=torch.bool)
            Collected({"logits": whole}, {"logits": ()}, ((n,),), mask, (Row((n,)),)).save(PATH)
        def load():
            found = Collected.load(PATH)
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
            made.save(PATH)
        def load():
            found = PromptResults.load(PATH)
            assert bool((found.log_probs[0] == -found.settings["n"]).all())
            assert set(found.texts) == {f"prompt {found.settings['n']}"}
            return found.settings["n"]
    """,
    "Certificate": """
        from nnterp.certificate import Certificate, Line
        def save(n):
            lines = tuple(Line(f"line {n}", "passed") for _ in range(SIZE // 20))
            fields = {f.name: "" for f in dataclasses.fields(Certificate)} | {"drift": None}
            Certificate(**{**fields, "lines": lines, "seconds": n}).save(PATH)
        def load():
            found = Certificate.load(PATH)
            assert {line.name for line in found.lines} == {f"line {found.seconds}"}
            return found.seconds
    """,
    "figure": """
        import plotly.graph_objects as go
        from nnterp import display
        def save(n):
            display.save(go.Figure(go.Scatter(y=[n] * (SIZE // 20))), PATH.with_suffix(".html"), title=str(n))
        def load():
            page = PATH.with_suffix(".html").read_text()
            assert page.endswith("</body></html>\\n")
            return int(page.split("<title>")[1].split("</title>")[0])
    """,
}
BEGIN = """
    import dataclasses, resource, signal, sys
    from pathlib import Path
    import torch
    PATH, SIZE = Path(sys.argv[1]), 40_000
    ROWS = tuple(range(SIZE))
"""
ENDS = {
    "killed": """
        save(0)
        print("ready", flush=True)
        n = 0
        while True:
            n += 1
            save(n)
    """,
    "interrupted": """
        save(0)
        last = n = stopped = 0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # it waits until there is something to interrupt
        print("ready", flush=True)
        while stopped < 8:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                while True:
                    n += 1
                    save(n)
                    last = n
            except KeyboardInterrupt:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                stopped += 1
                assert load() in (last, n), (load(), last, n)
                print(stopped, flush=True)
        print("whole", flush=True)
    """,
    "full": """
        save(1)
        there = sorted(p.name for p in PATH.parent.rglob("*"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(2)
        except OSError as error:
            print(type(error).__name__, flush=True)
        assert load() == 1
        assert sorted(p.name for p in PATH.parent.rglob("*")) == there
        print("whole", flush=True)
    """,
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]


def program(saver, end=""):
    return "\n".join(textwrap.dedent(part) for part in (BEGIN, SAVERS[saver], ENDS.get(end, "")))


@pytest.mark.parametrize("saver", SAVERS)
def test_killed(processes, saver, tmp_path, monkeypatch):
    with processes.running(program(saver, "killed"), str(tmp_path / "saved")) as child:
        assert child.stdout.readline() == "ready\n", child.said
        time.sleep(random.uniform(0.02, 0.5))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, child.said
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "saved")])
    names = {}
    exec(program(saver), names)
    assert names["load"]() >= 0


@pytest.mark.parametrize("saver", SAVERS)
def test_interrupted(processes, saver, tmp_path):
    with processes.running(program(saver, "interrupted"), str(tmp_path / "saved")) as child:
        assert child.stdout.readline() == "ready\n", child.said
        for k in range(8):
            time.sleep(0.02 + 0.017 * k)
            child.send(signal.SIGINT)
            assert child.stdout.readline().strip() == str(k + 1), child.said
        assert child.stdout.read() == "whole\n", child.said
        assert child.wait() == 0, child.said


@pytest.mark.parametrize("saver", SAVERS)
def test_a_disk_without_room(processes, saver, tmp_path):
    out, said, failed = processes.run(program(saver, "full"), str(tmp_path / "saved"))
    assert out.splitlines() == ["OSError", "whole"], out + said
    assert not failed, said
