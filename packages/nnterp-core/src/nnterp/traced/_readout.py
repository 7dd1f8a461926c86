"""From a hidden state to logits: what the model itself does after its last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from nnterp.devices import device_of
from nnterp.errors import ShapeError, Unavailable
from nnterp.record import Record
from nnterp.traced._apart import Apart
from nnterp.traced._layouts import StreamLayout
from nnterp.traced._skipping import skipped_output

if TYPE_CHECKING:
    from nnterp.traced._running import Running

Way = Literal["unproven", "chain", "replay", "none"]


class Chain(Record):
    """`softcap(scale * lm_head(ln_final(hidden)))`, the readout of most models.

    Attributes:
        scale: Factor on the head's output (1 for most models).
        softcap: The logits are `softcap * tanh(logits / softcap)`; None for none.
    """

    def __init__(self, scale: float = 1.0, softcap: float | None = None) -> None:
        self.scale, self.softcap = scale, softcap

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, from what the head returns."""
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


class Readout(Record):
    """How one model's hidden states become logits. The certificate decides which way holds.

    Attributes:
        model_class, ln_final, lm_head, layer_paths: Class of the model; paths of the final norm, head and layers.
        chain: Scale and softcap of the logits, as the config declares them.
        layout: Where batch and sequence stand in hidden states.
        way: "chain": see `Chain`. "replay": the model's own forward, every layer replaced by one that returns the
            hidden state; exact if what follows the last layer depends on it alone. "none": neither gives the logits.
            "unproven": nothing was tried; the chain is used.
        reason: For "none", why.
        returns: For each layer, where what it returns beside the stream comes from when it is skipped: for each entry
            the argument (index or name) that is passed through, or None; None for a layer that returns one tensor.
            Empty while unproven.
    """

    def __init__(
        self,
        model_class: str,
        ln_final: str | None,
        lm_head: str | None,
        layer_paths: tuple[str, ...],
        chain: Chain,
        layout: StreamLayout,
        way: Way = "unproven",
        reason: str = "",
        returns: tuple[tuple[int | str | None, ...] | None, ...] = (),
    ) -> None:
        self.model_class, self.ln_final, self.lm_head, self.layer_paths = model_class, ln_final, lm_head, layer_paths
        self.chain, self.layout, self.way, self.reason, self.returns = chain, layout, way, reason, returns

    def __str__(self) -> str:
        chain = str(self.chain) if self.ln_final is not None else str(self.chain).removeprefix("ln_final → ")
        return {
            "unproven": f"{chain} (unproven)",
            "chain": chain,
            "replay": "the model's own code after its last layer",
            "none": self.reason,
        }[self.way]

    @property
    def proven(self) -> bool:
        """Whether it is proven that hidden states can be projected on the vocabulary, and how."""
        return self.way in ("chain", "replay")

    def project(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states at the output of the last layer: `[..., hidden]` → `[..., vocab]`, the model's dtype.

        Raises:
            Unavailable: Neither way gives this model's logits.
        """
        if self.way == "none":
            raise Unavailable(
                f"{self.model_class}: hidden states cannot be projected on the vocabulary: {self.reason}."
            )
        if self.way == "replay":
            return self.by_replay(module, hidden)
        return self.by_chain(module, hidden)

    def by_chain(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """See `Chain`; raises Unavailable without a head."""
        if self.ln_final is not None:
            hidden = module.get_submodule(self.ln_final)(hidden)
        if self.lm_head is None:
            raise Unavailable(f"{self.model_class} has no head that hidden states could be given to.")
        return self.chain.finish(module.get_submodule(self.lm_head)(hidden))

    def by_replay(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The model's forward on the hidden state, every layer replaced by one that returns it (or ShapeError)."""
        shape, layout = hidden.shape, self.layout
        if layout.plain:
            hidden = hidden.reshape(-1, *shape[-2:]) if hidden.dim() > 1 else hidden.reshape(1, 1, -1)
        elif hidden.dim() != layout.dims:
            raise ShapeError(
                f"{self.model_class} carries several streams, so its hidden states have {layout.dims} axes, as "
                f"in layers_output; one of shape {list(shape)} cannot be read out."
            )
        rows, seq = hidden.shape[layout.batch : layout.batch + 2]
        embedding = module.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.zeros((rows, seq), dtype=torch.long, device=embedding.device)
        with _LayersReplaced(module, self, layout.native(hidden)):
            logits = module(input_ids=ids, use_cache=False).logits
        return logits.reshape(*shape[:-1], logits.shape[-1]) if layout.plain else logits


class _LayersReplaced:
    """While the block is open, every layer returns a hidden state instead of running."""

    def __init__(self, module: nn.Module, readout: Readout, hidden: torch.Tensor) -> None:
        self.blocks = [module.get_submodule(path) for path in dict.fromkeys(readout.layer_paths)]
        self.kept = [block.__dict__.get("forward") for block in self.blocks]
        rests = readout.returns or (None,) * len(readout.layer_paths)
        self.returns = list(dict(zip(readout.layer_paths, rests, strict=True)).values())
        self.hidden = hidden

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


def project_on_vocab(model: Running, readout: Readout, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states in a model that may be running a trace; the trace does not see the modules run."""
    width = readout.layout.width
    if width and hidden.shape[-1] != width:
        raise ShapeError(
            f"hidden_state has shape {list(hidden.shape)}; its last axis must be the stream's width, {width}."
        )
    module = model._module
    if not model.interleaver.interleaving:
        paths = [path for path in (readout.ln_final, readout.lm_head) if path is not None]
        hidden = hidden.to(device_of(module, [module.get_submodule(path) for path in paths]))
    with Apart(model.interleaver):
        return readout.project(module, hidden)
