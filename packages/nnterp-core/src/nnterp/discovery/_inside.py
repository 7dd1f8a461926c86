"""Run a model on a short prompt and find where the values inside each of its layers are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nnterp.anatomy import Layer, cross_layers
from nnterp.discovery._experts import ExpertsFinder
from nnterp.discovery._linears import arguments_of, ending, linears
from nnterp.discovery._neurons import find_neurons, find_shared_neurons
from nnterp.discovery._probe import Probe
from nnterp.discovery._quantised import not_additive
from nnterp.discovery._quiet import quiet
from nnterp.discovery._recording import Labels, Recording, SourceText
from nnterp.discovery._routers import Routers, router_path
from nnterp.discovery.attention import Attention, MovingHeads, find_attention, with_code
from nnterp.eager import eagerly, is_eager
from nnterp.traced import Place

HEADS_THROUGH = "attention_head_contributions"


@dataclass
class Findings:
    """Where the inside of every layer is served.

    Attributes:
        attention: Per layer, None where there is none.
        several: (layer, number) → one attention of a layer that holds several.
        neurons: Per layer, where the neurons of its feed-forward are served, or the reason why they are not.
        shared_neurons: The same for the expert that runs on all tokens.
        routers: Per layer, (router logits, chosen experts): places, or reasons.
        experts: Per layer, name of a value of its experts → its place, or the reason why it has none.
        exits: Path of a module inside a part whose output is also the part's output → the part's own exit.
        ticks: (path, labels, "input" or "output") → when the forward pass first reached it.
        turns: In a looped model, (path, labels) → when it began and ended each time, if it ran more than once.
        texts: (path, labels) of an instrumented function → its source.
        encoder, cross: The same of an encoder's layers, and of the cross-attention in a decoder's.
    """

    attention: list[Attention | None] = field(default_factory=list)
    several: dict[tuple[int, int], Attention | None] = field(default_factory=dict)
    neurons: list[Place | str] = field(default_factory=list)
    shared_neurons: list[Place | str] = field(default_factory=list)
    routers: list[tuple[Place | str, Place | str]] = field(default_factory=list)
    experts: list[dict[str, Place | str]] = field(default_factory=list)
    exits: dict[str, str] = field(default_factory=dict)
    ticks: dict[tuple[str, Labels, str], int] = field(default_factory=dict)
    turns: dict[tuple[str, Labels], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    texts: dict[tuple[str, Labels], SourceText] = field(default_factory=dict)
    encoder: Findings | None = None
    cross: Findings | None = None


def find_inside(probe: Probe) -> Findings:
    """Find where the values inside every layer are served.

    Runs the plain module on the probe, and a second time with eager attention if the model computes attention in
    another way. Layers whose heads are not proven by these runs take two more, which layers of the same code share.
    """
    with quiet(probe.module):
        return _Look(probe).findings()


class _Look:
    """The findings of two recordings: one as the model computes attention, one with eager attention.

    Attributes:
        current: The recording in which attention was computed as the model does it.
        eager: The recording with eager attention; None if that does not run.
        whole: `eager`, or `current` in its place.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe, self.root = probe, probe.module
        self.layers = probe.anatomy.blocks
        self.one_of_several = {
            (layer.index, i): dataclasses.replace(layer, self_attn=part, mixer=part)
            for layer in self.layers
            for i, part in enumerate(layer.attentions)
        }
        encoder = probe.anatomy.encoder
        self.encoder = () if encoder is None else encoder.blocks
        self.cross = cross_layers(probe.anatomy)
        self.current, self.eager = self.recordings()
        self.whole = self.eager or self.current

    def recordings(self) -> tuple[Recording, Recording | None]:
        every = (*self.layers, *self.one_of_several.values(), *self.encoder, *self.cross)
        attentions = [layer.self_attn for layer in every if layer.self_attn is not None]
        inside = [path for part in attentions for path in with_code(self.root, part)]
        routers = [path for layer in self.layers if (path := router_path(self.root, layer)) is not None]
        layers = [layer.path for layer in (*self.layers, *self.encoder)]
        operations = list(dict.fromkeys([*layers, *inside, *routers]))
        modules = [path for path, _ in self.root.named_modules(remove_duplicate=False) if path]
        current = self.probe.record(modules=modules, operations=operations)
        if is_eager(self.root) or not inside:
            return current, current
        try:
            with eagerly(self.root):
                return current, self.probe.record(modules=modules, operations=operations)
        except Exception:  # a model whose eager attention does not run has no probabilities to serve
            return current, None

    def findings(self) -> Findings:
        found = self.of(self.layers, self.one_of_several)
        if self.cross:
            found.encoder, found.cross = self.of(self.encoder, {}), self.of(self.cross, {})
        return found

    def of(self, layers: tuple[Layer, ...], one_of_several: dict[tuple[int, int], Layer]) -> Findings:
        """What is found in some layers."""
        found = Findings(ticks=self.whole.ticks(), texts={**self.current.texts, **self.whole.texts})
        found.turns = self.whole.turns() if self.probe.anatomy.runs else {}
        routers = Routers(self.probe, self.current)
        experts = ExpertsFinder(self.probe, self.current)
        tolerance = self.probe.tolerance
        for layer in layers:
            recording = self.current.of(layer)
            found.attention.append(self.attention(layer))
            found.neurons.append(find_neurons(self.root, layer, recording, tolerance))
            found.shared_neurons.append(find_shared_neurons(self.root, layer, recording, tolerance))
            found.routers.append(routers.of(layer))
            found.experts.append(experts.of(layer))
            found.exits.update(self.same_as_exit(layer))
        found.several = {at: self.attention(layer) for at, layer in one_of_several.items()}
        if self.eager is not None:
            moving = MovingHeads(self.probe, self.current)
            pairs = [
                *zip(layers, found.attention, strict=True),
                *((one_of_several[at], one) for at, one in found.several.items()),
            ]
            for layer, attention in pairs:
                if attention is not None:
                    moving.prove(layer, attention)
        for attention in (*found.attention, *found.several.values()):
            out = None if attention is None else attention.out
            if attention is not None and out is not None and (reason := not_additive(self.root, out)):
                attention.places.pop(HEADS_THROUGH, None)
                attention.reasons[HEADS_THROUGH] = reason
        return found

    def attention(self, layer: Layer) -> Attention | None:
        part = layer.self_attn
        if part is None:
            return None
        current = self.current.of(layer)
        result = current.made(part.exit)
        out = None
        if result is not None:
            candidates = linears(self.root, part, current)
            out = ending(candidates, result, arguments_of(part, current), self.probe.tolerance)
        return find_attention(
            with_code(self.root, part),
            current,
            self.whole.of(layer),
            None if out is None else (out.path, out.given),
            self.probe.anatomy.sizes.num_heads,
            self.probe.tolerance,
        )

    def same_as_exit(self, layer: Layer) -> Iterator[tuple[str, str]]:
        """(path, the part's exit) of each module inside a part whose output is also the part's output."""
        current = self.current.of(layer)
        for part in (layer.self_attn, layer.mixer, layer.mlp):
            if part is None or (result := current.made(part.exit)) is None:
                continue
            for path in current.calls:
                made = current.made(path) if path.startswith(f"{part.exit}.") else None
                if made is not None and made.shape == result.shape and torch.equal(made, result):
                    yield path, part.exit
