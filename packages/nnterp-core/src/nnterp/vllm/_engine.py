"""`TracedVLLM`: a model in vLLM under the standard names. It runs here, and inside traces in the engine's worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from unittest import mock

from nnsight.modeling.vllm import VLLM
from torch import nn
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.v1.engine.core_client import SyncMPClient

from nnterp.arguments import count
from nnterp.errors import InsideTraceError, Unavailable, UnprovenWarning
from nnterp.identity import checkpoint_of, config_digest
from nnterp.inputs import Row, encode
from nnterp.traced import bind_names
from nnterp.traced_block import SessionTracer
from nnterp.vllm._errors import raise_first
from nnterp.vllm._in_trace import InTrace
from nnterp.vllm._requests import CheckedEdit, CheckedTracer, CleanEngine, CleanLLM, WatchingClient, deaf_processes
from nnterp.vllm._structure import Parts, find_parts
from nnterp.vllm._values import Served, served
from nnterp.warn import warn
from vllm import SamplingParams

_REFUSED = {
    "enable_chunked_prefill": "a prompt that is split over passes would be read in pieces",
    "enable_prefix_caching": "tokens that are taken from the cache run through no layer, and would be missing",
    "speculative_config": "a pass that checks several tokens at once has no one next token",
}
_ROUNDING = {  # settings that numbers depend on in their last bits alone
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_gpu_blocks_override"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "disable_log_stats", "seed"),
}
_ABSENT = {
    "scan": "the engine runs the real model alone. Trace a prompt and read the shapes",
    "each_step": "loop over `tracer.iter[:]` in a trace with max_new_tokens=, or use model.steering and model.collect",
    "get_topk_closest_tokens": "the weights are in the engine. In a trace, use model.project_on_vocab(state).topk(k)",
}
_OUTSIDE = ("collect", "steering", "validate")  # what StandardizedVLLM has, and a block in the engine has not
SENT = ("served", "layer_paths", "final_norm", "hidden_size", "model_class", "stepping", "names")


class TracedVLLM(InTrace):
    """What `StandardizedVLLM` runs models with, and all of it that works inside a trace."""

    served: Served
    layer_paths: tuple[str, ...]
    model_class: str
    hidden_size: int
    num_vision_layers = num_encoder_layers = 0  # their values are not served

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if kwargs.get(name, 1) != 1:
                raise Unavailable(f"{name}={kwargs[name]}: values of a model on several devices are not proven here.")
        if kwargs.get("mode", "sync") != "sync":
            raise Unavailable("mode='async' is nnsight's alone: use nnsight.modeling.vllm.VLLM for it.")
        if kwargs.get("taps"):
            raise Unavailable("taps= serves few places, and the standard names read any: leave it out.")
        for name, why in _REFUSED.items():
            if kwargs.get(name):
                raise Unavailable(f"{name}={kwargs[name]!r}: {why}. Leave it out.")
        self.proven: frozenset[str] = frozenset()
        self.certificate: Any = None
        self.stepping = self._warned = False
        self.dispatch_options = dict(kwargs)
        self.repo = os.fspath(model)
        if current_platform.is_cpu():
            from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

            from nnterp.vllm._cpu import WORKER

            self._WORKER_CLS = WORKER
            _set_torch_accelerator_to_noop()  # nnsight empties the cache of an accelerator
        VLLM.__init__(self, self.repo, **kwargs)
        self.parts: Parts = find_parts(self._module)
        self.structure = self.served = served(self.parts)
        self.layer_paths = tuple(block.path for block in self.parts.blocks)
        self.final_norm = self.parts.ln_final
        self.model_class = type(self._module).__name__
        config = self._module.config.get_text_config() if hasattr(self._module, "config") else None
        self.hidden_size = int(getattr(config, "hidden_size", 0) or 0)
        first = self.parts.blocks[0]
        self.num_heads, self.num_kv_heads = first.heads or None, first.kv_heads or None
        self.head_dim = None if first.core is None else int(self._module.get_submodule(first.core).head_size)
        self.names = self.parts.names()
        bind_names(self, self.names, self.layer_paths)

    def _load_meta(self, repo_id: str, **kwargs: Any) -> nn.Module:
        # vLLM packs the experts' weights for the CPU while it loads them, which cannot be done without numbers.
        with mock.patch("vllm.model_executor.model_loader.base_loader.process_weights_after_loading"):
            return VLLM._load_meta(self, repo_id, **kwargs)

    def _load_sync(self, repo_id: str, **kwargs: Any) -> Any:
        with deaf_processes():
            llm = VLLM._load_sync(self, repo_id, **kwargs)
        llm.__class__, llm.llm_engine.__class__ = CleanLLM, CleanEngine
        if type(llm.llm_engine.engine_core) is SyncMPClient:  # not where the engine runs in this process
            llm.llm_engine.engine_core.__class__ = WatchingClient
        return llm

    def ready(self) -> None:
        """Start the engine if it does not run yet, and warn if nothing has proven its values."""
        if not self.dispatched:
            self.dispatch()
        self._warn_unproven()

    def run_settings(self) -> dict[str, Any]:
        """Record everything that this model's numbers depend on: see `nnterp.resuming.Call`.

        Returns:
            The record, as JSON can hold it.
        """
        config = self.vllm_entrypoint.llm_engine.vllm_config.model_config
        return {
            "model_class": f"vLLM's {self.model_class}",
            "model": self.repo,
            "revision": self.dispatch_options.get("revision"),
            "dtype": str(config.dtype),
            "config": config_digest(config.hf_config),
            "engine": {name: repr(value) for name, value in self.dispatch_options.items() if name not in _ROUNDING},
            "edits": [getattr(edit, "identity", f"unknown {edit.id}") for edit in self._installed_edits],
            "weights": checkpoint_of(self.repo, self.dispatch_options).digest or f"unknown {id(self)}",
        }

    # -- what it refuses, and what it has -----------------------------------------------------------------------------
    def require_no_trace(self, what: str) -> None:
        """Refuse what runs the model itself inside a trace; `what` is how the error calls it.

        Raises:
            InsideTraceError: A trace is running.
        """
        if self.interleaver.interleaving:
            raise InsideTraceError(f"{what} runs the model itself, so it cannot be called inside a trace.")

    def require_fits(self, row: Row, label: str) -> None:
        """Raise if the engine, once it runs, does not take a prompt.

        Raises:
            ValueError: The prompt leaves no room for a new token.
        """
        if not self.dispatched:
            return
        limit = self.vllm_entrypoint.llm_engine.vllm_config.model_config.max_model_len
        if len(row) >= limit:
            raise ValueError(
                f"{label} has {len(row)} tokens; the engine takes at most {limit - 1} and a new one (max_model_len="
                f"{limit} of StandardizedVLLM)."
            )

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids that the model has; None where its config does not say."""
        config = getattr(self._module, "config", None)
        return None if config is None else getattr(config.get_text_config(), "vocab_size", None)

    def prepare(self, remote: Any = False) -> None:
        """Refuse the functions of `nnterp.interventions` and `nnterp.prompts`, which call this before they run a model.

        Raises:
            Unavailable: Always.
        """
        raise Unavailable(
            "This function runs models of StandardizedTransformer: padded batches, gradients, patterns or caches that "
            "vLLM does not share. On vLLM there are model.collect, model.steering, model.run, and nnterp.vllm's "
            "logit_lens and run_prompts."
        )

    def gradients(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: vLLM computes in inference mode.

        Returns:
            Nothing, because it always raises.

        Raises:
            Unavailable: Always.
        """
        raise Unavailable("vLLM computes in inference mode, without gradients; StandardizedTransformer has them.")

    @property
    def attachments(self) -> Any:
        """Refuse: `nnterp.attach` works on models of StandardizedTransformer.

        Raises:
            Unavailable: Always.
        """
        raise Unavailable(
            "Dictionaries are attached to StandardizedTransformer. Collect what one reads, and encode it."
        )

    def support(self) -> dict[str, tuple[int, ...] | bool]:
        """List what is served; returns value → the layers that have it, or True or False where it is not per layer."""
        whole = {name: not isinstance(found, str) for name, found in self.served.whole.items()}
        return {**whole, **{name: self.served.having(name) for name in self.served.layers}}

    # -- running ----------------------------------------------------------------------------------------------------

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run one forward pass of a prompt, with a block of reads and writes in it; `max_new_tokens=` runs more passes.

        Args:
            *inputs: One prompt. Without one, each `with tracer.invoke(prompt)` in the block runs its own prompt.
            **kwargs: vLLM's `SamplingParams`. By default one pass, greedy (`temperature=0`).

        Returns:
            nnsight's tracer, for `with`.

        Raises:
            InsideTraceError: Called inside a trace.
            ValueError: Several prompts were given: use an invoke for each. Or a steering follows the trace in a `with`.
            Unavailable: `remote=` was given.
        """
        self.require_no_trace("trace()")
        if kwargs.get("remote"):
            raise Unavailable(f"remote={kwargs['remote']!r}: the engine runs on this machine. Leave it out.")
        kwargs = self._sampling_kwargs(kwargs)
        return VLLM.trace(self, *inputs, **{"tracer_cls": CheckedTracer, "max_tokens": 1, "temperature": 0.0, **kwargs})

    def edit(self, **kwargs: Any) -> Any:
        """nnsight's `edit`: a block that runs in every request; returns nnsight's editor, for `with`.

        Raises:
            InsideTraceError: Called inside a trace.
            ValueError: Something, such as a steering, follows the edit in its `with`.
        """
        self.require_no_trace("edit()")
        VLLM.edit(self, **kwargs)  # refuses what is no argument
        kwargs.pop("inplace", None)
        return CheckedEdit(self, **kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `session`: several traces in one block; returns its tracer.

        Raises:
            ValueError: Something, such as a steering, follows the session in its `with`.
        """
        kwargs.setdefault("tracer_cls", SessionTracer)
        return VLLM.session(self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the module here has no weights.

        Raises:
            Unavailable: No trace is running.
        """
        if not self.interleaver.interleaving:
            raise Unavailable("model(...) runs nothing on vLLM, whose engine has the weights: use model.run(prompts).")
        return VLLM.__call__(self, *args, **kwargs)

    def _batch(self, invokes: list, fn: Any) -> tuple:
        return VLLM._batch(self, [(inputs, self._sampling_kwargs(kwargs)) for inputs, kwargs in invokes], fn)

    def _attach_mediators(self, params: list, **kwargs: Any) -> list:
        asked = [
            one.max_tokens if "max_tokens" in one.nnsight_named else kwargs.get("max_tokens", one.max_tokens)
            for one in params
        ]
        self.stepping = any(tokens != 1 for tokens in asked)  # before the blocks, and this model, are serialized
        return VLLM._attach_mediators(self, params, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._warn_unproven()
        return VLLM._call(self, *args, **kwargs)

    @staticmethod
    def _collect(mediators: list, outputs: list) -> None:
        try:
            VLLM._collect(mediators, outputs)
        except RuntimeError:
            raise_first(outputs)
            raise

    def _warn_unproven(self) -> None:
        if self.certificate is None and not self._warned:
            self._warned = True
            warn(
                f"Nothing has compared the values of {self.repo} in vLLM with HuggingFace's. Call model.validate() to "
                "prove them; the proof is kept on disk.",
                UnprovenWarning,
            )

    def _prompt(self, *inputs: Any) -> Any:
        if len(inputs) == 1 and _of_vllm(inputs[0]):
            return inputs[0]
        given = self.prompts_of(inputs[0]) if len(inputs) == 1 else inputs
        if len(given) != 1:
            raise ValueError(
                f"A trace or an invoke runs exactly one prompt, and {len(given)} were given: write an invoke for each, "
                "or use model.collect."
            )
        return given[0]

    def prompts_of(self, prompts: Any) -> list[Any]:
        """Encode prompts of any kind that `nnterp.inputs.encode` reads; returns each as vLLM's `TokensPrompt`."""
        return [TokensPrompt(prompt_token_ids=list(row.ids)) for row in encode(self, prompts)]  # type: ignore[arg-type]

    def run(self, prompts: Any, max_new_tokens: int = 1, **settings: Any) -> list[Any]:
        """Generate from prompts with vLLM's continuous batching. Steering and edits that are active apply.

        Args:
            prompts: As in `StandardizedTransformer.collect`.
            max_new_tokens: At most how many tokens to generate for each.
            **settings: vLLM's `SamplingParams`. Greedy (`temperature=0`) by default.

        Returns:
            vLLM's `RequestOutput` of each prompt, in their order: `.outputs[0].text`, `.outputs[0].token_ids`.

        Raises:
            InsideTraceError: Called inside a trace.
            ValueError, TypeError: A prompt is not one, as `nnterp.inputs.encode` says, or it is longer than the engine
                takes; or a setting is not one of vLLM's.
            Exception: A steering or an edit failed in the engine; its own error.

        Example:
            >>> [output] = model.run("The capital of France is", max_new_tokens=4)
            >>> output.outputs[0].text
        """
        self.require_no_trace("run()")
        params = self.params(max_new_tokens, **settings)
        self.ready()
        outputs = self.vllm_entrypoint.generate(self.prompts_of(prompts), params, use_tqdm=False)
        raise_first(outputs)
        return outputs

    def _generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """`model.generate(prompts)` without a block: greedy unless `kwargs` say otherwise, as everywhere here."""
        self.ready()
        given = inputs[0] if len(inputs) == 1 else list(inputs)
        own = _of_vllm(given) or (isinstance(given, list) and bool(given) and all(map(_of_vllm, given)))
        outputs = VLLM._generate(self, given if own else self.prompts_of(given), **{"temperature": 0.0, **kwargs})
        raise_first(outputs)
        return outputs

    @staticmethod
    def params(max_new_tokens: int = 1, **settings: Any) -> SamplingParams:
        """Make the settings of a request: one token, greedy, unless the arguments say otherwise.

        Returns:
            vLLM's `SamplingParams`.

        Raises:
            TypeError: `max_tokens` was given; it is called `max_new_tokens` here.
        """
        if "max_tokens" in settings:
            raise TypeError("max_tokens is called max_new_tokens here: give that, and leave max_tokens out.")
        return SamplingParams(**{"temperature": 0.0, "max_tokens": count(max_new_tokens, "max_new_tokens"), **settings})

    # -- travelling -------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """What is sent with a request: where values are served. The engine's worker has the rest."""
        self.interleaver._persistent_id = "Interleaver"
        self._module._persistent_id = f"Module:{self.path}"
        return arriving, (self.interleaver, self._module, {name: getattr(self, name) for name in SENT})


def arriving(interleaver: Any, module: nn.Module, state: dict[str, Any]) -> TracedVLLM:
    """Rebuild the model in the engine's worker: nnsight's tree over the loaded weights, with the standard names."""
    root = interleaver.envoys[id(module)]
    model = object.__new__(TracedVLLM)
    model.__dict__.update(root.__dict__)
    model.__dict__.update(state)
    bind_names(model, model.names, model.layer_paths)
    return model


def _of_vllm(prompt: Any) -> bool:
    """Whether it is a prompt in one of vLLM's own forms, such as `TokensPrompt`."""
    return isinstance(prompt, Mapping) and any(str(name).startswith(("prompt", "multi_modal")) for name in prompt)


def _refusing(name: str, why: str) -> Any:
    def refuse(self: TracedVLLM, *args: Any, **kwargs: Any) -> Any:
        raise Unavailable(f"{name}() is not there on vLLM: {why}.")

    refuse.__name__, refuse.__doc__ = name, f"Refuse: {why}."
    return refuse


for _name, _why in _ABSENT.items():
    setattr(TracedVLLM, _name, _refusing(_name, _why))


def _outside(name: str) -> Any:
    def refuse(self: TracedVLLM, *args: Any, **kwargs: Any) -> Any:
        raise InsideTraceError(f"{name}() runs the model itself, or in every request: call it outside of the trace.")

    refuse.__name__, refuse.__doc__ = name, "Refuse: it is called inside a trace."
    return refuse


for _name in _OUTSIDE:
    setattr(TracedVLLM, _name, _outside(_name))
