"""All that is known of one model, in one object that is never changed: read off its structure, then proven by a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import nn

from nnterp.anatomy import Anatomy, AttnProbFunction, cross_layers
from nnterp.decoders import DecoderReadout
from nnterp.discovery import (
    Assumed,
    ContextFact,
    Findings,
    Linear,
    Probe,
    ResidualStructure,
    States,
    Vision,
    declared_chain,
    declared_lenders,
    declared_sharing,
    find_assumed,
    find_context,
    find_inside,
    find_linear,
    find_states,
    silent_weights,
    sounding,
)
from nnterp.errors import Unavailable, Unproven
from nnterp.table import Side
from nnterp.traced import Apart, Inside, Lender, Place, Readout, Sharing, StreamLayout

Proof = Literal["none", "structure", "twin", "weights"]
Padding = Literal["unproven", "exact", "inexact"]


T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What is known of one model. It never travels: a remote request takes from it what it needs.

    Certifying a model makes its facts, and the model is given them in one assignment. Until then, code that needs only
    names works, and code that needs proven numbers raises `Unproven`. Nothing in it changes but caches (`places`,
    `inside`, `states`, `linear`, `context`, `assumed`).

    Attributes:
        anatomy: Which module plays which part, as corrected by the order in which modules run.
        lenders: Layers that later ones borrow keys and values from, as the config declares them.
        readout: How hidden states become logits; its `layout` says where batch and sequence stand in the stream.
        declared_probabilities: Where the user's `RenameConfig` says that attention probabilities are.
        proof: What the facts rest on: "none" (names alone), "structure" (a forward pass on fake tensors), "twin" (a
            small random model of the same code), "weights" (this model).
        padding: Whether a row of a padded batch equals the row alone, if its rows may share one (`sharing`).
        thresholds: Lengths at which the model's code treats all rows of a batch by the longest.
        positions_from_mask: Whether a padded batch must be told its positions, counted from the mask.
        why_unproven: What errors say about facts that are not proven: why, and what to do.
        only_with_image: Indices of the layers that run only when there is an image (Mllama's cross-attention).
        vision: What a run with an image proved; None before there was one.
        repeated: Modules that run more than once in a forward pass → how often.
        stored_as_stream: (path, side) of the modules whose input or output is stored in the stream's own layout.
        edited_later: (path, side) of the modules whose input or output the model's own code edits in place later.
        residual: How each layer combines its parts; empty before it is proven.
        between: For each layer the operation whose result is `layers_mid`, or None.
        look_inside: Finds where the inside of layers is served; run once, when it is first needed.
        look_for_states: Finds where the states of mixers are served; run once, when it is first needed.
        look_for_linear: Finds the queries, keys, values and gates of linear attention; run once.
        look_for_context: Finds what the model does around its layers; run once, when it is first needed.
        look_at_a_run: Where nothing is proven, finds out whether what names alone assume holds in a run; run once.
        encoder: In an encoder-decoder model, what is known of its encoder's layers.
        cross: The same of the cross-attention in its decoder's layers, as if it were their only part.
        places: Where values were found, by (name, layer), so that each is looked up once.
    """

    anatomy: Anatomy
    lenders: list[Lender]
    readout: Readout
    declared_probabilities: AttnProbFunction | None = None
    proof: Proof = "none"
    padding: Padding = "unproven"
    thresholds: Sharing = field(default_factory=Sharing)
    positions_from_mask: bool = True
    why_unproven: str = "nothing has proven it for this model: call model.validate()"
    only_with_image: tuple[int, ...] = ()
    vision: Vision | None = None
    repeated: dict[str, int] = field(default_factory=dict)
    stored_as_stream: frozenset[tuple[str, Side]] = frozenset()
    edited_later: frozenset[tuple[str, Side]] = frozenset()
    residual: tuple[ResidualStructure, ...] = ()
    between: tuple[Inside | None, ...] = ()
    look_inside: Callable[[], Findings] | None = field(default=None, repr=False)
    look_for_states: Callable[[], States] | None = field(default=None, repr=False)
    look_for_linear: Callable[[], Linear] | None = field(default=None, repr=False)
    look_for_context: Callable[[], tuple[ContextFact, ...]] | None = field(default=None, repr=False)
    look_at_a_run: Callable[[], Assumed] | None = field(default=None, repr=False)
    encoder: Facts | None = None
    cross: Facts | None = None
    places: dict[tuple[str, int | tuple[int, int] | None], Place] = field(default_factory=dict, init=False, repr=False)

    @property
    def sharing(self) -> Sharing:
        """Which rows may share a padded batch; only rows of equal length where padding is not proven."""
        return self.thresholds if self.padding == "exact" else Sharing(0)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        raise TypeError(
            "Facts cannot be pickled or copied: they are known of one loaded model, and find more in it when it is "
            "needed. Pickle model.certificate, or save the HuggingFace model and load it again."
        )

    @cached_property
    def inside(self) -> Findings:
        """Where the inside of every layer is served.

        Raises:
            Unproven: Nothing has run the model yet.
        """
        return self._found(self.look_inside, "Where the inside of layers is served")

    @cached_property
    def states(self) -> States:
        """Where the states of mixers are served.

        Raises:
            Unproven: Nothing has run the model yet.
        """
        return self._found(self.look_for_states, "Where a mixer's state is served")

    @cached_property
    def linear(self) -> Linear:
        """Where the inside of linear attention is served.

        Raises:
            Unproven: Nothing has run the model yet.
        """
        return self._found(self.look_for_linear, "Where the inside of linear attention is served")

    @cached_property
    def context(self) -> tuple[ContextFact, ...]:
        """What the model does around its layers.

        Raises:
            Unproven: Nothing has run the model yet.
        """
        return self._found(self.look_for_context, "What the model does around its layers")

    @cached_property
    def assumed(self) -> Assumed:
        """What is wrong with what names alone assume; nothing once the model is proven, or while nothing ran."""
        return Assumed() if self.look_at_a_run is None else self.look_at_a_run()

    def _found(self, search: Callable[[], T] | None, what: str) -> T:
        if search is None:
            raise Unproven(self.unproven(what))
        return search()

    def searching(self, module: nn.Module, interleaver: Any) -> Facts:
        """These facts, the inside of layers and the states to be found in a module whose weights are here.

        Args:
            module: The HuggingFace module.
            interleaver: nnsight's interleaver of the model: a trace that is running does not see the search.
        """

        def inside() -> Findings:
            with Apart(interleaver), sounding(module, silent_weights(module)):
                return find_inside(Probe(module, self.anatomy, self.repeated))

        def states() -> States:
            with Apart(interleaver), sounding(module, silent_weights(module)):
                return find_states(Probe(module, self.anatomy, self.repeated))

        def linear() -> Linear:
            with Apart(interleaver), sounding(module, silent_weights(module)):
                return find_linear(Probe(module, self.anatomy, self.repeated))

        def context() -> tuple[ContextFact, ...]:
            with Apart(interleaver):
                return find_context(Probe(module, self.anatomy, self.repeated), self.residual, self.readout)

        def assumed() -> Assumed:
            with Apart(interleaver), sounding(module, silent_weights(module)):
                return find_assumed(Probe(module, self.anatomy))

        look, look_for_states = functools.cache(inside), functools.cache(states)
        encoder, cross = self.encoder, self.cross
        if encoder is not None:
            encoder = dataclasses.replace(encoder, look_inside=lambda: look().encoder or Findings(), proof=self.proof)
        if cross is not None:
            cross = dataclasses.replace(cross, look_inside=lambda: look().cross or Findings(), proof=self.proof)
        return dataclasses.replace(
            self,
            look_inside=look,
            look_for_states=look_for_states,
            look_for_linear=functools.cache(linear),
            look_for_context=functools.cache(context),
            look_at_a_run=functools.cache(assumed) if self.proof == "none" else None,
            encoder=encoder,
            cross=cross,
        )

    def of_stack(self, stack: str) -> Facts:
        """What is known of the layers that a value belongs to, see `nnterp.table.Label.stack`.

        Raises:
            Unavailable: The model has no encoder.
        """
        own = {"layers": self, "encoder": self.encoder, "cross": self.cross}[stack]
        if own is None:
            raise Unavailable(f"{self.anatomy.model_class} has no encoder that its layers attend to.")
        return own

    def residual_of(self, layer: int) -> ResidualStructure:
        """How one layer combines its parts.

        Raises:
            Unproven: It is not proven.
        """
        if not self.residual:
            raise Unproven(self.unproven("What a layer adds to the residual stream"))
        return self.residual[layer]

    def unproven(self, what: str) -> str:
        """The message of an `Unproven` error."""
        return f"{self.anatomy.model_class}: {what} can only be found by running the model, and {self.why_unproven}."


def unproven_facts(module: nn.Module, anatomy: Anatomy, declared: AttnProbFunction | None = None) -> Facts:
    """What a model's structure and config say of it, before anything is run."""
    paths = tuple(layer.path for layer in anatomy.blocks)
    layout = StreamLayout(3, 0, anatomy.sizes.hidden_size or 0)
    chain = declared_chain(module.config)
    kind = Readout if anatomy.encoder is None else DecoderReadout
    readout = kind(anatomy.model_class, anatomy.ln_final, anatomy.lm_head, paths, chain, layout)
    lenders = declared_lenders(module, anatomy.num_layers)
    encoder = None if anatomy.encoder is None else Facts(anatomy.encoder, [], readout)
    across = cross_layers(anatomy)
    cross = None if not across else Facts(dataclasses.replace(anatomy, blocks=across, encoder=None), [], readout)
    shared = declared_sharing(module)
    return Facts(anatomy, lenders, readout, declared, thresholds=shared, encoder=encoder, cross=cross)
