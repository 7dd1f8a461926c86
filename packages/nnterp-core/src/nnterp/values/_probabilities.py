"""The accessor of attention probabilities: like the others, and able to show and to prove where they are read."""

from __future__ import annotations

import torch

from nnterp.errors import RenamingError, Unavailable
from nnterp.values._accessors import LayerAccessor
from nnterp.values._eager import is_eager
from nnterp.values._places import Declared
from nnterp.values._serve import findings


class AttentionProbabilitiesAccessor(LayerAccessor):
    """`model.attention_probabilities[i]`: `[batch, heads, query, key]`, readable and writable inside a trace.

    Rows are distributions over the keys; where the model has attention sinks they sum to less than one. Needs
    `enable_attention_probs=True`.
    """

    @property
    def enabled(self) -> bool:
        """Whether the model computes attention in the way that has probabilities."""
        return is_eager(self._model._module)

    def print_source(self, layer: int = 0, allow_dispatch: bool = True) -> None:
        """Print where the probabilities of one layer are read: the place, and the source around it.

        Args:
            layer: The layer.
            allow_dispatch: Load the weights if they are not there (a 1.x argument).

        Raises:
            Unavailable: The layer has none, or the model was not loaded with `enable_attention_probs=True`.
        """
        from nnterp.values._explain import source_of

        if allow_dispatch and not self._model.remote:
            self._model.dispatch()
        place = self._model.place(self._value.name, layer % len(self))
        print(f"Attention probabilities of layer {layer} are read at\n  {place}")
        print(source_of(self._model, place))

    def check_source(self, layer: int | None = None, allow_dispatch: bool = True, use_trace: bool = True) -> None:
        """Prove the probabilities of one layer, or of every layer that has them.

        Their shape is `[batch, heads, query, key]`; their rows sum to one (below one only where the model has attention
        sinks, which take the rest); no position attends to a later one, unless the model does so everywhere; written as
        zeros they leave nothing of the heads' outputs; and writing them changes the logits.

        Args:
            layer: The layer; all if None.
            allow_dispatch: Load the weights if they are not there.
            use_trace: Run the model. Without, only that a place was found is checked.

        Raises:
            RenamingError: One of these does not hold; says which.
        """
        from nnterp.values._check import check_probabilities

        model = self._model
        model.require_no_trace("attention_probabilities.check_source()")
        if allow_dispatch and not model.remote:
            model.dispatch()
        have = [i for i in model.attention_layers if layer is None or i == layer % len(self)]
        if not have:
            raise Unavailable(f"Layer {layer} of {model.anatomy.model_class} has no attention.")
        for i in have:
            place = model.place(self._value.name, i)
            inside = findings(model).attention[i]
            heads = model.num_heads if isinstance(place, Declared) or inside is None else inside.heads
            if use_trace and model.dispatched:
                problem = check_probabilities(model, i, heads)
                if problem:
                    raise RenamingError(
                        f"The attention probabilities of layer {i} of {model.anatomy.model_class} are not proven: "
                        f"{problem}."
                    )


def row_sums(probs: torch.Tensor) -> torch.Tensor:
    """How much of each row goes to keys; the rest goes to a sink."""
    return probs.double().sum(-1)
