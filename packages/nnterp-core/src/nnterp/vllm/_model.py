"""`StandardizedVLLM`: a model in vLLM, with what reads, steers and proves it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nnterp.certificate import Certificate
from nnterp.collection import Collected
from nnterp.indices import Indices
from nnterp.traced import steering_of
from nnterp.vllm._collect import collect
from nnterp.vllm._engine import TracedVLLM
from nnterp.vllm._kept import recall
from nnterp.vllm._steering import in_every_step, require_plain
from nnterp.vllm._validate import validate


class StandardizedVLLM(TracedVLLM):
    """A model that runs in nnsight's vLLM, with the names, values and interventions of `StandardizedTransformer`.

    A trace is one request: `with model.trace(prompt)` runs one prompt, `with model.trace() as tracer` several, each in
    a `with tracer.invoke(prompt)`. vLLM packs requests together and pads none. Values are `[1, seq, ...]`, the tokens
    that the pass runs: the whole prompt first, then one token a step. Reads are copies on the device of the engine, in
    its dtype: assign what you change. Values follow from the structure of vLLM's modules, and `validate()` proves
    them against HuggingFace's model of the same checkpoint.

    Args:
        model: Hub id or folder.
        **kwargs: Arguments of vLLM's engine (`dtype=`, `max_model_len=`, `gpu_memory_utilization=`,
            `model_impl="transformers"`, ...).

    Raises:
        Unavailable: What was asked of vLLM is more than one device, or its asynchronous engine.
        AnatomyError: The model is no decoder with one list of layers.

    Example:
        >>> model = StandardizedVLLM("Qwen/Qwen3-8B")
        >>> with model.trace("The capital of France is"):
        ...     hidden = model.layers_output[5].save()
        >>> hidden.shape  # [1, seq, hidden]
    """

    certificate: Certificate | None

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any) -> None:
        TracedVLLM.__init__(self, model, **kwargs)
        recall(self)

    @contextlib.contextmanager
    def steering(
        self,
        steering_vector: Any,
        layers: Any = None,
        factor: float = 1,
        *,
        mode: str = "add",
        token_positions: Any = None,
        steps: Any = None,
        keep_norm: bool = False,
        origin: Any = None,
    ) -> Iterator[None]:
        """Steer every request of the engine in a `with` block: traces, generations and `collect`.

        The vector is sent to the engine once. Arguments as in `StandardizedTransformer.steering`.

        Raises:
            InsideTraceError: Called inside a trace.
            IndexError, TypeError, ValueError, ShapeError: As `StandardizedTransformer.steering` raises them.
        """
        self.require_no_trace("steering()")
        what = (layers, steering_vector, factor, token_positions, None, steps, mode, keep_norm, origin)
        steering = require_plain(steering_of(self.num_layers, *what), self.hidden_size)
        edit = in_every_step(self, steering)
        try:
            yield
        finally:
            edit.clear()

    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> Collected:
        """Read values of many prompts, which vLLM batches; arguments and result as `StandardizedTransformer.collect`.

        With `max_new_tokens`, values at the positions from which each new token was predicted, and the tokens in the
        result's `generated`.

        Raises:
            ValueError, IndexError, Unavailable, InsideTraceError: As `StandardizedTransformer.collect` raises them.
        """
        self.require_no_trace("collect()")
        return collect(self, prompts, values, layers, positions, device, dtype, max_new_tokens, settings)

    def validate(self, tolerance: float | None = None) -> Certificate:
        """Prove every value against HuggingFace's model of the same checkpoint, which runs in another process.

        A value that differs is served no more. Values that only vLLM has, and those that HuggingFace's model does not
        prove, have a skipped line, and are not in `model.proven`. The proof is kept on disk with the others (`nnterp
        proofs`), and taken over when the same checkpoint is loaded with the same settings, versions and device.

        Args:
            tolerance: The largest difference, relative to the largest magnitude of the value; by the dtype if None.

        Returns:
            The certificate; also `model.certificate`.

        Raises:
            RuntimeError: HuggingFace's model could not be run (says what it said), or an edit is installed.
        """
        self.require_no_trace("validate()")
        return validate(self, tolerance)
