"""Run the tests of this folder on tiny random checkpoints and the toy, a process for each. vLLM is imported once."""

import os
import re
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
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
CHECKPOINTS = {
    "gpt2": {"n_embd": 64, "n_head": 2},
    "qwen3": SMALL,
    "gemma3_text": {**SMALL, "query_pre_attn_scalar": 32},
    "mixtral": {**SMALL, "intermediate_size": 64},
}


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


def main(names):
    os.environ.update(SETTINGS)
    from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  # noqa: F401
    import nnsight.modeling.vllm  # noqa: F401
    import pytest

    import nnterp
    from nnterp.testing import tiny_checkpoint

    failed = []
    with tempfile.TemporaryDirectory() as kept:
        for name in names or ["page", "toy", *CHECKPOINTS]:
            if name in ("page", "toy"):
                folder = nnterp.toy_checkpoint()
            else:
                folder = tiny_checkpoint(name, Path(kept) / name, num_layers=4, **CHECKPOINTS[name])
            child = os.fork()
            if not child and name == "page":
                snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
                program = Path(kept) / "page.py"
                program.write_text("\n".join(snippets))
                os._exit(ran(program))
            if not child:
                os.environ["NNTERP_VLLM_MODEL"] = str(folder)
                here = Path(__file__).parent
                options = [
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                    "-p",
                    "no:anyio",
                    f"--confcutdir={here}",
                    str(here),
                ]
                code = pytest.main(options)
                sys.stdout.flush()
                os._exit(int(code))
            print(f"--- {name}", flush=True)
            if os.waitpid(child, 0)[1]:
                failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
