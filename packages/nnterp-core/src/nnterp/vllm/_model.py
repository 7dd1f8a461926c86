"""`StandardizedVLLM`: a model in vLLM, with `collect`, `steering` and `validate`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, overload

import torch

from nnterp.certificate import Certificate
from nnterp.collection import Collected, Reduce
from nnterp.datasets import ActivationDataset, refuse_for_disk
from nnterp.generation import refuse_misspelt
from nnterp.indices import Indices
from nnterp.traced import steering_of
from nnterp.vllm._collect import collect, write
from nnterp.vllm._engine import TracedVLLM
from nnterp.vllm._kept import recall
from nnterp.vllm._steering import in_every_step, require_plain
from nnterp.vllm._validate import validate


class StandardizedVLLM(TracedVLLM):
    """A model that runs in nnsight's vLLM, with the names, values and interventions of `StandardizedTransformer`.

    `with model.trace(prompt)` runs one prompt. For several, open `with model.trace() as tracer` and give each prompt
    its own `with tracer.invoke(prompt)`. vLLM batches prompts without padding. A value is `[1, seq, ...]`, where `seq`
    counts the tokens of this pass: the whole prompt first, then one token per step. What you read is a copy, on the
    engine's device and in its dtype, so assign what you change. nnterp finds values by the structure of vLLM's modules;
    `validate()` proves them against HuggingFace's model of the same checkpoint.

    Args:
        model: Hub id or folder.
        **kwargs: Arguments of vLLM's engine (`dtype=`, `max_model_len=`, `gpu_memory_utilization=`,
            `model_impl="transformers"`, ...).

    Raises:
        Unavailable: Several devices, an asynchronous engine (`mode="async"`) or nnsight's `taps=` was asked for.
        AnatomyError: The model is not a decoder with one list of layers.

    Attributes:
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim: The model's sizes; of heads, those of the first
            layer, None if it has no attention.
        certificate: The proof; None before `validate()`, unless an earlier one was kept on disk.
        proven: Names of the values that were proven.

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

        The vector is sent to the engine once. Arguments as in `StandardizedTransformer.steering`, but without `when`,
        and `token_positions` are indices or slices of the prompt.

        Raises:
            InsideTraceError: Called inside a trace.
            IndexError, TypeError, ValueError, ShapeError: As `StandardizedTransformer.steering` raises them.

        Example:
            >>> with model.steering(vector, layers=[3, 4], factor=2):
            ...     outputs = model.run(prompts, max_new_tokens=20)
        """
        self.require_no_trace("steering()")
        what = (layers, steering_vector, factor, token_positions, None, steps, mode, keep_norm, origin)
        steering = require_plain(steering_of(self.num_layers, *what), self.hidden_size)
        edit = in_every_step(self, steering)
        try:
            yield
        finally:
            edit.clear()

    @overload
    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Reduce = None,
        progress: bool | None = None,
        max_new_tokens: int | None = None,
        resume: Collected | str | Path | None = None,
        *,
        to: None = None,
        prompts_per_shard: int = 1024,
        rank: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Collected: ...

    @overload
    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Reduce = None,
        progress: bool | None = None,
        max_new_tokens: int | None = None,
        resume: Collected | str | Path | None = None,
        *,
        to: str | Path,
        prompts_per_shard: int = 1024,
        rank: tuple[int, int] | None = None,
        **settings: Any,
    ) -> ActivationDataset: ...

    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Reduce = None,
        progress: bool | None = None,
        max_new_tokens: int | None = None,
        resume: Collected | str | Path | None = None,
        *,
        to: str | Path | None = None,
        prompts_per_shard: int = 1024,
        rank: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Collected | ActivationDataset:
        """Read values of many prompts, which vLLM batches.

        Args:
            prompts, values, layers, positions, device, dtype, progress: As in `StandardizedTransformer.collect`.
            reduce: "mean" or "sum" over all prompts and positions, added up in the engine in double precision; or a
                function, which is sent to the engine and given each prompt's own positions, `[1, (positions,) ...]`;
                it keeps the first axis. Over a generation it runs in this process, on the CPU.
            max_new_tokens: Generate so many tokens, and read values at the positions from which each was predicted.
                `positions` cannot be given with it. A prompt whose generation ends earlier has fewer.
            resume: The partial result of the same call that was cut short (an error's `partial`), or its file.
            to: A folder to which the values are written while they are computed: a dataset as that of
                `StandardizedTransformer.collect`, whose manifest says "backend": "vLLM", and its certificate or "not
                validated". The same call goes on from what an earlier one has written. `device`, `reduce`, `resume` and
                `max_new_tokens` do not go with it.
            prompts_per_shard, rank: As in `StandardizedTransformer.collect`. The engine runs one shard at a time.
            **settings: vLLM's `SamplingParams` for a generation, such as `ignore_eos=True`; greedy by default.

        Returns:
            A `Collected`: `[layers, prompts, (positions,) ...]`. With `max_new_tokens`,
            `[layers, prompts, tokens, ...]`, and the new tokens `[prompts, tokens]` in `generated`; after a prompt's
            last token values are 0, tokens −1, and `mask` is False. With `to`, the `nnterp.ActivationDataset`.

        Raises:
            TypeError: Settings of a generation were given without `max_new_tokens`.
            ValueError, IndexError, Unavailable, InsideTraceError: As `StandardizedTransformer.collect` raises them.
            BlockingIOError, FileExistsError, OSError: With `to`, as there.

            An error, and an interrupt, carry what is finished as `error.partial`. No request is left in the engine.
        """
        if max_new_tokens is None:
            refuse_misspelt(settings, type(self).collect)
        if to is not None:
            refuse_for_disk(device, reduce, max_new_tokens, resume, settings)
            on_disk = (dtype, progress, prompts_per_shard, rank)
            return write(self, to, prompts, values, layers, positions, *on_disk)
        if rank is not None:
            raise ValueError("rank is for collect(to=folder), whose shards several processes share; leave it out.")
        options = (device, dtype, reduce, progress, max_new_tokens, resume, settings)
        return collect(self, prompts, values, layers, positions, *options)

    def validate(self, tolerance: float | None = None) -> Certificate:
        """Prove every value against HuggingFace's model of the same checkpoint, which runs in another process.

        A value that differs at a layer is unavailable there afterwards. A value that HuggingFace's model does not have,
        or has on some layers only, gets a skipped line and is not in `model.proven`. The proof is kept on disk (`nnterp
        proofs`) and used again when the same checkpoint is loaded with the same settings, versions and device.

        Args:
            tolerance: The largest allowed difference, relative to the largest magnitude of the value at that layer. If
                None: 1e-3 in float32, 2e-2 in float16, 1e-1 in bfloat16.

        Returns:
            The certificate, a line for each value; also `model.certificate`. Failed lines are not raised.

        Raises:
            InsideTraceError: Called inside a trace.
            RuntimeError: HuggingFace's model could not be run (the message quotes its error), or a steering or edit is
                active.

        Example:
            >>> model.validate().ok
            True
        """
        self.require_no_trace("validate()")
        return validate(self, tolerance)
