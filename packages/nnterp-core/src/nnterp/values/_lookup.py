"""Where a value of the table is served in one model: one finder for each kind of value.

What `nnterp.discovery` found is read here. Where it found a string instead of a place, the string is the reason why the
value is unavailable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from nnterp.anatomy import Anatomy, Part
from nnterp.discovery import Contribution, ResidualStructure
from nnterp.eager import is_eager
from nnterp.errors import Unavailable, Unproven
from nnterp.facts import Facts
from nnterp.indices import integer, read_index
from nnterp.table import Value, get_value
from nnterp.traced import (
    PROMPTED,
    PROMPTED_QUERIES,
    Declared,
    Inside,
    Layout,
    Place,
    ReadOnly,
    Site,
    Sum,
    ThroughOut,
    View,
)
from nnterp.values._as_read import as_it_was_read
from nnterp.values._assumed import require_assumed
from nnterp.values._images import missing, of_images, require_images_proven
from nnterp.values._runs import in_its_run, runs_of
from nnterp.values._stacks import stack_depth
from nnterp.wording import ranges


class Known(Protocol):
    """A model whose values are looked up: its facts, its module, and the looking up itself."""

    facts: Facts
    _module: nn.Module

    def place(self, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
        """Look up where a value is served; returns the place."""
        ...


def find_place(facts: Facts, module: nn.Module, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
    """Look up once where a value is served in one model; returns the place.

    Args:
        facts: What is known of the model.
        module: Its HuggingFace module.
        name: The value.
        layer: The layer; or the layer and the number of one of its attentions, or of one pass of a looped model.

    Raises:
        ValueError: There is no such value.
        IndexError: There is no such layer.
        Unproven: Only a run of the model can find it, and there was none yet.
        Unavailable: The model, or this layer, does not have it; says why, and which layers do.
    """
    if layer is not None and type(layer) is not int:
        layer = _plain(layer, name)
    if isinstance(layer, tuple) and (runs := runs_of(facts)) is not None and get_value(name).stack == "layers":
        layer = runs.index(layer, name)
    place = facts.places.get((name, layer))
    if place is None:
        every, value = facts, get_value(name)
        if value.stack == "vision":
            require_images_proven(facts, module, value)
        require_assumed(facts, value)
        if layer is not None and value.per_layer:
            first = layer[0] if isinstance(layer, tuple) else layer
            index = read_index(first, stack_depth(facts, value), f"The layer of {name}", "layers")
            layer = (index, layer[1]) if isinstance(layer, tuple) else index
        if value.stack == "vision":
            return of_images(facts, value, layer)
        facts, value = facts.of_stack(value.stack), get_value(value.base)
        if isinstance(layer, tuple):
            place = _one_of_several(facts, module, value, *layer)
        else:
            place = FINDERS[value.finder](facts, module, value, layer or 0)
        place = _without_soft_prompt(facts, value, _as_shown(facts, place))
        place = in_its_run(facts, value, place, layer[0] if isinstance(layer, tuple) else layer)
        place = as_it_was_read(every, place)
        every.places[name, layer] = place
    return place


def _plain(layer: Any, name: str) -> int | tuple[int, int]:
    """A layer, or a layer and the number of an attention in it, as plain integers."""
    label = f"The layer of {name}"
    if isinstance(layer, tuple) and len(layer) == 2:
        return integer(layer[0], label), integer(layer[1], f"{label}: the number of the attention")
    return integer(layer, label)


def _missing(facts: Facts, layer: int, name: str, reason: str, have: tuple[int, ...] = ()) -> Unavailable:
    where = f"layers {ranges(have)} have it" if have else "no layer of this model has it"
    block = facts.anatomy.blocks[layer]
    who = f"Layer {layer} of {facts.anatomy.model_class} ({block.path}: {block.description})"
    return missing(f"{who} has no {name}: {reason}; {where}.", reason)


def _served(places: list[Any]) -> tuple[int, ...]:
    """The layers that have a place, and not a reason."""
    return tuple(i for i, place in enumerate(places) if not isinstance(place, str))


# -- inputs and outputs of parts ---------------------------------------------------------------------------------------


def site_of(value: Value, anatomy: Anatomy, layer: int | None = None) -> Site:
    """Look up the module whose input or output is a value; returns that input or output as a place.

    Raises:
        Unavailable: The model, or this layer, has no such part, or the value is no module's input or output.
    """
    if value.side is None:
        raise Unavailable(f"{value.name} is no module's input or output.")
    if not value.per_layer:
        path = getattr(anatomy, value.role)
        if path is None:
            raise Unavailable(f"{anatomy.model_class} has no {value.name}: {anatomy.absent.get(value.role, 'absent')}.")
        return Site(path, value.side)
    assert layer is not None
    if value.role == "layer":
        return Site(anatomy.blocks[layer].path, value.side)
    part = anatomy.part(value.role, layer)
    if leaves_inside(value, anatomy, layer):
        raise Unavailable(f"{value.name}[{layer}] is no module's output: it leaves inside {part.exit}.")
    return Site(part.entry if value.side == "input" else part.exit, value.side)


def leaves_inside(value: Value, anatomy: Anatomy, layer: int | None) -> bool:
    """See `Part.closing`; returns True if the part's output is an operation inside its module, not the module's."""
    if value.side != "output" or not value.per_layer or value.role == "layer":
        return False
    return anatomy.part(value.role, layer or 0).closing is not None


def _edge(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """A part's input or output."""
    if leaves_inside(value, facts.anatomy, layer):
        return _exit_inside(facts, layer, value.role)
    return site_of(value, facts.anatomy, layer)


def _exit_inside(facts: Facts, layer: int, role: str) -> Place:
    """Where the output of a part is, if its module adds the residual stream before it returns."""
    part = facts.anatomy.part(role, layer)
    if not part.leaves:
        if facts.proof in ("none", "structure"):
            raise Unproven(facts.unproven(f"Where the {role} of layer {layer} leaves its module"))
        reason = f"its module ({part.exit}) adds the stream before it returns, at no operation that could be found"
        raise _missing(facts, layer, {"self_attn": "attentions_output"}.get(role, f"{role}s_output"), reason)
    return _as_shown(facts, Inside(part.exit, part.leaves))


def _as_shown(facts: Facts, place: Place) -> Place:
    """Wrap `place` in a `View` if the model stores the stream there in another layout."""
    stored, edges = facts.readout.layout.stored, facts.stored_as_stream
    if stored is None:
        return place
    if isinstance(place, ReadOnly):
        return ReadOnly(_as_shown(facts, place.place), place.reason)
    own = (
        (isinstance(place, Site) and (place.path, place.side) in edges)
        or (isinstance(place, Sum) and any((path, "output") in edges for path, _ in place.terms))
        or (isinstance(place, Inside) and any((place.path, place.labels) == (p.exit, p.leaves) for p in _ended(facts)))
    )
    return View(place, stored) if own else place


def _without_soft_prompt(facts: Facts, value: Value, place: Place) -> Place:
    """Wrap `place` in a `View` of the tokens' positions if the model puts positions of its own in front of them."""
    extra = facts.readout.layout.extra
    if not extra or (value.is_pattern and not value.shape.startswith("[batch, heads, query")):
        return place
    if isinstance(place, ReadOnly):
        return ReadOnly(_without_soft_prompt(facts, value, place.place), place.reason)
    return View(place, Layout(PROMPTED_QUERIES if value.is_pattern else PROMPTED, extra))


def _ended(facts: Facts) -> list[Part]:
    """The parts that leave inside their modules."""
    parts = [part for layer in facts.anatomy.blocks for part in (layer.mixer, layer.self_attn)]
    return [part for part in parts if part is not None and part.leaves]


# -- the inside of attention -------------------------------------------------------------------------------------------

_EAGER_ONLY = ("attention_scores", "attention_probabilities")


def _require_eager(module: nn.Module, name: str) -> None:
    """Raise for a value that exists only where attention is computed eagerly, if it is not."""
    if name in _EAGER_ONLY and not is_eager(module):
        raise Unavailable(
            f"{name} exist only where attention is computed eagerly, and this model was loaded with "
            f"attn_implementation={module.config._attn_implementation!r}. Load it with "  # type: ignore[union-attr]
            f"StandardizedTransformer(..., enable_attention_probs=True)."
        )


def _attention(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """A value inside attention."""
    facts.anatomy.part("self_attn", layer)
    _require_eager(module, value.name)
    if value.name == "attention_probabilities" and facts.declared_probabilities is not None:
        return Declared(layer, facts.declared_probabilities)
    every = facts.inside.attention
    found = every[layer]
    if found is not None and value.name in found.places:
        return found.places[value.name]
    reason = "it was not found" if found is None else found.reasons.get(value.name, "it was not found")
    have = tuple(i for i, a in enumerate(every) if a is not None and value.name in a.places)
    raise _missing(facts, layer, value.name, reason, have)


def _head_contributions(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """Each head's output through W_O."""
    place = _attention(facts, module, value, layer)
    found = facts.inside.attention[layer]
    assert found is not None
    assert found.out is not None
    return ThroughOut(place, found.out, found.before_out)


def _one_of_several(facts: Facts, module: nn.Module, value: Value, layer: int, number: int) -> Place:
    """A value of one attention of a layer that holds several.

    Raises:
        IndexError: The layer holds fewer attentions.
        Unavailable: It holds one at most, or this one does not have the value; says why.
    """
    name, parts = value.name, facts.anatomy.blocks[layer].attentions
    if value.role != "self_attn" or name == "attention_contributions":
        raise Unavailable(f"{name}[{layer}, {number}]: {name} has one index, the layer's.")
    if not parts:
        raise Unavailable(
            f"{name}[{layer}, {number}]: a second index is for layers that hold several attentions, and those of "
            f"{facts.anatomy.model_class} hold one at most. Use {name}[{layer}]."
        )
    if not 0 <= number < len(parts):
        raise IndexError(f"{name}[{layer}, {number}]: the layer holds {len(parts)} attentions, from 0.")
    if value.side is not None:
        return Site(parts[number].entry if value.side == "input" else parts[number].exit, value.side)
    _require_eager(module, name)
    found = facts.inside.several[layer, number]
    if found is None or name not in found.places:
        reason = "it was not found" if found is None else found.reasons.get(name, "it was not found")
        raise _missing(facts, layer, f"{name} of its attention {number}", reason)
    if name == "attention_head_contributions":
        assert found.out is not None
        return ThroughOut(found.places[name], found.out, found.before_out)
    return found.places[name]


# -- neurons, routers, states ------------------------------------------------------------------------------------------


def _neurons(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """The input of the last projection of the feed-forward, or of the shared expert."""
    facts.anatomy.part("mlp", layer)
    every = facts.inside.neurons if value.name == "mlp_neurons" else facts.inside.shared_neurons
    place = every[layer]
    if isinstance(place, str):
        raise _missing(facts, layer, value.name, place, _served(every))
    return place


def _router(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """The router's logits or choices."""
    which = ("router_logits", "router_choices").index(value.name)
    every = [found[which] for found in facts.inside.routers]
    place = every[layer]
    if value.name == "router_choices" and isinstance(place, str):
        return _experts(facts, module, value, layer)
    if isinstance(place, str):
        raise _missing(facts, layer, value.name, place, _served(every))
    return place


def _experts(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """The experts that a layer's tokens are sent to, their weights and what they return."""
    every = [found[value.name] for found in facts.inside.experts]
    place = every[layer]
    if isinstance(place, str):
        raise _missing(facts, layer, value.name, place, _served(every))
    return place


def _state(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """The state that a mixer keeps for the next token."""
    facts.anatomy.part("mixer", layer)
    every, _ = facts.states
    place = every[layer]
    if isinstance(place, str):
        raise _missing(facts, layer, value.name, place, _served(every))
    return place


def _linear(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """What the recurrence of linear attention is given."""
    facts.anatomy.part("mixer", layer)
    every = [found[value.name] for found in facts.linear[0]]
    place = every[layer]
    if isinstance(place, str):
        raise _missing(facts, layer, value.name, place, _served(every))
    return place


# -- what is added to the stream ---------------------------------------------------------------------------------------


def _added(structure: ResidualStructure, role: str) -> Contribution | None:
    """What a part adds; "layer" stands for further modules of the layer."""
    return {"mlp": structure.mlp, "layer": structure.other}.get(role, structure.mixer)


def _contribution(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """What a part adds to the stream, from the residual structure that was proven."""
    role = value.role
    part = None if role == "layer" else facts.anatomy.part(role, layer)
    structure = facts.residual_of(layer)
    contribution = _added(structure, role)
    if contribution is None:
        nothing = "nothing but its mixer and its feed-forward adds to the stream"
        unknown = "it is not known what this layer adds to the stream"
        reason = structure.reason or (nothing if role == "layer" else unknown)
        have = tuple(i for i, s in enumerate(facts.residual) if _added(s, role) is not None)
        raise _missing(facts, layer, value.name, reason, have)
    terms = contribution.terms
    if part is not None and part.leaves and [term.path for term in terms] == [part.end]:
        return _exit_inside(facts, layer, role)
    if role == "self_attn" and facts.anatomy.blocks[layer].mixer != part:  # two mixers: the attention's terms are last
        terms = terms[1:]
        if not terms:
            reason = "its attention writes into its other mixer, and not into the stream"
            raise _missing(facts, layer, value.name, reason)
    found = facts.inside
    pairs = [(found.exits.get(term.path, term.path), term.scale) for term in terms]
    pairs.sort(key=lambda pair: found.ticks.get((pair[0], (), "output"), 0))
    if len(pairs) == 1 and contribution.constant is None and isinstance(pairs[0][1], float) and pairs[0][1] == 1.0:
        return Site(pairs[0][0], "output")
    return Sum(tuple(pairs), contribution.constant)


_NO_MID = {
    "parallel": "its attention and its feed-forward read the same stream (a parallel block)",
    "single": "it has one part only",
}


def _mid(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """The stream between the two parts of a layer."""
    structure = facts.residual_of(layer)
    if structure.mid is None:
        have = tuple(i for i, s in enumerate(facts.residual) if s.mid is not None)
        raise _missing(facts, layer, value.name, _NO_MID.get(structure.kind, structure.reason), have)
    found = facts.between[layer] if facts.between else None
    if found is not None:
        return found
    if structure.mid_side == "output":
        return Site(structure.mid, "output")
    return ReadOnly(
        Site(structure.mid, "input"),
        "no single operation of this layer makes the stream that both its feed-forward and its residual path read",
    )


def _features(facts: Facts, module: nn.Module, value: Value, layer: int) -> Place:
    """The features of a layer to which no dictionary is attached."""
    reason = "no dictionary is attached; attach one: nnterp.attach(model, dictionary, at='layers_output[3]')"
    raise missing(f"Layer {layer} of {facts.anatomy.model_class} has no features: {reason}.", reason)


Finder = Callable[[Facts, nn.Module, Value, int], Place]

FINDERS: dict[str, Finder] = {
    "edge": _edge,
    "attention": _attention,
    "head_contributions": _head_contributions,
    "state": _state,
    "linear": _linear,
    "contribution": _contribution,
    "mid": _mid,
    "router": _router,
    "experts": _experts,
    "neurons": _neurons,
    "features": _features,
    "vision": lambda facts, module, value, layer: of_images(facts, value, layer),
}
