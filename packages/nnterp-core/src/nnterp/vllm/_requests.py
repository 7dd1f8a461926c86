"""Run requests in vLLM's engine. A run that is cut short leaves none in it, whose output a later run would get."""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import CodeType
from typing import Any
from unittest import mock

from nnsight.modeling.vllm.engines.engine import NNsightLLMEngine
from nnsight.modeling.vllm.registration import RegisteringTracer
from nnsight.modeling.vllm.tracer import VLLMTracer
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from nnterp.traced_block import LastInWith, refuse_followed
from vllm import LLM, SamplingParams


class CheckedTracer(LastInWith, VLLMTracer):
    """nnsight's tracer, which refuses a `with` in which a steering, or anything else, follows the trace."""

    def execute(self, code: CodeType) -> None:
        """Run the block; see `VLLMTracer.execute`.

        Raises:
            ValueError: Something, such as a steering, follows the trace in its `with`.
        """
        frame = self.info.frame
        refuse_followed(self.node, self, {**frame.f_globals, **frame.f_locals})
        VLLMTracer.execute(self, code)


class CheckedEdit(LastInWith, RegisteringTracer):
    """nnsight's tracer of an edit, which refuses a `with` in which anything follows it."""


class CleanEngine(NNsightLLMEngine):
    """nnsight's engine, in which Ctrl-C waits for the end of a forward pass: half a pass would leave it stuck."""

    def step(self) -> Any:
        """One forward pass of the requests that are scheduled; returns their outputs."""
        with held_interrupts():
            return NNsightLLMEngine.step(self)


class WatchingClient(SyncMPClient):
    """vLLM's side of an engine in another process, in which a call does not wait for an engine that has died."""

    def call_utility(self, method: str, *args: Any) -> Any:
        """As vLLM's.

        Raises:
            EngineDeadError: The engine has died.
        """
        future: Future[Any] = Future()
        number = uuid.uuid1().int >> 64
        self.utility_results[number] = future
        self._send_input(EngineCoreRequestType.UTILITY, (0, number, method, args))
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=1)
            if not self.output_queue_thread.is_alive() and not future.done():
                raise EngineDeadError


class CleanLLM(LLM):
    """vLLM's entrypoint, whose `generate` takes its requests out of the engine if it is cut short."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's `LLM.generate`."""
        try:
            return LLM.generate(self, *args, **kwargs)
        except BaseException as error:
            drop_unfinished(self)
            if isinstance(error, Exception) and "pickle" in str(error):
                raise TypeError(
                    f"A block saved what cannot be sent from the engine ({error}). Save tensors, numbers, texts, and "
                    "lists and dicts of these; of a value of each layer, one layer: model.layers_output[3].save()."
                ) from error
            raise


def finished(llm: Any, prompts: Sequence[Any], params: SamplingParams) -> Generator[list[tuple[int, Any]], None, None]:
    """Run prompts with continuous batching, and yield outputs after each forward pass that finishes some.

    Args:
        llm: vLLM's entrypoint, whose engine runs nothing else.
        prompts: Each as vLLM's `TokensPrompt`.
        params: The settings of every request.

    Yields:
        (the index of a prompt, its `RequestOutput`) of each prompt that is finished. Close the iterator to stop: the
        requests that are left are then taken out of the engine.
    """
    try:
        first = int(llm.enqueue(prompts, params, use_tqdm=False)[0].partition("-")[0])
        while llm.llm_engine.has_unfinished_requests():
            done = [(int(one.request_id) - first, one) for one in llm.llm_engine.step() if one.finished]
            if done:
                yield done
    finally:
        drop_unfinished(llm)


def drop_unfinished(llm: LLM) -> None:
    """Take every request that is not finished out of the engine, with nnsight's workers; none if the engine is dead."""
    engine = llm.llm_engine
    left = list(engine.output_processor.request_states)
    if left:
        with contextlib.suppress(Exception):
            engine.abort_request(left, internal=True)
            engine.engine_core.collective_rpc("collect_nnsight", args=(left, left))


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """A block during which Ctrl-C waits until its end; a second Ctrl-C does not wait. Only in the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        came.append((number, frame))
        if len(came) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


@contextlib.contextmanager
def deaf_processes() -> Iterator[None]:
    """A block in which processes start that never get Ctrl-C, and nor do theirs.

    A terminal sends it to all processes. vLLM's would end at once, and the engine with them; this process takes the
    requests out of the engine instead.
    """
    start = BaseProcess.start
    resource_tracker.ensure_running()  # when it starts, it unblocks the signal again

    def deaf(self: BaseProcess) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes that start inherit it
        try:
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    with mock.patch.object(BaseProcess, "start", deaf):
        yield
