"""`StandardizedTransformer`: any HuggingFace causal language model, its parts under one set of names."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from torch import nn

from nnterp import loading
from nnterp.anatomy import RenameConfig
from nnterp.certificate import AttentionProbabilitiesAccessor, Certificate, certify
from nnterp.collection import Collected, Gradients, collect, gradients
from nnterp.errors import RemoteModelError, Unavailable, Unproven
from nnterp.facts import Facts, unproven_facts
from nnterp.named_transformer import NamedTransformer
from nnterp.renewal import Renewal, require_not_compiled
from nnterp.traced import Place, travel_by_value
from nnterp.turn import OneThreadTracer
from nnterp.twin import Twin, build_twin, facts_by_twin, facts_without_twin
from nnterp.values import VALUES, Support, Value, canonical, explain, support


class StandardizedTransformer(NamedTransformer):
    """A causal language model in its original HuggingFace implementation, with one name for every part of it.

    Whatever the architecture calls its modules, `embed_tokens`, `layers[i].self_attn`, `layers[i].mlp`, `ln_final` and
    `lm_head` are there, and inside a trace `layers_output[i]`, `attentions_output[i]`, `mlps_output[i]`, `logits` and
    the other values of `nnterp.values.VALUES` can be read and written. That the names are right is proven when the
    model is loaded (`validate()` returns the proof). Everything of nnsight (`trace`, `generate`, `session`, `scan`,
    `edit`, ...) works as on nnsight's own model.

    Args:
        model: A hub id, a local folder, or a HuggingFace module that is already loaded.
        trust_remote_code: Run modelling code that comes with the checkpoint.
        check_renaming: Prove the names at load. False skips the proof, and with it every guarantee: what needs only a
            name is served, what needs a proof is refused or warned of (see docs/certificate.md).
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
        if isinstance(model, nn.Module):
            require_not_compiled(model)
        self.check_renaming = check_renaming
        self.remote = remote
        self.certificate: Certificate | None = None  # of the last check; None if nothing was ever checked
        self.proofs: dict[tuple, Any] = {}  # proven beyond the certificate, by whoever needs it; see `validate`
        self._twins: list[Twin | str] = []  # the twin, once it is built
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
        NamedTransformer.__init__(self, model, rename_config, tokenizer=tokenizer, **kwargs)
        for name, setting in (tokenizer_kwargs or {}).items():  # nnsight pads on the left; the user may not want it
            setattr(self.tokenizer, name, setting)
        self._renewal = Renewal(self)
        if remote:
            travel_by_value()
        if check_renaming:
            self.validate().raise_if_failed()
        elif self.dispatched:
            self._stay_unproven()

    # -- loading and proof -----------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Load the weights, if they are not there yet, and prove the names with them.

        Raises:
            CertificateError: With the weights, a line of the certificate fails.
            RemoteModelError: The model was loaded with `remote=True`.
            ChangedModelError: The model was edited while its weights were absent.
        """
        if self.dispatched:
            return
        if self.remote:
            raise RemoteModelError(
                f"{self.repo_id or self.model_class} was loaded with remote=True, so its weights are never loaded "
                "here, and what was asked for runs here. Pass remote=True to it as well, or load the model without."
            )
        self._renewal.require_unedited(self)
        side = getattr(self.tokenizer, "padding_side", None)
        TransformersModel.dispatch(self)
        if side is not None:  # nnsight sets it to the left again; the user may have chosen the other
            self.tokenizer.padding_side = side
        self._prove()

    def _prove(self) -> None:
        if self.check_renaming:
            self.validate().raise_if_failed()
        else:
            self._renewal.follow_tree(self)
            self._stay_unproven()

    def notice_changes(self) -> None:
        """Prove the model anew if it changed since it was proven: its modules, its config, its attention.

        Raises:
            ChangedModelError: What it is now cannot be proven.
        """
        self._renewal.notice(self, self._prove)

    def validate(self) -> Certificate:
        """Check every claim about this model's parts and return the certificate; see `nnterp.certificate`.

        With `enable_attention_probs=True`, the attention probabilities of the first attention layer are proven as well
        (`attention_probabilities.check_source()` proves all). Whatever was proven of the model before, `proofs`
        included, is forgotten.

        Nothing is loaded for it: without weights, only what a forward pass on fake tensors shows is checked.

        Raises:
            InsideTraceError: Called inside a trace of this model.
        """
        self.require_no_trace("validate()")
        self._renewal.follow_tree(self)
        certificate, facts = certify(self)
        self._take_over(facts, certificate)
        in_several = not self.attention_layers and any(layer.attentions for layer in self.anatomy.blocks)
        if self._probabilities_check is not None and self.dispatched and certificate.ok and not in_several:
            first = self.attention_layers[0] if self.attention_layers else 0
            self.attention_probabilities.check_source(first, use_trace=self._probabilities_check)
        return certificate

    def _stay_unproven(self) -> None:
        """With weights but without a proof: names alone; the inside of layers is found when it is first needed."""
        facts = unproven_facts(self._module, self.anatomy, self.facts.declared_probabilities)
        self._take_over(facts.searching(self._module, self.interleaver), None)

    def _take_over(self, facts: Facts, certificate: Certificate | None) -> None:
        """The one place at which what was learnt of the model is assigned to it."""
        self.proofs.clear()
        self.certificate = certificate
        self.adopt(facts)
        if self.dispatched and (certificate is None or certificate.ok):
            self._renewal.proved(self._module, facts)

    @property
    def twin(self) -> Twin | str:
        """A small random model of the same code, certified while this one's weights are absent; or why there is none.

        Built when it is first needed; see `nnterp.twin`.
        """
        if not self._twins:
            self._twins.append(build_twin(self))
        return self._twins[0]

    def prepare(self, remote: Any = False) -> None:
        """Prepare for a run: load the weights, or, for a remote run, learn what the twin can prove."""
        if remote:
            self.learn_from_twin()
        else:
            NamedTransformer.prepare(self)
            self.notice_changes()

    def learn_from_twin(self) -> None:
        """Take over what the twin proves about the code, unless the weights are loaded or the twin was already used."""
        if self.dispatched or self.facts.proof == "twin" or self.facts.look_inside is not None:
            return
        twin = self.twin
        if isinstance(twin, Twin):
            self._take_over(facts_by_twin(self.facts, twin, self._module.config), self.certificate)
        else:
            self._take_over(facts_without_twin(self.facts, twin), self.certificate)

    # -- running -----------------------------------------------------------------------------------------------------

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
            self.notice_changes()
            kwargs.setdefault("tracer_cls", OneThreadTracer)
        return TransformersModel.trace(self, *inputs, **kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `session`: several traces in one block, and, with `remote=True`, in one request."""
        if kwargs.get("remote") or kwargs.get("backend") is not None:
            self._prepare_request()
        return TransformersModel.session(self, *args, **kwargs)

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `scan`: shapes without weights. Values inside layers are looked up before it begins."""
        self.learn_from_twin()
        with contextlib.suppress(Unavailable):
            _ = self.facts.inside
        return TransformersModel.scan(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """What a remote request takes along. Before the first request, learns from the twin."""
        self.learn_from_twin()
        return NamedTransformer.__reduce_ex__(self, protocol)

    def project_on_vocab(self, hidden_state: torch.Tensor) -> torch.Tensor:  # noqa: D102 (inherited)
        if not self.interleaver.interleaving:
            self.dispatch()
        return NamedTransformer.project_on_vocab(self, hidden_state)

    # -- where everything is -----------------------------------------------------------------------------------------

    def place(self, name: str, layer: int | tuple[int, int] | None = None) -> Place:
        """Where a value is served; looked up once. Without weights, a value told by numbers is looked up in the twin.

        Raises:
            ValueError: There is no such value.
            Unavailable: The model, or this layer, does not have it; says why, and which layers do.
        """
        try:
            return NamedTransformer.place(self, name, layer)
        except Unproven:
            if self.dispatched:
                raise
            self.learn_from_twin()
            return NamedTransformer.place(self, name, layer)

    @property
    def attention_probabilities(self) -> AttentionProbabilitiesAccessor:  # type: ignore[override]
        """The accessor of `[batch, heads, query, key]` per layer, which can also show and prove where it reads."""
        return AttentionProbabilitiesAccessor(self)

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
                prompt; all if None. With one index, or `last_of`, the result has no axis of positions.
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
        options = (batch_size, device, dtype, reduce, progress, max_new_tokens, remote)
        return collect(self, prompts, values, layers, positions, *options, **generation)

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
