"""`TracedTransformer`: the half of a standardized model that works inside a forward pass, here or on a worker."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from nnsight import TransformersModel
from nnsight.intervention.envoy import Envoy
from torch._subclasses.fake_tensor import is_fake

from nnterp.errors import ShapeError, Unavailable
from nnterp.table import LABELS, SENT_WHERE_NAMED, Label
from nnterp.traced._accessors import LayerAccessor, ModuleListAccessor, read_value, require_running, write_value
from nnterp.traced._binding import envoy_at
from nnterp.traced._bracketing import bracket_one
from nnterp.traced._directory import Directory
from nnterp.traced._places import Inside
from nnterp.traced._readout import Readout, project_on_vocab
from nnterp.traced._sharing import require_single

if TYPE_CHECKING:
    from nnterp.traced._edits import NoEdits
    from nnterp.traced._features import Attached
    from nnterp.traced._running import Lender, Place
    from nnterp.traced._runs import Runs
    from nnterp.traced._sharing import Sharing


class TracedTransformer(TransformersModel):
    """The half of a standardized model that works inside a forward pass: its names, values, and interventions.

    A remote worker rebuilds it from its source in each request. It finds and proves nothing: where values are served
    arrives in `directory`.
    """

    # Comments, because a docstring travels.
    num_layers: int  # layers of the residual stream
    num_vision_layers: int  # layers of the vision tower
    hidden_size: int | None  # sizes are None where the config does not state them
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None
    vocab_size: int | None
    model_class: str  # name of the HuggingFace class
    layer_paths: tuple[str, ...]  # native path of each layer's module
    runs: Runs | None  # of a looped model: which index each run of a layer has
    readout: Readout  # how hidden states become logits
    lenders: list[Lender]  # layers that later ones borrow keys and values from
    directory: Directory  # where every value is served
    attached: Attached | None  # the dictionaries that make features of values; None if there are none
    sharing: Sharing | None  # which rows may share a padded batch; None on a worker if all may
    standing: tuple  # steerings of every run, see `model.steering`
    edits: NoEdits  # what can be edited; `Edits` here, and on a worker if the block names one
    positions_from_mask: bool  # whether a padded batch must be told its positions, counted from the mask

    if TYPE_CHECKING:
        output: Any
        embed_tokens: Envoy
        layers: Envoy
        ln_final: Envoy
        lm_head: Envoy
        token_embeddings: torch.Tensor
        layers_input: LayerAccessor
        layers_output: LayerAccessor
        attentions_input: LayerAccessor
        attentions_output: LayerAccessor
        attention_queries: LayerAccessor
        attention_keys: LayerAccessor
        attention_values: LayerAccessor
        attention_scores: LayerAccessor
        attention_probabilities: LayerAccessor
        attention_head_outputs: LayerAccessor
        attention_head_contributions: LayerAccessor
        attention_contributions: LayerAccessor
        mixers_input: LayerAccessor
        mixers_output: LayerAccessor
        mixer_contributions: LayerAccessor
        layers_mid: LayerAccessor
        mlp_neurons: LayerAccessor
        shared_expert_neurons: LayerAccessor
        mlp_contributions: LayerAccessor
        other_contributions: LayerAccessor
        mlps_input: LayerAccessor
        mlps_output: LayerAccessor
        features: LayerAccessor
        ln_final_output: torch.Tensor
        vision_layers_input: LayerAccessor
        vision_attentions_output: LayerAccessor
        vision_layers_output: LayerAccessor
        image_features: torch.Tensor

    def _batch(self, invokes: list, fn: Any) -> tuple:
        args, kwargs = TransformersModel._batch(self, invokes, fn)
        self.prepare_run()
        own = "decoder_" if "decoder_input_ids" in kwargs else ""
        mask, ids, embeds = (kwargs.get(own + name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
        padded = isinstance(mask, torch.Tensor) and not is_fake(mask) and not bool(mask.all())
        ids = embeds if ids is None else ids
        width = None if ids is None else ids.shape[1]
        self.interleaver.stepping = getattr(fn, "__name__", fn) not in ("_call", "__call__")
        settings = kwargs | self.interleaver.batcher.extra_kwargs
        if self.interleaver.stepping and len(invokes) > 1:
            require_single(settings, self._module)
        self.edits.begin(self, kwargs, mask if padded else None, width)
        self.interleaver.right_padded = padded and not bool(mask[..., -1].all())
        if self.sharing is not None:
            counted = self.positions_from_mask and "position_ids" in kwargs
            self.sharing.begin(self, mask if padded else None, settings, counted)
        if padded and not self.positions_from_mask:
            kwargs = {name: value for name, value in kwargs.items() if name != "position_ids"}
        return args, kwargs

    @property
    def iter(self) -> Any:
        """nnsight's deprecated `model.iter`: use `tracer.iter`."""
        return self.edits.loop(TransformersModel.iter.fget(self))  # warns

    def all(self) -> Any:
        """nnsight's deprecated `model.all()`: use `tracer.all()`."""
        return self.iter[:]

    def prepare_run(self) -> None:
        """Instrument the operations that make `layers_mid`, which a layer that has begun could not serve any more."""
        known: dict[tuple[Any, str], Any] = {}
        for layer in range(self.num_layers):
            with contextlib.suppress(Unavailable):
                place = self.place("layers_mid", layer)
                if isinstance(place, Inside):
                    bracket_one(self._module.get_submodule(place.path), place.labels[0], known)

    def _remoteable_class(self) -> type:
        # A remote worker serves the plain nnsight model; the names are this client's affair.
        return TransformersModel

    def place(self, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
        """Where a value is served.

        Raises:
            Unavailable: The model, or this layer, does not have it.
        """
        if name == "features" and self.attached is not None:
            return self.attached.place(layer)
        return self.directory.place(name, layer, self.layer_paths)

    def module_path(self, role: str, layer: int) -> str:
        """Native path of the module that plays `role` ("self_attn", "mixer" or "mlp") in a layer.

        Raises:
            Unavailable: The layer has no such part, or it is no module of its own.
        """
        return self.directory.module_path(role, layer, self.layer_paths)

    # -- parts -----------------------------------------------------------------------------------------------------

    def envoy(self, path: str) -> Envoy:
        """The envoy of the module at a native path, as in `module.get_submodule(path)`."""
        known = self.__dict__.setdefault("_envoys_by_path", {})
        if path not in known:
            known[path] = envoy_at(self, path)
        return known[path]

    @property
    def attentions(self) -> ModuleListAccessor:
        """The attention module of each layer that has one: `model.attentions[i]`."""
        return ModuleListAccessor(self, "self_attn", "attentions")

    @property
    def mixers(self) -> ModuleListAccessor:
        """The sequence mixer of each layer, of any kind: `model.mixers[i]`."""
        return ModuleListAccessor(self, "mixer", "mixers")

    @property
    def mlps(self) -> ModuleListAccessor:
        """The feed-forward module of each layer that has one: `model.mlps[i]`."""
        return ModuleListAccessor(self, "mlp", "mlps")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with softmax attention over their own stream."""
        return self.directory.having("attentions_output")

    # -- values that are not per layer -----------------------------------------------------------------------------

    @property
    def logits(self) -> torch.Tensor:
        """`[batch, seq, vocab]` of the running forward pass; may be assigned."""
        require_running(self, "logits")
        return self.output.logits

    @logits.setter
    def logits(self, tensor: torch.Tensor) -> None:
        current = self.logits
        if tensor.shape != current.shape:
            raise ShapeError(
                f"logits has shape {list(current.shape)}; a tensor of shape {list(tensor.shape)} cannot replace it."
            )
        output: Any = self.output
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            output = dataclasses.replace(output, logits=tensor)
        self.output = output

    @property
    def next_token_probs(self) -> torch.Tensor:
        """Probabilities of the token after each row, `[batch, vocab]`, in the logits' dtype and on their device.

        Raises:
            ValueError: Rows are padded on the right, so their last position is not their last token.
        """
        logits = self.logits
        if self.interleaver.right_padded:
            raise ValueError(
                "next_token_probs reads the last position of every row, which is padding in some rows here. Pad on the "
                "left (model.tokenizer.padding_side = 'left'), or index model.logits yourself."
            )
        return logits[:, -1].softmax(-1)

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids of the running forward pass, int64 `[batch, seq]`, on its device; read it before any layer."""
        return self._model_input("input_ids")

    @property
    def input_size(self) -> torch.Size:
        """`(batch, seq)` of the running forward pass; read it before any layer."""
        return self.input_ids.shape

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 at tokens and 0 at padding, `[batch, seq]`, the dtype and device given; read it before any layer."""
        return self._model_input("attention_mask")

    def _model_input(self, name: str) -> torch.Tensor:
        require_running(self, name)
        given = self.inputs[1]
        if name not in given:
            raise KeyError(f"The model was not given {name}; it was given {', '.join(given) or 'nothing by name'}.")
        return given[name]

    # -- interventions on the running forward pass -----------------------------------------------------------------

    def skip_layer(self, layer: int, skip_with: torch.Tensor | None = None, steps: Any = None) -> None:
        """Skip one layer; see `skip_layers`."""
        self.skip_layers(layer, layer, skip_with, steps=steps)

    def skip_layers(
        self,
        start_layer: int,
        end_layer: int,
        skip_with: torch.Tensor | None = None,
        layer_returns_tuple: bool | None = None,
        steps: Any = None,
    ) -> None:
        """Leave out layers `start_layer` to `end_layer`, both included."""
        self.edits.skip_layers(self, start_layer, end_layer, skip_with, self.readout.returns, steps)

    def each_step(self, edit: Callable[[int], None], steps: Any = None) -> None:
        """Call `edit(step)` in each chosen forward pass of a generation."""
        require_running(self, "each_step()")
        self.edits.each_step(self, edit, steps)

    def steer(
        self,
        layers: Any,
        steering_vector: Any,
        factor: float = 1,
        positions: Any = None,
        token_positions: Any = None,
        batch_index: Any = None,
        steps: Any = None,
        mode: str = "add",
        keep_norm: bool = False,
        origin: Any = None,
    ) -> None:
        """Steer the residual stream leaving each of `layers`."""
        if positions is not None:
            if token_positions is not None:
                raise ValueError("Cannot specify both `positions` (deprecated) and `token_positions`; give the latter.")
            token_positions = positions
        places = (token_positions, batch_index, steps)
        self.edits.steer(self, layers, steering_vector, factor, *places, mode, keep_norm, origin)

    # -- the vocabulary --------------------------------------------------------------------------------------------

    def project_on_vocab(
        self, hidden_state: torch.Tensor, tokens: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[..., vocab]` (or `[..., tokens]`) of hidden states: what the model does after its last layer."""
        logits = project_on_vocab(self, self.readout, hidden_state)
        return logits if tokens is None else logits[..., torch.as_tensor(tokens)]

    def get_topk_closest_tokens(
        self, hidden_state: torch.Tensor, k: int = 5
    ) -> dict[str, float] | list[dict[str, float]]:
        """The `k` most probable tokens of hidden states."""
        if hidden_state.dim() not in (1, 2):
            raise ShapeError(f"hidden_state has shape {list(hidden_state.shape)}; give [hidden] or [batch, hidden].")
        with torch.no_grad():
            every = self.project_on_vocab(hidden_state).float().softmax(-1)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= every.shape[-1]:
            raise ValueError(f"k is an integer from 1 to {every.shape[-1]}, not {k!r:.80}.")
        probs, tokens = every.topk(k, dim=-1)
        if hidden_state.dim() == 1:
            return self.probs_to_dict(tokens, probs)
        return [self.probs_to_dict(t, p) for t, p in zip(tokens, probs, strict=True)]

    def probs_to_dict(self, tokens: torch.Tensor, probs: torch.Tensor) -> dict[str, float]:
        """Token ids `[k]` and their probabilities `[k]` as token → probability."""
        names = self.tokenizer.convert_ids_to_tokens(tokens.tolist())
        return dict(zip(names, probs.tolist(), strict=True))


def travel_by_value() -> None:
    """Send this library's source along with remote requests, because a worker does not have it installed."""
    nnsight.register("nnterp")


def arriving() -> TracedTransformer:
    """An empty `TracedTransformer`, made on the worker and filled with the state that was sent."""
    return TracedTransformer.__new__(TracedTransformer)


def accessor(label: Label) -> property:
    """The attribute of a model by which a value is read and written in a trace."""

    def read(self: TracedTransformer) -> Any:
        return LayerAccessor(self, label) if label.per_layer else read_value(self, label)

    def write(self: TracedTransformer, tensor: torch.Tensor) -> None:
        write_value(self, label, tensor)

    if label.per_layer:  # documented where it does not travel: in `OlderModel`
        return property(read)
    return property(read, write, doc=f"{label.description} {label.shape}")


for _label in LABELS.values():
    # Requests are refused for models with other stacks, and bring their own accessors of values of few models.
    if _label.stack in ("layers", "vision") and _label.name not in SENT_WHERE_NAMED:
        setattr(TracedTransformer, _label.name, accessor(_label))
