"""nnsight's worker for vLLM on a CPU. nnsight has one for GPUs only, but its additions work on any device."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  (vLLM asks for it to be imported before its runner)
from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class NNsightCPUModelRunner(NNsightGPUModelRunner, CPUModelRunner):
    """vLLM's runner for CPUs, with nnsight's additions."""


class NNsightCPUWorker(NNsightGPUWorker, CPUWorker):
    """vLLM's worker for CPUs, whose runner runs the blocks of traces."""

    def init_device(self) -> None:
        """Make vLLM's runner, and turn it into `NNsightCPUModelRunner`.

        Raises:
            NotImplementedError: vLLM made another kind of runner.
        """
        CPUWorker.init_device(self)
        if type(self.model_runner) is not CPUModelRunner:
            raise NotImplementedError(f"nnsight does not know vLLM's {type(self.model_runner).__name__} on a CPU.")
        self.model_runner.__class__ = NNsightCPUModelRunner


WORKER = f"{__name__}.{NNsightCPUWorker.__qualname__}"
