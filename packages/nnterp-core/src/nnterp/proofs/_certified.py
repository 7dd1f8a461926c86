"""The certificate and the facts of a model, from disk or by certifying it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from nnterp import traced
from nnterp.anatomy import Anatomy, Layer, Part, Sizes
from nnterp.certificate import AttentionProbabilitiesAccessor, Certificate, Line, certify
from nnterp.decoders import DecoderReadout
from nnterp.discovery import Attention, ContextFact, Contribution, Findings, ResidualStructure, SourceText, Term
from nnterp.facts import Facts
from nnterp.named_transformer import NamedTransformer
from nnterp.proofs._forms import names_of
from nnterp.proofs._key import What, key_of_code
from nnterp.proofs._shelf import Unfit, proven
from nnterp.proofs._types import fits
from nnterp.traced import bracket_one

_PLACES = (
    *(traced.Site, traced.Item, traced.Inside, traced.Everywhere, traced.ReadOnly, traced.View, traced.Layout),
    *(traced.Sum, traced.ThroughOut, traced.State, traced.CachedState),
    *(traced.Routed, traced.Experts, traced.EveryExpert),
)
_FACTS = (
    *(Anatomy, Layer, Part, Sizes, traced.Readout, DecoderReadout, traced.Chain, traced.StreamLayout, traced.Sharing),
    *(ResidualStructure, Contribution, Term, *_PLACES),
)
_LINES = (Certificate, Line)
_FINDINGS = (Findings, Attention, SourceText, *_PLACES)
WEIGHTS = What("certificate", "the names of its parts", (*_LINES, *_FACTS), of_names=False)
SHAPES = What("shapes", "the shapes of its parts, without weights", (*_LINES, *_FACTS), of_names=False)
TWIN = What("twin", "a small random model of its code", (*_FACTS, *_FINDINGS))
INSIDE = What("inside", "where values inside its layers are", _FINDINGS)
STATES = What("states", "where the states of its mixers are", _FINDINGS)
LINEAR = What("linear", "where the inside of its linear attention is", _FINDINGS)
CONTEXT = What("context", "what it does around its layers", (ContextFact,))
PROBABILITIES = What("probabilities", "its attention probabilities")
_SEARCHES: dict[str, tuple[What, type]] = {
    "look_inside": (INSIDE, Findings),
    "look_for_states": (STATES, tuple),
    "look_for_linear": (LINEAR, tuple),
    "look_for_context": (CONTEXT, tuple),
}
_NOT_STORED = ("declared_probabilities", "places", "look_at_a_run", *_SEARCHES)


def certified(model: NamedTransformer, anew: bool = False) -> tuple[Certificate, Facts]:
    """Return what `certify(model)` returns: from disk if the very same model was certified before.

    Only certificates of which every line holds are kept.

    Args:
        model: The model, as it was loaded.
        anew: Certify it whatever is on disk, and keep nothing: it may have been changed since it was loaded.
    """
    if anew:
        return certify(model)

    def restore(stored: Any) -> tuple[Certificate, Facts]:
        certificate, facts = stored["certificate"], _restored(model, stored["facts"])
        if not isinstance(certificate, Certificate) or not certificate.ok:
            raise Unfit("it holds no certificate, or one that failed")
        return certificate, facts.searching(model._module, model.interleaver) if model.dispatched else facts

    return proven(
        model,
        WEIGHTS if model.dispatched else SHAPES,
        lambda: certify(model),
        store=lambda made: {"certificate": made[0], "facts": _stored(made[1])},
        restore=restore,
        worth=lambda made: made[0].ok,
    )


def with_kept_searches(model: NamedTransformer, facts: Facts, anew: bool = False) -> Facts:
    """The facts of a model with weights, whose searches look on disk first.

    Args:
        model: The model.
        facts: Its facts.
        anew: Search whatever is on disk.
    """
    if facts.proof != "weights" or facts.look_inside is None:
        return facts

    def kept(what: What, kind: type, search: Callable[[], Any]) -> Callable[[], Any]:
        return functools.cache(
            lambda: proven(model, what, search, restore=functools.partial(_required, kind), anew=anew)
        )

    found: dict[str, Any] = {
        name: kept(*of, search) for name, of in _SEARCHES.items() if (search := getattr(facts, name)) is not None
    }
    return dataclasses.replace(facts, **found)


def proven_by_twin(model: NamedTransformer, prove: Callable[[], Facts | None]) -> Facts | None:
    """Return the facts that a model's twin proves: from disk if a model of the same code and config was proven before.

    Args:
        model: A model without weights.
        prove: Builds and certifies the twin; None if there is none.
    """

    def store(facts: Facts | None) -> Any:
        assert facts is not None
        return {"facts": _stored(facts), "inside": facts.inside, "states": facts.states, "linear": facts.linear}

    def restore(stored: Any) -> Facts:
        inside, states = _required(Findings, stored["inside"]), _required(tuple, stored["states"])
        linear, facts = _required(tuple, stored["linear"]), _restored(model, stored["facts"])
        return dataclasses.replace(
            facts, look_inside=lambda: inside, look_for_states=lambda: states, look_for_linear=lambda: linear
        )

    return proven(
        model, TWIN, prove, store=store, restore=restore, worth=lambda facts: facts is not None, key=key_of_code
    )


def _required(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise Unfit(f"it holds a {type(value).__name__}")
    return value


def _stored(facts: Facts) -> dict[str, Any]:
    return {name: value for name, value in vars(facts).items() if name in _stored_names()}


def _stored_names() -> list[str]:
    return [field.name for field in dataclasses.fields(Facts) if field.name not in _NOT_STORED]


def _restored(model: NamedTransformer, stored: Any) -> Facts:
    """The facts that were stored, with what the proof changed in the module: `layers_mid` is instrumented.

    Raises:
        Unfit: They are not of this model.
    """
    if stored.keys() != set(_stored_names()):
        raise Unfit("it holds other facts")
    declared = None if model.rename_config is None else model.rename_config.attn_prob_source
    if wrong := [name for name, hint in names_of(Facts).items() if name in stored and not fits(stored[name], hint)]:
        raise Unfit(f"its {wrong[0]} are of another type")
    facts = Facts(**stored, declared_probabilities=declared)
    if [layer.path for layer in facts.anatomy.blocks] != [layer.path for layer in model.anatomy.blocks]:
        raise Unfit("its layers are others")
    for _, path in facts.anatomy.names():
        model._module.get_submodule(path)
    if model.dispatched:
        _instrument(model, facts)
    return facts


def _instrument(model: NamedTransformer, facts: Facts) -> None:
    """Instrument the operations that make `layers_mid`, as finding them does."""
    known: dict[tuple[Any, str], Any] = {}
    for place in facts.between:
        if place is not None and not bracket_one(model._module.get_submodule(place.path), place.labels[0], known):
            raise Unfit(f"{place} is not there")


def check_first_probabilities(model: NamedTransformer, layer: int, use_trace: bool, anew: bool) -> None:
    """Prove the attention probabilities of one layer by running the model, unless that is on disk.

    Raises:
        RenamingError: They are not proven; says why.
    """

    def check() -> bool:
        AttentionProbabilitiesAccessor(model).check_source(layer, use_trace=use_trace)
        return True

    what = dataclasses.replace(PROBABILITIES, name=f"{PROBABILITIES.name}-{layer}-{'run' if use_trace else 'found'}")
    proven(model, what, check, restore=functools.partial(_required, bool), anew=anew)
