"""Where rows that are no edge of a part are served: from the probe's findings and the proven residual structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import unset_fake_temporarily

from nnterp.anatomy import Part
from nnterp.errors import Unavailable
from nnterp.values._eager import is_eager
from nnterp.values._places import Declared, Inside, Place, ReadOnly, Side, Site, Sum, ThroughOut, View
from nnterp.wording import ranges

if TYPE_CHECKING:
    from nnterp.certificate import Contribution, ResidualStructure
    from nnterp.standardized_transformer import StandardizedTransformer
    from nnterp.values._probe import Findings

Serve = Callable[["StandardizedTransformer", int], Place]

_EAGER_ONLY = ("attention_scores", "attention_probabilities")


def findings(model: StandardizedTransformer) -> Findings:
    """What the probe found in a model, or, without its weights, in its narrow twin; run when it is first needed.

    Raises:
        Unavailable: The weights are not loaded, and there is no twin.
    """
    from nnterp.values._probe import find_inside

    return looked_up(model, "_findings", find_inside)


def looked_up(model: StandardizedTransformer, name: str, find: Callable[[StandardizedTransformer], Any]) -> Any:
    """What `find` finds in a model, or, without its weights, in its narrow twin; kept under `name`.

    Raises:
        Unavailable: The weights are not loaded, and there is no twin.
    """
    kept, here = model.__dict__.get(name), model.dispatched
    if kept is None or kept[0] != here:
        if here:
            found = find(model)
        else:
            with unset_fake_temporarily():  # also inside a scan, which runs on fake tensors
                if isinstance(twin := model.twin, str):
                    raise Unavailable(f"The inside of {model.model_class}'s layers is told by its numbers, and {twin}.")
                found = looked_up(twin, name, find)
        kept = (here, found)
        object.__setattr__(model, name, kept)
    return kept[1]


def attention(name: str) -> Serve:
    """A value inside attention."""

    def serve(model: StandardizedTransformer, layer: int) -> Place:
        model.anatomy.part("self_attn", layer)
        require_eager(model, name)
        config = model.rename_config
        if name == "attention_probabilities" and config is not None and config.attn_prob_source is not None:
            return Declared(layer, config.attn_prob_source)
        found = findings(model).attention
        inside = found[layer]
        assert inside is not None
        if name in inside.places:
            return inside.places[name]
        have = tuple(i for i, a in enumerate(found) if a is not None and name in a.places)
        raise _missing(model, layer, name, inside.reasons.get(name, "it was not found"), have)

    return serve


def require_eager(model: StandardizedTransformer, name: str) -> None:
    """Raise for a value that there is only where attention is computed eagerly, if it is not."""
    if name in _EAGER_ONLY and not is_eager(model._module):
        raise Unavailable(
            f"{name} exist only where attention is computed eagerly, and this model was loaded with "
            f"attn_implementation={model._module.config._attn_implementation!r}. Load it with "
            f"StandardizedTransformer(..., enable_attention_probs=True)."
        )


def one_of_several(model: StandardizedTransformer, name: str, side: Side | None, layer: int, number: int) -> Place:
    """A value of one attention of a layer that holds several.

    Args:
        model: The model.
        name: The value.
        side: Whether it enters or leaves the attention; None for what is inside it.
        layer: The layer.
        number: Which of its attentions, from 0.

    Raises:
        IndexError: The layer holds fewer attentions.
        Unavailable: It holds one at most, or this one does not have the value; says why.
    """
    parts = model.anatomy.blocks[layer].attentions
    if not parts:
        raise Unavailable(
            f"{name}[{layer}, {number}]: a second index is for layers that hold several attentions, and those of "
            f"{model.model_class} hold one at most. Use {name}[{layer}]."
        )
    if not 0 <= number < len(parts):
        raise IndexError(f"{name}[{layer}, {number}]: the layer holds {len(parts)} attentions, from 0.")
    if side is not None:
        return Site(parts[number].entry if side == "input" else parts[number].exit, side)
    require_eager(model, name)
    found = findings(model).several
    inside = found[layer, number]
    if inside is None or name not in inside.places:
        reason = "it was not found" if inside is None else inside.reasons.get(name, "it was not found")
        raise _missing(model, layer, f"{name} of its attention {number}", reason, ())
    place = inside.places[name]
    if name == "attention_head_contributions":
        assert inside.out is not None
        return ThroughOut(place, inside.out, inside.before_out)
    return place


def head_contributions(model: StandardizedTransformer, layer: int) -> Place:
    """Each head's output through W_O."""
    place = attention("attention_head_contributions")(model, layer)
    inside = findings(model).attention[layer]
    assert inside is not None
    assert inside.out is not None
    assert inside.heads is not None
    return ThroughOut(place, inside.out, inside.before_out)


def neurons(name: str) -> Serve:
    """The input of the projection that ends the feed-forward, or the expert that runs on all tokens."""

    def serve(model: StandardizedTransformer, layer: int) -> Place:
        model.anatomy.part("mlp", layer)
        found = findings(model).neurons if name == "mlp_neurons" else findings(model).shared_neurons
        place = found[layer]
        if isinstance(place, str):
            raise _missing(model, layer, name, place, tuple(i for i, p in enumerate(found) if not isinstance(p, str)))
        return place

    return serve


def state(model: StandardizedTransformer, layer: int) -> Place:
    """The state that a mixer keeps for the next token."""
    from nnterp.values._states import find_states

    model.anatomy.part("mixer", layer)
    found = looked_up(model, "_states", find_states)
    place = found[layer]
    if isinstance(place, str):
        have = tuple(i for i, p in enumerate(found) if not isinstance(p, str))
        raise _missing(model, layer, "mixer_states", place, have)
    return place


def router(index: int) -> Serve:
    """The router's logits (0) or choices (1)."""

    def serve(model: StandardizedTransformer, layer: int) -> Place:
        found = findings(model).routers
        place = found[layer][index]
        if isinstance(place, str):
            have = tuple(i for i, p in enumerate(found) if not isinstance(p[index], str))
            raise _missing(model, layer, ("router_logits", "router_choices")[index], place, have)
        return place

    return serve


def end_inside(model: StandardizedTransformer, layer: int, role: str) -> Place:
    """Where a part leaves whose module adds the stream by itself."""
    part = model.anatomy.part(role, layer)
    if not part.leaves:
        reason = f"its module ({part.exit}) adds the stream and normalises it before it returns, and where it leaves "
        reason += f"inside is found by the certificate: call model.{'validate' if model.dispatched else 'dispatch'}()"
        raise _missing(model, layer, {"self_attn": "attentions_output"}.get(role, f"{role}s_output"), reason, ())
    return as_shown(model, Inside(part.exit, part.leaves))


def as_shown(model: StandardizedTransformer, place: Place) -> Place:
    """A place at which the model keeps the stream in a layout of its own, in that which is shown."""
    kept, edges = model.readout.layout.kept, model.kept_as_stream
    if kept is None:
        return place
    if isinstance(place, ReadOnly):
        return ReadOnly(as_shown(model, place.place), place.reason)
    own = (
        (isinstance(place, Site) and (place.path, place.side) in edges)
        or (isinstance(place, Sum) and any((path, "output") in edges for path, _ in place.terms))
        or (isinstance(place, Inside) and any(place.path == p.exit and place.labels == p.leaves for p in ended(model)))
    )
    return View(place, kept) if own else place


def ended(model: StandardizedTransformer) -> Iterator[Part]:
    """The parts that leave inside their modules."""
    yield from (p for b in model.anatomy.blocks for p in (b.mixer, b.self_attn) if p is not None and p.leaves)


def contribution(role: str) -> Serve:
    """What a part adds to the stream, from the residual structure that was proven."""

    def added(structure: ResidualStructure) -> Contribution | None:
        return {"mlp": structure.mlp, "layer": structure.other}.get(role, structure.mixer)

    def serve(model: StandardizedTransformer, layer: int) -> Place:
        part = None if role == "layer" else model.anatomy.part(role, layer)
        structure = residual(model, layer)
        contribution = added(structure)
        if contribution is None:
            reason = structure.reason or "it is not known what this layer adds to the stream"
            if role == "layer":
                reason = structure.reason or "nothing but its mixer and its feed-forward adds to the stream"
            have = tuple(i for i, s in enumerate(model.residual_structures) if added(s) is not None)
            raise _missing(model, layer, _CONTRIBUTIONS[role], reason, have)
        terms = contribution.terms
        if part is not None and part.leaves and [t.path for t in terms] == [part.end]:
            return end_inside(model, layer, role)
        if role == "self_attn" and len(terms) > 1 and part is not None and model.anatomy.blocks[layer].mixer != part:
            own = tuple(t for t in terms if t.path == part.exit or t.path.startswith(f"{part.path}."))
            terms = own or terms
        found = findings(model)  # a module inside the part that returns the same: take the part's own exit
        terms = tuple(type(t)(found.ends.get(t.path, t.path), t.scale) for t in terms)
        terms = tuple(sorted(terms, key=lambda t: found.ticks.get((t.path, (), "output"), 0)))
        if (
            len(terms) == 1
            and contribution.constant is None
            and isinstance(terms[0].scale, float)
            and terms[0].scale == 1.0
        ):
            return Site(terms[0].path, "output")
        return Sum(tuple((term.path, term.scale) for term in terms), contribution.constant)

    return serve


_CONTRIBUTIONS = {
    "self_attn": "attention_contributions",
    "mixer": "mixer_contributions",
    "mlp": "mlp_contributions",
    "layer": "other_contributions",
}


def mid(model: StandardizedTransformer, layer: int) -> Place:
    """The stream between the two parts of a layer."""
    structure = residual(model, layer)
    have = tuple(i for i, s in enumerate(model.residual_structures) if s.mid is not None)
    if structure.mid is None:
        reasons = {
            "parallel": "its attention and its feed-forward read the same stream (a parallel block)",
            "single": "it has one part only",
        }
        raise _missing(model, layer, "layers_mid", reasons.get(structure.kind, structure.reason), have)
    prepared = model.__dict__.get("_mid") or [None] * model.num_layers
    place = prepared[layer]
    if place is not None:
        return place
    if structure.mid_side == "output":
        return Site(structure.mid, "output")
    return ReadOnly(
        Site(structure.mid, "input"),
        "no single operation of this layer makes the stream that both its feed-forward and its residual path read",
    )


def residual(model: StandardizedTransformer, layer: int) -> ResidualStructure:
    """How one layer combines its parts.

    Raises:
        Unavailable: It is not proven: without weights, or with the check turned off.
    """
    model.learn_from_twin()
    if not model.residual_structures:
        why = model.twin if not model.dispatched else "call model.validate()"
        raise Unavailable(f"What a layer adds to the residual stream is proven with its weights; {why}.")
    return model.residual_structures[layer]


def _missing(model: StandardizedTransformer, layer: int, name: str, reason: str, have: tuple[int, ...]) -> Unavailable:
    where = f"layers {ranges(have)} have it" if have else "no layer of this model has it"
    block = model.anatomy.blocks[layer]
    error = Unavailable(
        f"Layer {layer} of {model.anatomy.model_class} ({block.path}: {block.description}) has no {name}: {reason}; "
        f"{where}."
    )
    error.reason = reason  # type: ignore[attr-defined]
    return error
