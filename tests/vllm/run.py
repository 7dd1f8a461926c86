"""Run the tests of this folder on tiny random checkpoints and the toy, and the snippets of the page, two at a time.

HuggingFace's numbers come from processes that were forked before vLLM was imported, which happens once; those of
`validate()` too, except on the page, which starts a process of its own as users do.

    python tests/vllm/run.py                    # all
    python tests/vllm/run.py gpt2 page          # some
"""

import fcntl
import json
import os
import re
import runpy
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "NNTERP_CACHE": "off",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}  # vLLM knows heads of 32
OPTIONS = {
    "gpt2": {"block_size": 32, "num_gpu_blocks_override": 10},  # too little memory for several generations
    "toy in bfloat16": {"dtype": "bfloat16"},
}
ONLY = {  # the first is proven in its own dtype, the second costs to read everything, the last is large
    "toy in bfloat16": "certificate_proves",
    "helium": "huggingface or of_all_positions or lens or greedy or certificate",
    "smollm2": "is_that_of_huggingface or of_all_positions or lens or greedy",
}
CHECKPOINTS = {
    "gpt2": {"n_embd": 64, "n_head": 2},
    "qwen3": SMALL,
    "gemma3_text": {**SMALL, "query_pre_attn_scalar": 32},
    "mixtral": {**SMALL, "intermediate_size": 64},
    "helium": {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1},  # by vLLM's Transformers backend
}


REAL = Path("~/.cache/nnterp/real-models/smollm2").expanduser()  # a trained model, if tools/real_models.py made it
PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
SAYS = re.compile(r"^print\((.*)\)  # → (.*)$", flags=re.MULTILINE)


def ran(program):
    """Exit status of a page's snippets: each `print(x)  # → y` has to print y."""
    source = program.read_text()
    assert SAYS.search(source)
    program.write_text(SAYS.sub(lambda m: f"assert str({m[1]}).strip() == {m[2]!r}, {m[1]}", source))
    try:
        runpy.run_path(str(program), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(work, log):
    """The id of a process of its own that does some work, and writes what it prints to a file."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        code = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def together(jobs, kept):
    """Do some jobs, two at a time, and print what each printed; returns the names of those that failed."""
    left, running, failed = list(jobs), {}, []
    while left or running:
        while left and len(running) < 2:
            name = left.pop(0)
            running[forked(jobs[name], f"{kept}/log of {len(jobs) - len(left)}")] = name, len(jobs) - len(left)
        child, status, used = os.wait4(-1, 0)
        name, number = running.pop(child)
        print(
            f"--- {name}: {used.ru_utime + used.ru_stime:.0f} s of CPU",
            Path(f"{kept}/log of {number}").read_text(errors="replace"),
            sep="\n",
            flush=True,
        )
        if status:
            failed.append(name)
    return failed


def page(kept):
    """Run the page's snippets as one program."""
    program = Path(kept) / "page.py"
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    program.write_text("\n".join(snippets))
    os.chdir(kept)
    os.environ["NNTERP_CACHE"] = str(Path(kept) / "proofs")
    return ran(program)


def eager(folder, out):
    """Write the dataset of the eager model."""
    import reference

    import nnterp

    model = nnterp.StandardizedTransformer(folder, device_map="cpu")
    values = ["layers_output", "attention_queries", "next_token_probs"]
    model.collect([list(ids) for ids in reference.PROMPTS], values, to=out)


class HuggingFace:
    """Runs what `validate()` compares with in processes forked from one that has imported torch; one at a time."""

    def __init__(self, kept):
        from tests.processes import Launcher

        self.launcher, self.lock = Launcher(), f"{kept}/one at a time"

    def pytest_configure(self, config):
        config.huggingface = self

    def __call__(self, job):
        from nnterp.vllm._validate import _REFERENCE

        with open(self.lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            printed, said, code = self.launcher.run(_REFERENCE, json.dumps(job))
        assert code == 0, said
        return json.loads(printed.rpartition("tokens:")[2])


def tested(name, folder, kept, huggingface):
    """Run the tests on one checkpoint."""
    import pytest

    os.environ.update(
        {
            "NNTERP_VLLM_MODEL": str(folder),
            "NNTERP_VLLM_NAME": name,
            "NNTERP_VLLM_REFERENCE": f"{kept}/{name}.pt",
            "NNTERP_VLLM_EAGER": f"{kept}/eager",
            "NNTERP_VLLM_OPTIONS": json.dumps(OPTIONS.get(name, {})),
        }
    )
    here = Path(__file__).parent
    chosen = ["-k", ONLY[name]] if name in ONLY else []
    left_out = [part for name in ("cacheprovider", "xdist", "anyio") for part in ("-p", f"no:{name}")]
    return pytest.main(["-q", *chosen, *left_out, f"--confcutdir={here}", str(here)], plugins=[huggingface])


def main(names):
    os.environ.update(SETTINGS)
    sys.path[:0] = [str(PAGE.parents[1]), str(Path(__file__).parent)]
    import reference

    import nnterp
    from nnterp.testing import tiny_checkpoint

    failed = []
    with tempfile.TemporaryDirectory() as kept:
        folders = {}
        for name in names or ["toy", "toy in bfloat16", *CHECKPOINTS, *(["smollm2"] if REAL.is_dir() else [])]:
            if name == "smollm2":
                folders[name] = REAL
            elif name in CHECKPOINTS:
                folders[name] = tiny_checkpoint(name, Path(kept) / name, num_layers=4, **CHECKPOINTS[name])
            elif name in ("toy", "toy in bfloat16"):
                folders[name] = nnterp.toy_checkpoint()
        made = {
            f"{name} in HuggingFace": partial(reference.main, folder, f"{kept}/{name}.pt")
            for name, folder in folders.items()
            if name != "toy in bfloat16"
        }
        if "toy" in folders:
            made["the dataset of the eager model"] = partial(eager, folders["toy"], f"{kept}/eager")
        failed += together(made, kept)
        from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  # noqa: F401
        import nnsight.modeling.vllm.vllm  # noqa: F401

        huggingface = HuggingFace(kept) if folders else None
        tests = {name: partial(tested, name, folder, kept, huggingface) for name, folder in folders.items()}
        if not names or "page" in names:
            tests["docs/vllm.md"] = partial(page, kept)
        failed += together(tests, kept)
        if huggingface is not None:
            huggingface.launcher.close()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
