"""`NamedTransformer`: nnsight's model under standard names, with its facts, in which values are looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.intervention.envoy import Envoy
from torch import nn

from nnterp.anatomy import Anatomy, RenameConfig, find_anatomy
from nnterp.decoders import check_encoder_mask
from nnterp.devices import input_device
from nnterp.discovery import ResidualStructure
from nnterp.editing import EditedTransformer, mentions_edits, mentions_values
from nnterp.errors import ShapeError, Unavailable, UnprovenWarning
from nnterp.facts import Facts, unproven_facts
from nnterp.few_tokens import logits_of
from nnterp.huggingface import is_huggingface, require_no_dropout, without_full_mask
from nnterp.identity import Checkpoint, checkpoint_of
from nnterp.inputs import Row, both_inputs, require_tokens, tokenized
from nnterp.loading import left_in_place, quiet_about_the_task, reported
from nnterp.sent import SENT, SENT_OF_NNSIGHT, SentByName
from nnterp.table import LABELS, SENT_WHERE_NAMED
from nnterp.traced import (
    Attached,
    Edits,
    LayerAccessor,
    Lender,
    NoEdits,
    Place,
    Readout,
    Sharing,
    TracedTransformer,
    arriving,
    bind_names,
    require_running,
    travel_by_value,
)
from nnterp.turn import Turn
from nnterp.values import Attachment, attached_of, directory_of, features_of, find_place, layers_that_run, runs_of
from nnterp.warn import warn

_ANOTHER = "make another, over its module or a copy: StandardizedTransformer({}, tokenizer=model.tokenizer)."


class NamedTransformer(EditedTransformer):
    """A model under standard names, as the certificate examines it and `StandardizedTransformer` extends it.

    Args:
        model: A hub id, a local folder, or a HuggingFace module that is already loaded.
        rename_config: Names of parts for models whose structure does not give them away.
        **kwargs: Passed to nnsight's `TransformersModel`.

    Attributes:
        facts: All that is known of the model; see `nnterp.facts.Facts`.
        rename_config: As given.

    Raises:
        AnatomyError: A part was not found, or `rename_config` names one that is not there.
    """

    def __init__(self, model: str | nn.Module, rename_config: RenameConfig | None = None, **kwargs: Any) -> None:
        self.rename_config = rename_config
        self._turn = Turn()  # of the thread that runs the model
        self.standing, self.edits, self.loaded_files = (), Edits(), Checkpoint()
        self.attachments: dict[tuple[int, int], Attachment] = {}  # dictionaries, see `nnterp.attach`
        self.proofs: dict[tuple, Any] = {}  # proven beyond the certificate, by whoever needs it; see `validate`
        self._envoys_by_path: dict[str, Envoy] = {}
        self._load_reports: list[tuple[nn.Module, dict[str, Any]]] = []  # what transformers said of the checkpoint
        with quiet_about_the_task():
            TransformersModel.__init__(self, model, **kwargs)
        declared = None if rename_config is None else rename_config.attn_prob_source
        facts = unproven_facts(self._module, find_anatomy(self._module, rename_config), declared)
        self.adopt(facts.searching(self._module, self.interleaver) if self.dispatched else facts)

    def _wrap(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with left_in_place(module):
            return TransformersModel._wrap(self, module, *args, **kwargs) if is_huggingface(module) else module

    @property
    def device(self) -> torch.device:
        """Where nnsight moves inputs to: not to the meta device, on which the weights of an offloaded embedding are."""
        return input_device(self._module) if self.dispatched else TransformersModel.device.fget(self)

    def _batch(self, invokes: list, fn: Any) -> tuple:
        if not is_huggingface(self._module):
            invokes = [tokenized(self.tokenizer, *invoke) for invoke in invokes]
        elif self.num_encoder_layers and getattr(fn, "__name__", fn) in ("_call", "__call__"):
            invokes = [both_inputs(self, *invoke) for invoke in invokes]
        args, kwargs = TracedTransformer._batch(self, invokes, fn)
        check_encoder_mask(self, kwargs)
        require_tokens(kwargs)
        return args, kwargs if is_huggingface(self._module) else without_full_mask(self._module, kwargs)

    def _load(self, *args: Any, **kwargs: Any) -> nn.Module:
        name, options = str((*args, "")[0]), {"revision": self.revision, **kwargs}
        files = checkpoint_of(name, options)
        with self._turn, quiet_about_the_task(), reported(self._load_reports):
            module = TransformersModel._load(self, *args, **kwargs)
        self.loaded_files = files if files.unchanged() else Checkpoint()
        self._load_reports[:] = [report for report in self._load_reports if report[0] is module]
        return module

    @property
    def load_report(self) -> dict[str, Any] | None:
        """Which weights the checkpoint did not fill, or has beside; None for a model that nnterp did not load."""
        return self._load_reports[-1][1] if self._load_reports else None

    def adopt(self, facts: Facts) -> None:
        """Take over what was learnt of this model, and bind the names of its anatomy."""
        self.facts, self.runs = facts, runs_of(facts)
        bind_names(self, facts.anatomy.names(), facts.readout.layer_paths)

    def supposing(self, facts: Facts) -> NamedTransformer:
        """The same model with other facts, for as long as they are being proven; this one stays as it is.

        The two share the HuggingFace module, nnsight's tree and the names that are bound to it.
        """
        trial = object.__new__(NamedTransformer)
        trial.__dict__.update(self.__dict__, facts=facts, runs=runs_of(facts))
        return trial

    # -- what is known, by the names that the traced half uses ------------------------------------------------------

    @property
    def anatomy(self) -> Anatomy:
        """Which native module plays which part."""
        return self.facts.anatomy

    @property
    def readout(self) -> Readout:  # type: ignore[override]
        """How hidden states become logits."""
        return self.facts.readout

    @property
    def lenders(self) -> list[Lender]:  # type: ignore[override]
        """Layers that later ones borrow keys and values from."""
        return self.facts.lenders

    @property
    def padding_is_exact(self) -> bool:
        """Whether a row of a padded batch is proven to equal the row alone, for rows that may share it (`sharing`)."""
        return self.facts.padding == "exact"

    @property
    def sharing(self) -> Sharing:  # type: ignore[override]
        """Which rows may share a padded batch, by their lengths."""
        return self.facts.sharing

    @property
    def only_with_image(self) -> tuple[int, ...]:
        """Indices of the layers that run only with an image."""
        return self.facts.only_with_image

    @property
    def positions_from_mask(self) -> bool:  # type: ignore[override]
        """Whether a padded batch must be told its positions, counted from the mask."""
        return self.facts.positions_from_mask

    @property
    def residual_structures(self) -> tuple[ResidualStructure, ...]:
        """How each layer combines its parts; empty before it is proven."""
        return self.facts.residual

    @property
    def model_class(self) -> str:  # type: ignore[override]
        """Name of the HuggingFace class."""
        return self.facts.anatomy.model_class

    @property
    def layer_paths(self) -> tuple[str, ...]:  # type: ignore[override]
        """Native path of each layer's module."""
        return self.facts.readout.layer_paths

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        """Number of layers of the residual stream; in a looped model, each counts as often as it runs."""
        return self.facts.anatomy.num_layers

    @property
    def num_encoder_layers(self) -> int:  # type: ignore[override]
        """Number of layers of the encoder of an encoder-decoder model; 0 if it has none."""
        return 0 if self.facts.encoder is None else self.facts.encoder.anatomy.num_layers

    @property
    def hidden_size(self) -> int | None:  # type: ignore[override]
        """Width of the residual stream; None where the config does not state it."""
        return self.facts.anatomy.sizes.hidden_size

    @property
    def num_vision_layers(self) -> int:  # type: ignore[override]
        """Number of layers of the vision tower; 0 until a run with an image has proven them."""
        return len(self.facts.vision.layers) if self.facts.vision else 0

    @property
    def num_heads(self) -> int | None:  # type: ignore[override]
        """Query heads of an attention layer; None where the config does not state them."""
        return self.facts.anatomy.sizes.num_heads

    @property
    def num_kv_heads(self) -> int | None:  # type: ignore[override]
        """Key and value heads of an attention layer; None where the config does not state them."""
        return self.facts.anatomy.sizes.num_kv_heads

    @property
    def head_dim(self) -> int | None:  # type: ignore[override]
        """Width of one head; None where the config does not state it."""
        return self.facts.anatomy.sizes.head_dim

    @property
    def intermediate_size(self) -> int | None:  # type: ignore[override]
        """Width of the feed-forward; None where neither the config nor its matrices tell."""
        return self.facts.anatomy.sizes.intermediate_size

    @property
    def vocab_size(self) -> int | None:  # type: ignore[override]
        """Size of the vocabulary that the logits are over; None where the config does not state it."""
        return self.facts.anatomy.sizes.vocab_size

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with softmax attention over their own stream."""
        return self.facts.anatomy.indices("self_attn")

    @property
    def logits(self) -> torch.Tensor:
        """`[batch, seq, vocab]` of the running forward pass, dtype and device of the model's output; may be assigned.

        What a module that is not HuggingFace's returns, if that is one tensor.
        """
        require_running(self, "logits")
        return output if isinstance(output := self.output, torch.Tensor) else output.logits

    @logits.setter
    def logits(self, tensor: torch.Tensor) -> None:
        output = self.output
        if not isinstance(output, torch.Tensor):
            TracedTransformer.logits.__set__(self, tensor)  # type: ignore[attr-defined]
            return
        if tensor.shape != output.shape:
            raise ShapeError(
                f"logits has shape {list(output.shape)}; a tensor of shape {list(tensor.shape)} cannot replace it."
            )
        self.output = tensor

    def layers_of_texts(self, asked: Iterable[int] | None = None, images: bool = False) -> list[int]:
        """List the layers that a text runs through, for functions that run texts; returns indices from 0.

        Args:
            asked: The layers that a user asked for; all if None. A warning names those that run only with an image.
            images: Whether every prompt has one: then all layers run.

        Raises:
            Unavailable: One that was asked for runs only with an image.
        """
        return layers_that_run(self.facts, asked, images)

    def require_images(self, row: Row) -> None:
        """Does nothing here; `StandardizedTransformer` proves runs with an image."""

    @property
    def attached(self) -> Attached | None:  # type: ignore[override]
        """The attached dictionaries, as they travel."""
        return attached_of(self, self.attachments)

    def place(self, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
        """Where a value is served; looked up once.

        Raises:
            ValueError: There is no such value.
            Unavailable: The model, or this layer, does not have it; says why, and which layers do.
        """
        if name == "features" and self.attachments:
            return features_of(self, self.attachments, layer)
        return find_place(self.facts, self._module, name, layer)

    def module_path(self, role: str, layer: int) -> str:
        """Find the module that plays `role` ("self_attn", "mixer" or "mlp") in a layer; returns its native path.

        Raises:
            Unavailable: The layer has no such part, or it is no module of its own.
        """
        part = self.facts.anatomy.part(role, layer)
        if part.path is None:
            raise Unavailable(
                f"The {role} of layer {layer} is no module of its own in {self.model_class}: it enters at {part.entry} "
                f"and leaves at {part.exit}. Its input and output can be read and written all the same."
            )
        return part.path

    def prepare_run(self) -> None:
        """Does nothing here: the proof has instrumented the operations that make `layers_mid`. A worker does it."""

    def prepare(self, remote: Any = False) -> None:
        """Load the weights before a run, unless the run is remote.

        Raises:
            TrainingModeError: The model is in training mode and has dropout, so that its numbers are random.
        """
        if not remote:
            self.dispatch()
            require_no_dropout(self._module, self.model_class)

    @property
    def generate(self) -> Any:
        """nnsight's `generate`, in one thread at a time. A property, because nnsight looks for the caller's `with`."""
        self._turn.require_mine()
        return TransformersModel.generate.__get__(self)

    @property
    def pipe(self) -> Any:
        """nnsight's `pipe`, in one thread at a time."""
        self._turn.require_mine()
        return TransformersModel.pipe.__get__(self)

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `interleave`, in one thread at a time; returns what that returns.

        Raises:
            AnotherThreadError: Another thread is running the model.
        """
        with self._turn:
            return TransformersModel.interleave(self, fn, *args, **kwargs)

    def project_on_vocab(
        self, hidden_state: torch.Tensor, tokens: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of hidden states: exactly what the model does after its last layer, final softcap and scales included.

        Works inside a trace and outside (where it loads the weights if need be).

        Args:
            hidden_state: `[..., hidden]`, as in `layers_output`.
            tokens: Ids of the tokens whose logits are wanted, if not all; only their rows of the head are multiplied.

        Returns:
            `[..., vocab]`, or `[..., tokens]`, in the model's dtype, on the head's device.

        Raises:
            ShapeError: The last axis is not the model's hidden size.
            Unavailable: It is not proven what this model does after its last layer.
            ValueError: `tokens` are no ids of tokens.

        Warns:
            UnprovenWarning: The model was loaded with `check_renaming=False`.
        """
        if self.readout.way == "unproven":
            warn(
                f"{self.model_class}: nothing proves that {self.readout.chain} gives its logits, because the model was "
                "loaded with check_renaming=False. Call model.validate() to prove it.",
                UnprovenWarning,
            )
        return logits_of(self, hidden_state, tokens)

    def __rich__(self) -> Any:
        return self.anatomy.__rich__()

    def _prepare_request(self) -> None:
        if self.num_encoder_layers:
            raise Unavailable(f"{self.model_class} reads two inputs: it does not run on a remote worker.")
        if getattr(self.tokenizer, "padding_side", "left") != "left":
            raise ValueError(
                f"The tokenizer pads on the {self.tokenizer.padding_side}; a remote worker pads on the left. "
                "Set model.tokenizer.padding_side = 'left'."
            )
        mentions_edits.set(True)
        mentions_values.set(SENT_WHERE_NAMED)
        travel_by_value()

    def __copy__(self) -> NamedTransformer:
        raise TypeError("A model cannot be copied: " + _ANOTHER.format("model._module"))

    def __deepcopy__(self, memo: Any) -> NamedTransformer:
        raise TypeError("A model cannot be copied: " + _ANOTHER.format("copy.deepcopy(model._module)"))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """What a remote request takes along: the traced half of the model, and where every value is served."""
        own = TransformersModel.__getstate__(self)
        bound = {name for name, value in own.items() if isinstance(value, Envoy)}
        state = {name: own[name] for name in own if name in SENT_OF_NNSIGHT or name in bound}
        state.update({name: getattr(self, name) for name in SENT})
        if self.tokenizer is not None:
            state.pop("tokenizer")  # first, so that any other pickle is refused before it meets the module
            state = {"tokenizer": SentByName(self.tokenizer._persistent_id, type(self).__name__), **state}
        state["sharing"] = None if self.sharing == Sharing() else self.sharing
        state["edits"] = self.edits if mentions_edits.get() else NoEdits()
        named = mentions_values.get()
        state.update({name: LayerAccessor(self, LABELS[name]) for name in named})
        state["directory"] = directory_of(self, self.module_path, SENT_WHERE_NAMED - named)
        return arriving, (), state
