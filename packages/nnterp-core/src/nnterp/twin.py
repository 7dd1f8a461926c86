"""What a model's numbers would show, without its weights: a narrow twin of it, with random weights, is proven instead.

Fake tensors have shapes and no numbers, and shapes do not tell queries from keys. So a model whose weights are not here
is rebuilt from its own class and configuration, as deep and with as many heads, but narrow enough to run in a blink.
What its numbers prove about the code (where every value is, how a layer's parts are added up, what follows the last
layer, whether padding is exact) holds for the model, whose code is the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from nnterp.anatomy import Anatomy, Layer
from nnterp.certificate import Contribution, ResidualStructure
from nnterp.readout import StreamLayout
from nnterp.values._eager import is_eager, make_eager

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer


def twin_of(model: StandardizedTransformer) -> StandardizedTransformer | str:
    """The proven twin of a model; or why there is none. Built once."""
    kept = model.__dict__.get("_twin")
    if kept is None:
        try:
            kept = _built(model)
        except Exception as error:
            kept = f"a narrow twin of it cannot be built ({type(error).__name__}: {str(error)[:200]})"
        object.__setattr__(model, "_twin", kept)
    return kept


def learn_from_twin(model: StandardizedTransformer) -> None:
    """Take over what the twin has proven about the code; once, and nothing if the weights are here."""
    if model.dispatched or model.__dict__.get("_learned"):
        return
    object.__setattr__(model, "_learned", True)
    twin = twin_of(model)
    if isinstance(twin, str):
        if model.check_renaming:  # what nothing has proven is refused
            model.padding_is_exact = False
            model.readout.way, model.readout.reason = None, twin
        return
    model.adopt(dataclasses.replace(twin.anatomy, sizes=model.anatomy.sizes))
    model.kept_as_stream = twin.kept_as_stream
    layout, narrow = twin.readout.layout, twin.hidden_size or 1
    width = layout.width // narrow * (model.hidden_size or 0)
    model.readout.layout = StreamLayout(**{**layout.__dict__, "width": width})
    model.residual_structures = tuple(_of_the_code(s, model._module.config) for s in twin.residual_structures)
    model.padding_is_exact, model.positions_from_mask = twin.padding_is_exact, twin.positions_from_mask
    model.readout.way, model.readout.reason = twin.readout.way, twin.readout.reason
    model.readout.returns = twin.readout.returns
    object.__setattr__(model, "_mid", twin.__dict__.get("_mid"))


def _built(model: StandardizedTransformer) -> StandardizedTransformer | str:
    from nnterp.standardized_transformer import StandardizedTransformer
    from nnterp.tiny import make_loud, narrow_config, tiny_tokenizer

    module_class: Any = type(model._module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = module_class._from_config(narrow_config(model._module.config), dtype=torch.float32)
    make_loud(module, 0)
    _scale_buffers(module)
    module.eval()
    if is_eager(model._module):
        make_eager(module)
    twin = StandardizedTransformer(
        module, tokenizer=tiny_tokenizer(), rename_config=model.rename_config, check_renaming=False
    )
    certificate = twin.validate()
    if not certificate.ok:
        return f"its narrow twin is not proven: {certificate.failures[0]}"
    difference = _difference(model.anatomy, twin.anatomy)
    if difference:
        return f"a narrow twin of it is built differently: {difference}"
    return twin


@torch.no_grad()
def _scale_buffers(module: torch.nn.Module) -> None:
    """Move factors that come with the weights without being parameters (Gemma 4's), lest they be taken for 1."""
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
    """A layer as it is known without numbers."""
    return dataclasses.replace(
        block,
        **{
            role: dataclasses.replace(part, leaves=())
            for role in ("mixer", "self_attn", "mlp")
            if (part := getattr(block, role)) is not None
        },
    )


def _of_the_code(structure: ResidualStructure, config: Any) -> ResidualStructure:
    """The part of a residual structure that is in the code and its configuration, and not in the weights."""
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
