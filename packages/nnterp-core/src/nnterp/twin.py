"""Certify a model whose weights are absent by certifying a small random model of the same code.

Fake tensors have shapes and no numbers, and shapes do not tell queries from keys. So a model without weights is rebuilt
from its own class and configuration, as deep and with as many heads, but narrow enough to run in a second. What is
proven of this twin's code (where every value is, how the parts of a layer are added up, what follows the last layer,
whether padding is exact) holds for the model, whose code is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from nnterp.anatomy import Anatomy, Layer
from nnterp.certificate import Certificate, Contribution, ResidualStructure, certify
from nnterp.discovery import Assumed, Findings
from nnterp.eager import is_eager, make_eager
from nnterp.errors import Unavailable
from nnterp.facts import Facts
from nnterp.named_transformer import NamedTransformer
from nnterp.record import replace
from nnterp.tiny import make_loud, narrow_config, tiny_tokenizer
from nnterp.traced import Experts, Place, Routed


@dataclass(frozen=True)
class Twin:
    """A small random model of the same code as another, and its certificate, every line of which holds."""

    model: NamedTransformer
    certificate: Certificate


def build_twin(model: NamedTransformer) -> Twin | str:
    """The twin of a model, certified; or the reason why there is none."""
    try:
        return _built(model)
    except Exception as error:
        return f"a narrow twin of it cannot be built ({type(error).__name__}: {str(error)[:200]})"


def facts_by_twin(facts: Facts, twin: Twin, config: Any) -> Facts:
    """The facts of a model without weights, from those that its twin proved.

    Args:
        facts: What is known of the model without its weights.
        twin: Its twin.
        config: The model's HuggingFace config: a factor that is not in it must be learned, so it stays unknown.
    """
    proven = twin.model.facts
    layout, narrow = proven.readout.layout, proven.anatomy.sizes.hidden_size or 1
    width = layout.width // narrow * (facts.anatomy.sizes.hidden_size or 0)
    return dataclasses.replace(
        proven,
        anatomy=dataclasses.replace(proven.anatomy, sizes=facts.anatomy.sizes),
        lenders=facts.lenders,
        thresholds=facts.thresholds,
        readout=replace(proven.readout, chain=facts.readout.chain, layout=replace(layout, width=width)),
        declared_probabilities=facts.declared_probabilities,
        proof="twin",
        residual=tuple(_of_the_code(structure, config) for structure in proven.residual),
        look_inside=functools.cache(lambda: _inside_of_the_code(proven.inside, config)),
        look_for_states=lambda: proven.states,
        look_for_linear=lambda: proven.linear,
        look_for_context=None,  # it is about this model's numbers
    )


def facts_without_twin(facts: Facts, reason: str) -> Facts:
    """The facts of a model without weights whose twin cannot be built: what only a run can find is refused."""

    def refuse() -> Any:
        raise Unavailable(facts.unproven("Where the inside of layers and of mixers is served"))

    assumed = None if facts.readout.returns else Assumed(unknown=reason)  # a scan without weights learns the returns
    facts = dataclasses.replace(facts, padding="inexact", why_unproven=reason)
    readout = replace(facts.readout, way="none", reason=reason)
    return dataclasses.replace(
        facts,
        readout=readout,
        look_inside=refuse,
        look_for_states=refuse,
        look_for_linear=refuse,
        look_at_a_run=None if assumed is None else lambda: assumed,
    )


def _built(model: NamedTransformer) -> Twin | str:
    module_class: Any = type(model._module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = module_class._from_config(narrow_config(model._module.config), dtype=torch.float32)
    make_loud(module, 0)
    _scale_buffers(module)
    module.eval()
    if is_eager(model._module):
        make_eager(module)
    twin = NamedTransformer(
        module, rename_config=model.rename_config, tokenizer=tiny_tokenizer(), task="text-generation"
    )
    certificate, facts = certify(twin)
    if not certificate.ok:
        return f"its narrow twin is not proven: {certificate.failures[0]}"
    difference = _difference(model.anatomy, facts.anatomy)
    if difference:
        return f"a narrow twin of it is built differently: {difference}"
    twin.adopt(facts)
    return Twin(twin, certificate)


@torch.no_grad()
def _scale_buffers(module: torch.nn.Module) -> None:
    """Change factors that are saved with the weights as buffers (Gemma 4's), so that they are not taken for 1."""
    saved, generator = module.state_dict(), torch.Generator().manual_seed(0)
    for name, buffer in module.named_buffers():
        if name in saved and buffer.is_floating_point() and bool((buffer == 1).all()):
            buffer.mul_(1 + 0.3 * torch.randn(buffer.shape, generator=generator))


def _difference(mine: Anatomy, its: Anatomy) -> str:
    """What differs between two anatomies beside their widths."""
    for name in ("embed_tokens", "ln_final", "lm_head"):
        if getattr(mine, name) != getattr(its, name):
            return f"its {name} is {str(getattr(its, name))[:100]}"
    for one, other in itertools.zip_longest(map(_named, mine.blocks), map(_named, its.blocks)):
        if one != other:
            return f"a layer of it is {str(other)[:200]}"
    for name in ("num_heads", "num_kv_heads"):
        if getattr(mine.sizes, name) != getattr(its.sizes, name):
            return f"its {name} is {getattr(its.sizes, name)}"
    return ""


def _named(block: Layer) -> Layer:
    """The layer without the operations at which its parts leave, which only a run with weights finds."""
    return dataclasses.replace(
        block,
        **{
            role: dataclasses.replace(part, leaves=())
            for role in ("mixer", "self_attn", "mlp")
            if (part := getattr(block, role)) is not None
        },
    )


def _inside_of_the_code(inside: Findings, config: Any) -> Findings:
    """Findings without the values of experts that are multiplied by a factor which is not in the config."""
    numbers = {1.0, *_numbers(config.to_dict())}

    def known(place: Place | str) -> Place | str:
        factor = place.factor if isinstance(place, Experts | Routed) else 1.0
        return place if any(math.isclose(factor, n, rel_tol=1e-4) for n in numbers) else _NO_FACTOR

    experts = [{name: known(place) for name, place in of_layer.items()} for of_layer in inside.experts]
    return dataclasses.replace(inside, experts=experts)


_NO_FACTOR = "what its experts return is multiplied by a factor that the config does not hold: call model.dispatch()"


def _of_the_code(structure: ResidualStructure, config: Any) -> ResidualStructure:
    """A residual structure without the contributions whose factors are not in the config: those are learned."""
    numbers = {1.0, *_numbers(config.to_dict())}

    def known(contribution: Contribution | None) -> bool:
        if contribution is None:
            return True
        scales = [term.scale for term in contribution.terms]
        return contribution.constant is None and all(
            isinstance(s, float) and any(math.isclose(abs(s), n, rel_tol=1e-4) for n in numbers) for s in scales
        )

    reason = "what it is scaled by is learned, so it is known only where the weights are"
    return dataclasses.replace(
        structure,
        mixer=structure.mixer if known(structure.mixer) else None,
        mlp=structure.mlp if known(structure.mlp) else None,
        other=structure.other if known(structure.other) else None,
        reason=structure.reason
        or ("" if all(map(known, (structure.mixer, structure.mlp, structure.other))) else reason),
    )


def _numbers(data: Any) -> set[float]:
    """Every positive number in a configuration, and its inverse."""
    if isinstance(data, dict):
        return set().union(*map(_numbers, data.values()))
    if isinstance(data, (list, tuple)):
        return set().union(*map(_numbers, data))
    if isinstance(data, float) and data > 0:
        return {data, 1 / data}
    return set()
