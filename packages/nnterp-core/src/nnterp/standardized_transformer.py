"""`StandardizedTransformer`: any HuggingFace causal language model, its parts under one set of names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from torch import nn

from nnterp import loading
from nnterp.anatomy import RenameConfig
from nnterp.certificate import AttentionProbabilitiesAccessor, Certificate
from nnterp.errors import RemoteModelError, Unavailable, Unproven
from nnterp.facts import Facts, unproven_facts
from nnterp.image_runs import ImageTransformer
from nnterp.images import holds_images
from nnterp.inputs import is_pair
from nnterp.named_transformer import NamedTransformer
from nnterp.older import OlderModel, module_of_class, with_older_names
from nnterp.precision import drift_of
from nnterp.proofs import certified, check_first_probabilities, proven_by_twin, with_kept_searches
from nnterp.reading import ReadTransformer
from nnterp.renewal import Renewal, require_not_compiled
from nnterp.standing import hooks, unsteered
from nnterp.traced import Place, travel_by_value
from nnterp.traced_block import BlockTracer, OpeningTransformer, RequestTracer, know_cell
from nnterp.twin import Twin, build_twin, facts_by_twin, facts_without_twin
from nnterp.values import unrolled


class StandardizedTransformer(OlderModel, ReadTransformer, ImageTransformer, OpeningTransformer):
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
        keep_proofs: Keep on disk what is proven of a checkpoint, and read it from there when the same checkpoint is
            loaded again (see docs/certificate.md). With False nothing is read or written: everything is proven anew.
        **kwargs: Passed to nnsight and transformers: `dtype`, `device_map` ("auto" by default), `tokenizer`,
            `tokenizer_kwargs`, `revision`, `rename`, `dispatch`, `attn_implementation`, `automodel` (the class whose
            `from_pretrained` loads it, or its name), ...

    Attributes:
        anatomy: Which native module plays which part, see `nnterp.anatomy.Anatomy`.
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: The model's sizes;
            None where its config does not state one.

    Raises:
        AnatomyError: A part was not found, or `rename_config` names one that is not there.
        CertificateError: The parts found do not behave as their names say.
        ValueError: There is no such device here, or no such dtype.

    Example:
        model = StandardizedTransformer(nnterp.toy_checkpoint())  # or a hub id, a folder, a loaded module
        with torch.no_grad(), model.trace("The capital of France is"):
            stream = model.layers_output[4].save()  # [batch, seq, hidden]
            probabilities = model.next_token_probs.save()  # [batch, vocab]
        print(model.tokenizer.decode(probabilities[0].argmax()))  # → Paris
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
        keep_proofs: bool = True,
        **kwargs: Any,
    ) -> None:
        model = loading.checked_model(model, rename_config)
        if isinstance(model, nn.Module):
            require_not_compiled(model)
        else:
            loading.check_options(kwargs, remote)
        self.check_renaming = check_renaming
        self.remote, self.keep_proofs = remote, keep_proofs
        self.certificate: Certificate | None = None  # of the last check; None if nothing was ever checked
        self._twins: list[Twin | str] = []  # the twin, once it is built
        self._probabilities_check: bool | None = check_attn_probs_with_trace if enable_attention_probs else None
        rename_config = with_older_names(rename_config, kwargs)
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
        model = module_of_class(model, kwargs.pop("automodel", None), kwargs, remote)
        kwargs.setdefault("task", "text-generation")
        NamedTransformer.__init__(self, model, rename_config, tokenizer=tokenizer, **kwargs)
        for name, setting in (tokenizer_kwargs or {}).items():  # nnsight pads on the left; the user may not want it
            setattr(self.tokenizer, name, setting)
        self._renewal = Renewal(self)
        if remote:
            travel_by_value()
        if check_renaming:
            self._certify().raise_if_failed()
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

    def _prove(self, anew: bool = False) -> None:
        if self.check_renaming:
            self._certify(anew).raise_if_failed()
        else:
            self._renewal.follow_tree(self)
            self._stay_unproven()
        for steering in self.standing:
            hooks(self, steering)  # they do nothing once the steering ends

    def notice_changes(self) -> None:
        """Prove the model anew if it changed since it was proven: its modules, its config, its attention.

        Raises:
            ChangedModelError: What it is now cannot be proven.
        """
        self._renewal.notice(self, functools.partial(self._prove, anew=True))

    def validate(self, against: str | StandardizedTransformer | None = None, prompts: Any = None) -> Certificate:
        """Check every claim about this model's parts and return the certificate; see `nnterp.certificate`.

        Everything is proven anew, whatever is kept on disk.

        With `enable_attention_probs=True`, the attention probabilities of the first attention layer are proven as well
        (`attention_probabilities.check_source()` proves all). Whatever was proven of the model before, `proofs`
        included, is forgotten.

        Nothing is loaded for it: without weights, only what a forward pass on fake tensors shows is checked.

        Args:
            against: Also measure how far this model's values are from those of a more precise one:

                - "float32": a copy with the same weights, cast to float32, on the same devices, proven and then
                  dropped. What is measured is the rounding of the computation. The rounding of the weights themselves,
                  if the checkpoint was more precise, is not.
                - another `StandardizedTransformer` of the same depth and vocabulary, such as the checkpoint in its
                  own precision, or the model before it was quantised. Everything that differs is measured.
            prompts: What both are run on, as in `collect`; eight short texts if None.

        Returns:
            The certificate. Its `drift` is None without `against`, and where a line fails; else an
            `nnterp.certificate.Drift` with the relative error of every value at every layer and the share of positions
            at which both predict the same next token.

        Raises:
            InsideTraceError: Called inside a trace of this model.
            ValueError: `against` is something else, or the weights cannot be cast (quantised, offloaded, in float32
                already); says what to do instead.
            MemoryError: A copy in float32 does not fit.

        Example:
            half = StandardizedTransformer(nnterp.toy_checkpoint(), dtype=torch.bfloat16)
            half.dispatch()
            drift = half.validate(against="float32").drift
            drift.worst("layers_output"), drift.agreement
        """
        self.require_no_trace("validate()")
        if against is None and prompts is not None:
            raise ValueError("prompts are for validate(against=...), which runs two models on them.")
        certificate = self._certify(anew=True)
        if against is not None and certificate.ok:
            certificate = dataclasses.replace(certificate, drift=drift_of(self, against, prompts))
            self.certificate = certificate
        return certificate

    def _certify(self, anew: bool = False) -> Certificate:
        self._renewal.follow_tree(self)
        with unsteered(self):
            certificate, facts = certified(self, anew)
        if not self.dispatched:
            self._renewal.ran_without_weights(self._module)
        self._take_over(with_kept_searches(self, facts, anew), certificate)
        in_several = not self.attention_layers and any(layer.attentions for layer in self.anatomy.blocks)
        if self._probabilities_check is not None and self.dispatched and certificate.ok and not in_several:
            first = self.attention_layers[0] if self.attention_layers else 0
            check_first_probabilities(self, first, self._probabilities_check, anew)
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
        facts = proven_by_twin(self, self._facts_by_twin)
        if facts is None:
            assert isinstance(self.twin, str)
            facts = facts_without_twin(self.facts, self.twin)
        self._take_over(facts, self.certificate)

    def _facts_by_twin(self) -> Facts | None:
        twin = self.twin
        return facts_by_twin(self.facts, twin, self._module.config) if isinstance(twin, Twin) else None

    @property
    def passes(self) -> tuple[int, ...]:
        """How often each layer module runs in a forward pass: once, unless the model is looped."""
        return self.anatomy.passes

    def unrolled(self, layer: int, number: int | None = None) -> Any:
        """Return the index of a run of a layer among all runs of layers, for `layers=` and `[...]`; see docs/looped.md.

        Args:
            layer: Number of the layer module; a negative one counts from the last.
            number: The pass; a negative one counts from the last. All if None.

        Returns:
            The index of that run, or a list with those of all passes.

        Raises:
            IndexError: There is no such layer, or it does not run as often.
            TypeError: One of the two is no integer.

        Example:
            print(model.unrolled(3))  # more than one number in a looped model → [3]
        """
        return unrolled(self.facts, layer, number)

    # -- running -----------------------------------------------------------------------------------------------------

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's `trace`: run one forward pass, the block's reads and writes in it; returns its tracer, for `with`.

        Values are read and written in forward order. A block that only reads, at indices that stand in its source, may
        read in any order.

        Raises:
            InsideTraceError: Called inside a trace of this model.
            RemoteModelError: The model was loaded with `remote=True`, and the trace is not remote.
            ValueError: The trace is remote, and the tokenizer does not pad on the left, as the worker does; or the
                block's body stands on the line of its `with`.
        """
        self.require_no_trace("trace()")
        know_cell()
        if not self.dispatched:
            loading.refuse_unreadable_block(sys._getframe(1))
        if kwargs.get("remote") or kwargs.get("backend") is not None:
            self._prepare_request()
            kwargs.setdefault("tracer_cls", RequestTracer)
        else:
            self.dispatch()
            self.notice_changes()
            first = inputs[0] if inputs else None
            if any(holds_images(one) or is_pair(one) for one in (first if isinstance(first, list) else [first])):
                inputs = (self._with_images(inputs[0]), *inputs[1:])
            elif holds_images(kwargs) and "input_ids" in kwargs:
                self._with_images(kwargs)
            kwargs.setdefault("tracer_cls", BlockTracer)
        return TransformersModel.trace(self, *inputs, **kwargs)

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `scan`: shapes without weights; returns its tracer. First looks up values inside layers.

        Raises:
            ValueError: Something, such as a steering, follows the scan in its `with`.
        """
        self.learn_from_twin()
        with contextlib.suppress(Unavailable):
            _ = self.facts.inside
        return OpeningTransformer.scan(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """What a remote request takes along. Before the first request, learns from the twin."""
        self.learn_from_twin()
        return NamedTransformer.__reduce_ex__(self, protocol)

    def project_on_vocab(  # noqa: D102 (inherited)
        self, hidden_state: torch.Tensor, tokens: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        if not self.interleaver.interleaving:
            self.dispatch()
        return NamedTransformer.project_on_vocab(self, hidden_state, tokens)

    # -- where everything is -----------------------------------------------------------------------------------------

    def place(self, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
        """Look up, once, where a value is served; returns the place. Without weights, a value that only a run can
        find is looked up in the twin.

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

    @property
    def attn_probs_available(self) -> bool:
        """Whether `attention_probabilities` can be read: attention is computed eagerly, and some layer has them."""
        return self.attention_probabilities.enabled and bool(self.attention_layers)

    # -- how it shows itself ---------------------------------------------------------------------------------------

    @property
    def _verdict(self) -> str:
        return self.certificate.verdict if self.certificate is not None else "Not certified (check_renaming=False)"

    def __repr__(self) -> str:
        """Standard names beside native ones, and the certificate's verdict; `model._module` prints the module tree."""
        return f"{self.anatomy}\n{self._verdict}"

    def _repr_html_(self) -> str:
        return f"{self.anatomy._repr_html_()}<p>{html.escape(self._verdict)}</p>"
