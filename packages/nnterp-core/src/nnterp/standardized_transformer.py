"""`StandardizedTransformer`: any HuggingFace causal language model, its parts under one set of names."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.intervention.envoy import Envoy
from torch import nn

from nnterp import loading
from nnterp.anatomy import Anatomy, RenameConfig, find_anatomy
from nnterp.binding import bind_names
from nnterp.certificate import Certificate, ResidualStructure, certify
from nnterp.collection import Collected, collect
from nnterp.errors import InsideTraceError, RemoteModelError, Unavailable
from nnterp.gradients import Gradients, gradients
from nnterp.readout import Readout, declared_chain
from nnterp.skipping import lenders
from nnterp.traced_transformer import TracedTransformer, arriving, travel_by_value
from nnterp.twin import learn_from_twin, twin_of
from nnterp.values import (
    VALUES,
    AttentionProbabilitiesAccessor,
    Support,
    Value,
    canonical,
    explain,
    get_value,
    prepare,
    support,
)
from nnterp.values._directory import directory_of
from nnterp.values._places import Place, Side
from nnterp.values._serve import findings


class StandardizedTransformer(TracedTransformer):
    """A causal language model in its original HuggingFace implementation, with one name for every part of it.

    Whatever the architecture calls its modules, `embed_tokens`, `layers[i].self_attn`, `layers[i].mlp`, `ln_final` and
    `lm_head` are there, and inside a trace `layers_output[i]`, `attentions_output[i]`, `mlps_output[i]`, `logits` and
    the other values of `nnterp.values.VALUES` can be read and written. That the names are right is proven when the
    model is loaded (`validate()` returns the proof). Everything of nnsight (`trace`, `generate`, `session`, `scan`,
    `edit`, ...) works as on nnsight's own model.

    Args:
        model: A hub id, a local folder, or a HuggingFace module that is already loaded.
        trust_remote_code: Run modelling code that comes with the checkpoint.
        check_renaming: Prove the names at load. False skips the proof, and with it every guarantee.
        remote: The model will run on a remote service: weights are never loaded here, checks run without them.
        allow_dispatch: Load the weights when the checks need them. With False only what can be checked without
            weights is checked at load, and the rest when the first trace loads them.
        enable_attention_probs: Compute attention eagerly, so that its probabilities can be read and written.
        check_attn_probs_with_trace: Check the probabilities by running the model, not only its shapes.
        allow_multimodal: Accepted for compatibility; text towers of multimodal models are found without it.
        rename_config: Names of parts for models whose structure does not give them away.
        **kwargs: Passed to nnsight and transformers: `dtype`, `device_map` ("auto" by default), `tokenizer`,
            `tokenizer_kwargs`, `revision`, `rename`, `dispatch`, `attn_implementation`, ...

    Attributes:
        anatomy: Which native module plays which part, see `nnterp.anatomy.Anatomy`.
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: The model's sizes;
            None where its config does not state one.

    Raises:
        AnatomyError: A part was not found, or `rename_config` names one that is not there.
        CertificateError: The parts found do not behave as their names say.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        trust_remote_code: bool = False,
        check_renaming: bool = True,
        remote: bool = False,
        allow_dispatch: bool = True,
        enable_attention_probs: bool = False,
        check_attn_probs_with_trace: bool = True,
        allow_multimodal: bool = False,
        rename_config: RenameConfig | None = None,
        **kwargs: Any,
    ) -> None:
        model = str(model) if isinstance(model, Path) else model
        self.rename_config = rename_config
        self.check_renaming = check_renaming
        self.remote = remote
        self._certificate: Certificate | None = None
        self._envoys_by_path: dict[str, Envoy] = {}
        self._prefix_free_tokenizer: Any = None
        self.proofs: dict[tuple, Any] = {}  # proven beyond the certificate, by whoever needs it; see `validate`
        self._probabilities_check: bool | None = check_attn_probs_with_trace if enable_attention_probs else None
        if enable_attention_probs:
            loading.require_eager(model, kwargs)
        tokenizer = loading.resolve_tokenizer(
            model,
            kwargs.pop("tokenizer", None),
            tokenizer_kwargs := kwargs.pop("tokenizer_kwargs", None),
            kwargs.get("revision"),
            trust_remote_code,
        )
        if not isinstance(model, nn.Module):
            kwargs.setdefault("device_map", "auto")
            kwargs["trust_remote_code"] = trust_remote_code
        kwargs.setdefault("task", "text-generation")
        TransformersModel.__init__(self, model, tokenizer=tokenizer, **kwargs)
        for name, setting in (tokenizer_kwargs or {}).items():  # nnsight pads on the left; the user may not want it
            setattr(self.tokenizer, name, setting)

        self.anatomy: Anatomy = find_anatomy(self._module, rename_config)
        bind_names(self, self.anatomy)
        self._name_paths()
        self.readout = Readout(self.anatomy, declared_chain(self._module.config))
        self.lenders = lenders(self._module, self.anatomy.num_layers)
        self.residual_structures: tuple[ResidualStructure, ...] = ()
        self.padding_is_exact = True  # whether a row of a padded batch equals the row alone
        self.positions_from_mask = True  # whether such a batch must be told its positions
        self.repeated: frozenset[str] = frozenset()  # modules that run more than once in a forward pass
        self.run_order: dict[str, int] = {}  # when each module begins in a forward pass
        self.kept_as_stream: frozenset[tuple[str, Side]] = frozenset()  # edges laid out as layers are
        sizes = self.anatomy.sizes
        self.num_layers: int = sizes.num_layers
        self.hidden_size: int | None = sizes.hidden_size
        self.num_heads: int | None = sizes.num_heads
        self.num_kv_heads: int | None = sizes.num_kv_heads
        self.head_dim: int | None = sizes.head_dim
        self.intermediate_size: int | None = sizes.intermediate_size
        self.vocab_size: int | None = sizes.vocab_size
        if remote:
            travel_by_value()
        if check_renaming:
            self.validate().raise_if_failed()

    # -- loading and proof -----------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Load the weights, if they are not there yet, and prove the names with them.

        Raises:
            CertificateError: With the weights, a line of the certificate fails.
            RemoteModelError: The model was loaded with `remote=True`.
        """
        if self.dispatched:
            return
        if self.remote:
            raise RemoteModelError(
                f"{self.repo_id or self.model_class} was loaded with remote=True, so its weights are never loaded "
                "here, and what was asked for runs here. Pass remote=True to it as well, or load the model without."
            )
        TransformersModel.dispatch(self)
        self.__dict__.pop("_places", None)
        if self.check_renaming:
            self.validate().raise_if_failed()

    @property
    def twin(self) -> StandardizedTransformer | str:
        """A narrow model of the same code with random weights, which is proven while this one's are not here.

        Built when it is first needed; where there is none, the reason. See `nnterp.twin`.
        """
        return twin_of(self)

    def prepare(self, remote: Any = False) -> None:
        """Be ready for a run: load the weights, or, for a run elsewhere, learn what can be learnt without them."""
        if remote:
            self.learn_from_twin()
        else:
            self.dispatch()

    def learn_from_twin(self) -> None:
        """Take over what the twin proves about the code, while the weights are not here."""
        learn_from_twin(self)

    def validate(self) -> Certificate:
        """Check every claim about this model's parts and return the certificate; see `nnterp.certificate`.

        With `enable_attention_probs=True`, the attention probabilities of the first attention layer are proven as well
        (`attention_probabilities.check_source()` proves all).

        Nothing is loaded for it: without weights, only what a forward pass on fake tensors shows is checked.

        Raises:
            InsideTraceError: Called inside a trace of this model.
        """
        self.require_no_trace("validate()")
        self.proofs.clear()
        self._certificate = certify(self)
        prepare(self)
        in_several = not self.attention_layers and any(block.attentions for block in self.anatomy.blocks)
        if self._probabilities_check is not None and self.dispatched and self._certificate.ok and not in_several:
            first = self.attention_layers[0] if self.attention_layers else 0
            self.attention_probabilities.check_source(first, use_trace=self._probabilities_check)
        return self._certificate

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the last check; None if `check_renaming=False` and `validate()` was never called."""
        return self._certificate

    def require_no_trace(self, what: str) -> None:
        """Raise if the model is running a trace, in which it cannot be run again.

        Raises:
            InsideTraceError: It is.
        """
        if self.interleaver.interleaving:
            raise InsideTraceError(
                f"{what} runs the model itself, so it cannot be called inside a trace of the same model. "
                f"Call it before or after the `with` block."
            )

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's `trace`: run one forward pass, the block's reads and writes in it.

        Raises:
            InsideTraceError: Called inside a trace of this model.
            RemoteModelError: The model was loaded with `remote=True`, and the trace is not remote.
            ValueError: The trace is remote, and the tokenizer does not pad on the left, as the worker does.
        """
        self.require_no_trace("trace()")
        if kwargs.get("remote") or kwargs.get("backend") is not None:
            self._prepare_request()
        else:
            self.dispatch()
        return TransformersModel.trace(self, *inputs, **kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `session`: several traces in one block, and, with `remote=True`, in one request."""
        if kwargs.get("remote") or kwargs.get("backend") is not None:
            self._prepare_request()
        return TransformersModel.session(self, *args, **kwargs)

    def _prepare_request(self) -> None:
        if getattr(self.tokenizer, "padding_side", "left") != "left":
            raise ValueError(
                f"The tokenizer pads on the {self.tokenizer.padding_side}; a remote worker pads on the left. "
                "Set model.tokenizer.padding_side = 'left'."
            )
        travel_by_value()

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `scan`: shapes without weights. Values inside layers are looked up before it begins."""
        if not self.dispatched:
            self.learn_from_twin()
            with contextlib.suppress(Unavailable):
                findings(self)
        return TransformersModel.scan(self, *args, **kwargs)

    def prepare_run(self) -> None:
        """Nothing to do: what a layer must serve was prepared when it was proven."""

    def adopt(self, anatomy: Anatomy) -> None:
        """Take another anatomy for this model's, as the certificate does when the order of modules corrects a name."""
        self.anatomy = anatomy
        self.readout.adopt(anatomy)
        self._name_paths()
        self.__dict__.pop("_places", None)  # where values are served was looked up in the old one
        bind_names(self, anatomy)

    def _name_paths(self) -> None:
        self.model_class = self.anatomy.model_class
        self.layer_paths = tuple(block.path for block in self.anatomy.blocks)

    # -- where everything is ---------------------------------------------------------------------------------------

    def place(self, name: str, layer: int | tuple[int, int] | None = None) -> Place:
        """Where a value is served; looked up once.

        Raises:
            ValueError: There is no such value.
            Unavailable: The model, or this layer, does not have it; says why, and which layers do.
        """
        return get_value(name).place(self, layer)

    def module_path(self, role: str, layer: int) -> str:
        """Native path of the module that plays `role` ("self_attn", "mixer" or "mlp") in a layer.

        Raises:
            Unavailable: The layer has no such part, or it is no module of its own.
        """
        part = self.anatomy.part(role, layer)
        if part.path is None:
            raise Unavailable(
                f"The {role} of layer {layer} is no module of its own in {self.model_class}: it enters at {part.entry} "
                f"and leaves at {part.exit}. Its input and output can be read and written all the same."
            )
        return part.path

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with softmax attention over their own stream."""
        return self.anatomy.indices("self_attn")

    @property
    def attention_probabilities(self) -> AttentionProbabilitiesAccessor:  # type: ignore[override]
        """The accessor of `[batch, heads, query, key]` per layer, which can also show and prove where it reads."""
        return AttentionProbabilitiesAccessor(self, VALUES["attention_probabilities"].label)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """What is sent with a remote request: the traced half, and where everything is served.

        What found and proved it stays here.
        """
        self.learn_from_twin()
        state = TransformersModel.__getstate__(self)
        for name in self._STAYS_HERE:
            state.pop(name, None)
        state["directory"] = directory_of(self)
        return arriving, (), state

    _STAYS_HERE = (
        "anatomy",
        "rename_config",
        "residual_structures",
        "repeated",
        "run_order",
        "kept_as_stream",
        "_certificate",
        "_envoys_by_path",
        "_findings",
        "_learned",
        "_mid",
        "_places",
        "_prefix_free_tokenizer",
        "_probabilities_check",
        "proofs",
        "_twin",
    )

    # -- the table of values ----------------------------------------------------------------------------------------

    @property
    def values(self) -> dict[str, Value]:
        """The table of everything that can be read and written in a trace: name → row."""
        return dict(VALUES)

    def support(self) -> Support:
        """Which values this model has on which layers, and why not on the others.

        Runs the model on a short probe when it is called first (on fake tensors while the weights are not loaded).

        Raises:
            InsideTraceError: Called inside a trace of this model.
        """
        self.require_no_trace("support()")
        return support(self)

    def explain(self, name: str, layer: int | tuple[int, int] | None = None) -> None:
        """Print where a value is read in this model: native path, source lines, layout and rank.

        Args:
            name: A value of the table, or TransformerLens' name for it (`blocks.3.attn.hook_z`).
            layer: The layer; 0 if None. For one of several attentions in a layer, the layer and its number in it.

        Raises:
            ValueError: There is no such value.
            Unavailable: This model, or this layer of it, does not have it.
        """
        value, named = canonical(name)
        print(explain(self, value, layer if layer is not None else named))

    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: int | Iterable[int] | None = None,
        positions: Any = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Any = None,
        progress: bool = True,
        max_new_tokens: int | None = None,
        remote: Any = False,
        **generation: Any,
    ) -> Collected:
        """Read values of many prompts: plain tensors, in one pass that stops after the last layer needed.

        The result does not depend on the batch size or the padding side, memory grows by the result alone, and values
        may be asked for in any order.

        Args:
            prompts: Texts, token ids, tensors, chat messages, or a list of these; see `nnterp.inputs.encode`.
            values: Names of the table (`"layers_output"`), with a layer (`"mlp_neurons[3]"`) or TransformerLens'
                (`"blocks.3.hook_resid_post"`); one or several.
            layers: The layers, for values that name none; by default all that have the value.
            positions: Over each prompt's own tokens: an index (−1 is the last token whichever side is padded), a slice,
                a selector (`nnterp.positions.at("Paris")`, `last_of("Eiffel Tower")`), a list of these, or one list per
                prompt; all if None. One index, or `last_of`, has no axis in the result.
            batch_size: Prompts that share a forward pass.
            device: Where the result is kept.
            dtype: Its dtype; the model's if None.
            reduce: "mean" or "sum" over all prompts and positions (accumulated in double precision, returned in float32
                unless `dtype` says otherwise), or a function applied, on the model's device, to what is selected of a
                value, `[rows, (positions,) ...]`, which keeps the first axis.
            progress: Show a progress bar when there is more than one batch.
            max_new_tokens: Generate, and read every value at the positions from which each new token was predicted:
                `[layers, prompts, tokens, ...]`. The new tokens are the result's `generated`.
            remote: Run on the remote service, a request for each batch; what is reduced is reduced there.
            **generation: Settings of the generation, as in `generate`.

        Returns:
            A mapping from value to tensor, `[layers, prompts, (positions,) ...]`; see `nnterp.collection.Collected`.

        Raises:
            ValueError: There is no such value, or a position's text is not in a prompt.
            IndexError: There is no such layer, or a prompt has no such position; names the prompt and its length.
            Unavailable: A layer that was asked for does not have the value.
            InsideTraceError: Called inside a trace of this model.

            An error in a later batch carries what is finished as `error.collected`.
        """
        return collect(
            self,
            prompts,
            values,
            layers,
            positions,
            batch_size,
            device,
            dtype,
            reduce,
            progress,
            max_new_tokens,
            remote,
            **generation,
        )

    def gradients(
        self,
        prompts: Any,
        metric: Callable[[torch.Tensor], torch.Tensor],
        values: str | Iterable[str],
        layers: int | Iterable[int] | None = None,
        device: str | torch.device = "cpu",
        remote: Any = False,
    ) -> Gradients:
        """Gradients of a scalar of the logits with respect to values, in any order.

        Args:
            prompts: As in `collect`; they share one batch, padded on the left.
            metric: From the logits `[prompts, seq, vocab]` to one number, by differentiable operations.
            values, layers: As in `collect`.
            device: Where the result is kept.
            remote: Run on the remote service, the metric with it.

        Returns:
            Gradients and values by the same names as in `collect`, `[layers, prompts, seq, ...]` each; see
            `nnterp.gradients.Gradients`.

        Raises:
            RuntimeError: Called under `no_grad` or `inference_mode`.
            ValueError: The metric is no differentiable number, or the weights are frozen before a value.
            Unavailable: A layer that was asked for does not have the value.
            InsideTraceError: Called inside a trace of this model.
        """
        return gradients(self, prompts, metric, values, layers, device, remote)

    @property
    def attn_probs_available(self) -> bool:
        """Whether `attention_probabilities` can be read: attention is computed eagerly, and some layer has them."""
        return self.attention_probabilities.enabled and bool(self.attention_layers)

    # -- how it shows itself ---------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        verdict = self.certificate.verdict if self.certificate is not None else "Not certified (check_renaming=False)"
        return f"{self.anatomy._repr_html_()}<p>{html.escape(verdict)}</p>"

    def __rich__(self) -> Any:
        return self.anatomy.__rich__()

    @property
    def add_prefix_false_tokenizer(self) -> Any:
        """A copy of the tokenizer that does not put a space before the first word (1.x)."""
        if self._prefix_free_tokenizer is None:
            self._prefix_free_tokenizer = loading.prefix_free(self.tokenizer)
        return self._prefix_free_tokenizer
