"""Attention probabilities: show where they are read, and prove that attention weighs the values with them."""

from __future__ import annotations

import torch

from nnterp.defaults import plain_defaults
from nnterp.discovery import probe_ids, silent_weights, sounding
from nnterp.eager import is_eager
from nnterp.errors import RenamingError, Unavailable
from nnterp.indices import read_index
from nnterp.named_transformer import NamedTransformer
from nnterp.older import OlderLayerAccessor
from nnterp.table import get_label
from nnterp.traced import Declared
from nnterp.values import source_of

ROWS, LENGTH = 2, 10


class AttentionProbabilitiesAccessor(OlderLayerAccessor):
    """`model.attention_probabilities[i]`: `[batch, heads, query, key]`, readable and writable inside a trace.

    Rows are distributions over the keys; where the model has attention sinks they sum to less than one. Needs
    `enable_attention_probs=True`.
    """

    _model: NamedTransformer

    def __init__(self, model: NamedTransformer) -> None:
        OlderLayerAccessor.__init__(self, model, get_label("attention_probabilities"))

    @property
    def enabled(self) -> bool:
        """Whether the model computes attention in the way that has probabilities, and `disable()` was not called."""
        return is_eager(self._model._module) and not self._disabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._model.__dict__["_probabilities_disabled"] = not enabled

    def disable(self) -> None:
        """Refuse to read or write them from now on, until `enabled` is set to True."""
        self.enabled = False

    @property
    def _disabled(self) -> bool:
        # Kept on the model, because this accessor is made anew whenever it is asked for.
        return self._model.__dict__.get("_probabilities_disabled", False)

    def _require_enabled(self) -> None:
        if self._disabled:
            raise Unavailable(
                "Attention probabilities were disabled with attention_probabilities.disable(). "
                "Set attention_probabilities.enabled = True to read and write them again."
            )

    def __getitem__(self, layer: int | tuple[int, int] | str) -> torch.Tensor:
        self._require_enabled()
        return OlderLayerAccessor.__getitem__(self, layer)

    def __setitem__(self, layer: int | tuple[int, int] | str, tensor: torch.Tensor) -> None:
        self._require_enabled()
        OlderLayerAccessor.__setitem__(self, layer, tensor)

    def print_source(self, layer: int = 0, allow_dispatch: bool = True) -> None:
        """Print where the probabilities of one layer are read: the place, and the source around it.

        Args:
            layer: The layer.
            allow_dispatch: Load the weights if they are not there (a 1.x argument).

        Raises:
            Unavailable: The layer has none, or the model was not loaded with `enable_attention_probs=True`.
        """
        self._model.prepare(remote=not allow_dispatch)
        place = self._model.place(self._value.name, read_index(layer, len(self), "layer", "layers"))
        print(f"Attention probabilities of layer {layer} are read at\n  {place}")
        print(source_of(self._model, place))

    @plain_defaults()
    def check_source(self, layer: int | None = None, allow_dispatch: bool = True, use_trace: bool = True) -> None:
        """Prove the probabilities of one layer, or of every layer that has them.

        Their shape is `[batch, heads, query, key]`; their rows sum to one (below one only where the model has attention
        sinks, which take the rest); written as zeros they leave nothing of the heads' outputs; and writing them changes
        the logits.

        Args:
            layer: The layer; all if None.
            allow_dispatch: Load the weights if they are not there.
            use_trace: Run the model. Without, only that a place was found is checked.

        Raises:
            RenamingError: One of these does not hold; says which.
            Unavailable: The layer has no attention.
        """
        model = self._model
        model.require_no_trace("attention_probabilities.check_source()")
        model.prepare(remote=not allow_dispatch)
        index = None if layer is None else read_index(layer, len(self), "layer", "layers")
        have = [i for i in model.attention_layers if index in (None, i)]
        if not have:
            raise Unavailable(f"Layer {layer} of {model.model_class} has no attention.")
        silent = silent_weights(model._module)
        for i in have:
            place = model.place(self._value.name, i)
            found = None if isinstance(place, Declared) else model.facts.inside.attention[i]
            heads = model.num_heads if found is None else found.heads
            with sounding(model._module, silent if use_trace else []):
                problem = problem_of_probabilities(model, i, heads) if use_trace and model.dispatched else None
            if problem:
                raise RenamingError(
                    f"The attention probabilities of layer {i} of {model.model_class} are not proven: {problem}."
                )


def problem_of_probabilities(model: NamedTransformer, layer: int, heads: int | None) -> str | None:
    """What is wrong with the attention probabilities of one layer; None if nothing is."""
    ids = probe_ids(model._module, model.vocab_size, ROWS, LENGTH, seed=7)
    with torch.no_grad(), model.trace(ids):
        probs = model.attention_probabilities[layer].clone().save()
        clean = model.logits.save()
    problem = _problem_of_rows(probs, heads)
    if problem is not None:
        return problem
    changed, head_outputs = _with_zeros(model, ids, layer, torch.zeros_like(probs))
    if head_outputs is not None and head_outputs.abs().max() > 1e-5:
        return "zeros written to them leave something of the heads' outputs, so the values are not weighted with them"
    return "writing them does not change the logits" if torch.equal(changed, clean) else None


def _problem_of_rows(probs: torch.Tensor, heads: int | None) -> str | None:
    """What is wrong with the shape of probabilities, or with their rows."""
    queries = probs.shape[-2] if probs.dim() == 4 else 0
    wrong_heads = heads is not None and probs.dim() == 4 and probs.shape[1] != heads
    if probs.dim() != 4 or probs.shape[0] != ROWS or wrong_heads or queries < LENGTH:
        return f"their shape is {list(probs.shape)}, not [{ROWS}, {heads}, {LENGTH}, keys]"
    sums = probs.double().sum(-1)
    if not bool(torch.isfinite(probs).all()) or bool((sums > 1 + 1e-2).any()) or bool((probs < 0).any()):
        return f"rows sum to up to {sums.max().item():.3f}"
    return None


def _with_zeros(
    model: NamedTransformer, ids: torch.Tensor, layer: int, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits with the probabilities at zero, and the heads' outputs, where the model serves them."""
    try:
        model.place("attention_head_outputs", layer)
    except Unavailable:
        with torch.no_grad(), model.trace(ids):
            model.attention_probabilities[layer] = zeros
            logits = model.logits.save()
        return logits, None
    with torch.no_grad(), model.trace(ids):
        model.attention_probabilities[layer] = zeros
        head_outputs = model.attention_head_outputs[layer].save()
        logits = model.logits.save()
    return logits, head_outputs
