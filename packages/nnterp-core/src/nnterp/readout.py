"""From a hidden state to logits: what the model itself does after its last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from nnterp.devices import device_of
from nnterp.errors import ShapeError, Unavailable
from nnterp.huggingface import text_config
from nnterp.record import Record
from nnterp.values._layouts import Layout

if TYPE_CHECKING:
    from nnterp.anatomy import Anatomy
    from nnterp.traced_transformer import TracedTransformer

# Config fields that act on the logits after the head, with what they do. Proven by the certificate, not believed.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Chain(Record):
    """`softcap(scale * lm_head(ln_final(hidden)))`, the readout of most models.

    Attributes:
        scale: Factor on the head's output (1 for most models).
        softcap: The logits are `softcap * tanh(logits / softcap)`; None for none.
    """

    def __init__(self, scale: float = 1.0, softcap: float | None = None) -> None:
        self.scale, self.softcap = scale, softcap

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """What happens to the head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def __str__(self) -> str:
        steps = ["ln_final", "lm_head"]
        if self.scale != 1.0:
            steps.append(f"× {self.scale:g}")
        if self.softcap is not None:
            steps.append(f"softcap {self.softcap:g}")
        return " → ".join(steps)


def declared_chain(config: Any) -> Chain:
    """The chain a config declares."""
    text = text_config(config)
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(text, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(text, name) or 1.0
    return Chain(scale, next((cap for name in _SOFTCAPS if (cap := _number(text, name))), None))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class StreamLayout(Record):
    """Where batch and sequence stand in the tensors that layers hand on.

    Nearly always `[batch, seq, hidden]`. Models that carry several streams have further axes: Gemma 3n stacks them in
    front (`[streams, batch, seq, hidden]`), DeepSeek-V4 behind (`[batch, seq, streams, hidden]`). XLNet keeps its
    stream as `[seq, batch, hidden]`; nnterp shows and takes it batch first, like everybody's. ProphetNet keeps a main
    stream and the streams that predict one after the other on the sequence axis; they are shown as DeepSeek-V4's are.

    Attributes:
        dims: Number of axes.
        batch: Index of the batch axis, as shown; the sequence axis follows it.
        width: Size of the last axis.
        extra: Positions in front of the tokens that the model adds by itself (CPM-Ant's soft prompt).
        sequence_first: Whether the model itself keeps the stream as `[seq, batch, hidden]`.
        streams: How many streams the model itself keeps one after the other, `[batch, streams × seq, hidden]`.
    """

    def __init__(
        self, dims: int, batch: int, width: int, extra: int = 0, sequence_first: bool = False, streams: int = 1
    ) -> None:
        self.dims, self.batch, self.width, self.extra = dims, batch, width, extra
        self.sequence_first, self.streams = sequence_first, streams

    @classmethod
    def of(cls, shape: torch.Size, batch: int, seq: int) -> StreamLayout | None:
        """The layout of a stream recorded for an input of `[batch, seq]`; None if no axes are those of the input.

        More positions than tokens are taken for streams one after the other if they are a multiple of the tokens, and
        for a soft prompt else; HuggingFace's own hidden states and the readout then prove or refute that.
        """
        for axis in range(len(shape) - 2):
            if tuple(shape[axis : axis + 2]) == (batch, seq):
                return cls(len(shape), axis, shape[-1])
        if len(shape) == 3 and tuple(shape[:2]) == (seq, batch):
            return cls(3, 0, shape[-1], sequence_first=True)
        if len(shape) != 3 or shape[0] != batch or shape[1] < seq:
            return None
        if shape[1] % seq == 0:
            return cls(4, 0, shape[-1], streams=shape[1] // seq)
        return cls(3, 0, shape[-1], extra=shape[1] - seq)

    @property
    def plain(self) -> bool:
        """Whether it is shown as `[batch, seq, hidden]`."""
        return self.dims == 3 and self.batch == 0

    @property
    def kept(self) -> Layout | None:
        """How the model keeps the stream, where it is not as shown."""
        if self.sequence_first:
            return Layout("[seq, batch, hidden]")
        return Layout("[batch, streams × seq, hidden]", self.streams) if self.streams > 1 else None

    def shown(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream as it is shown, from how the model keeps it; a view."""
        return stream if self.kept is None else self.kept.show(stream)

    def native(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream as the model keeps it, from what is shown."""
        return stream if self.kept is None else self.kept.back(stream, stream)

    def is_kept(self, shape: torch.Size, batch: int, seq: int) -> bool:
        """Whether a tensor of this shape, recorded for an input of `[batch, seq]`, is kept as the stream is."""
        if self.sequence_first:
            return tuple(shape[:2]) == (seq, batch)
        return self.streams > 1 and len(shape) == 3 and tuple(shape[:2]) == (batch, self.streams * seq)


class Readout:
    """How one model's hidden states become logits; which way holds is decided by the certificate.

    Attributes:
        way: "chain": see `Chain`, three or four module calls. "replay": the model's own forward with every layer
            replaced by one that returns the hidden state; exact for any model whose code after the last layer depends
            on the hidden state alone, whatever that code is. None: neither could be proven; projecting is refused.
        reason: For None, why.
        layout: Where batch and sequence stand in hidden states.
        returns: For each layer, where what it returns beside the stream comes from when it is skipped: for every
            further entry the argument (index or name) that is handed through, or None; None for a layer that returns
            one tensor.
    """

    def __init__(self, anatomy: Anatomy, chain: Chain) -> None:
        self.chain = chain
        self.way: Literal["chain", "replay"] | None = "chain"
        self.reason = ""
        self.layout = StreamLayout(3, 0, anatomy.sizes.hidden_size or 0)
        self.returns: tuple[tuple[int | str | None, ...] | None, ...] = (None,) * anatomy.num_layers
        self.adopt(anatomy)

    def adopt(self, anatomy: Anatomy) -> None:
        """Take over the paths of an anatomy."""
        self.model_class = anatomy.model_class
        self.ln_final, self.lm_head = anatomy.ln_final, anatomy.lm_head
        self.layer_paths = tuple(block.path for block in anatomy.blocks)

    def __str__(self) -> str:
        chain = str(self.chain) if self.ln_final is not None else str(self.chain).removeprefix("ln_final → ")
        return {"chain": chain, "replay": "the model's own code after its last layer", None: self.reason}[self.way]

    def project(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states at the output of the last layer: `[..., hidden]` → `[..., vocab]`, the model's dtype.

        Raises:
            Unavailable: No way of doing so has been proven for this model.
        """
        if self.way == "chain":
            return self.by_chain(module, hidden)
        if self.way == "replay":
            return self.by_replay(module, hidden)
        raise Unavailable(f"{self.model_class}: hidden states cannot be projected on the vocabulary: {self.reason}.")

    def by_chain(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """See `Chain`."""
        if self.ln_final is not None:
            hidden = module.get_submodule(self.ln_final)(hidden)
        assert self.lm_head is not None
        return self.chain.finish(module.get_submodule(self.lm_head)(hidden))

    def by_replay(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The model's forward on the hidden state, its layers standing aside."""
        shape, layout = hidden.shape, self.layout
        if layout.plain:
            hidden = hidden.reshape(-1, *shape[-2:]) if hidden.dim() > 1 else hidden.reshape(1, 1, -1)
        elif hidden.dim() != layout.dims:
            raise ShapeError(
                f"{self.model_class} carries several streams, so its hidden states have {layout.dims} axes, as "
                f"in layers_output; one of shape {list(shape)} cannot be read out."
            )
        rows, seq = hidden.shape[layout.batch : layout.batch + 2]
        embedding = module.get_input_embeddings().weight
        ids = torch.zeros((rows, seq), dtype=torch.long, device=embedding.device)
        with _LayersAside(module, self, layout.native(hidden)):
            logits = module(input_ids=ids, use_cache=False).logits
        return logits.reshape(*shape[:-1], logits.shape[-1]) if layout.plain else logits


class _LayersAside:
    """While it is open, every layer returns a hidden state instead of running."""

    def __init__(self, module: nn.Module, readout: Readout, hidden: torch.Tensor) -> None:
        self.blocks = [module.get_submodule(path) for path in readout.layer_paths]
        self.kept = [block.__dict__.get("forward") for block in self.blocks]
        self.returns, self.hidden = readout.returns, hidden

    def __enter__(self) -> None:
        for block, rest in zip(self.blocks, self.returns, strict=True):
            block.__dict__["forward"] = lambda *args, _rest=rest, **kwargs: skipped_output(
                self.hidden, _rest, args, kwargs
            )

    def __exit__(self, *_: Any) -> None:
        for block, forward in zip(self.blocks, self.kept, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def skipped_output(
    stream: torch.Tensor, rest: tuple[int | str | None, ...] | None, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """What a layer returns when it is skipped: the stream, and whatever else it would have handed on, as it came in."""
    if rest is None:
        return stream
    through = (args[key] if isinstance(key, int) else kwargs.get(key) if key is not None else None for key in rest)
    return (stream, *through)


def project_on_vocab(model: TracedTransformer, hidden: torch.Tensor) -> torch.Tensor:
    """`model.project_on_vocab`: inside a trace or outside of one.

    Inside, the modules run apart from the traced forward pass: nothing of it is counted or served.
    """
    interleaver = model.interleaver
    if not interleaver.interleaving:
        model.dispatch()
        return model.readout.project(model._module, hidden.to(_device(model._module, model.readout)))
    interleaver.interleaving = False
    try:
        return model.readout.project(model._module, hidden)
    finally:
        interleaver.interleaving = True


def _device(module: nn.Module, readout: Readout) -> torch.device:
    """Where the readout begins: with the final norm, or the head."""
    paths = (readout.ln_final, readout.lm_head)
    return device_of(module, [module.get_submodule(path) for path in paths if path is not None])
