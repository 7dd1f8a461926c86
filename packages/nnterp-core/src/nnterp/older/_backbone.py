"""`model.model`: the module that holds the layers, under the name that it has in Llama."""

from __future__ import annotations

from nnsight.intervention.envoy import Envoy

from nnterp.anatomy import Anatomy
from nnterp.traced import envoy_at


def bind_backbone(model: Envoy, anatomy: Anatomy) -> None:
    """Make `model.model.layers`, `.ln_final` and `.embed_tokens` attributes of the envoys they belong to.

    A name that the model's own modules have with another meaning is left alone. A model whose layers are its direct
    children has no backbone; `model.model` is then the model itself.

    Args:
        model: The nnsight model.
        anatomy: Which module plays which part.
    """
    path = anatomy.layers.partition(".")[0] if "." in anatomy.layers else ""
    if not path:
        if not hasattr(model, "model"):
            object.__setattr__(model, "model", model)
        return
    if path != "model":
        _bind(model, "model", path)
    backbone = envoy_at(model, path)
    for role in ("embed_tokens", "layers", "ln_final"):
        native = getattr(anatomy, role)
        if native is not None and native.startswith(f"{path}."):
            _bind(backbone, role, native.removeprefix(f"{path}."))


def _bind(host: Envoy, alias: str, path: str) -> None:
    if alias in host.__dict__ or hasattr(host._module, alias):
        return
    object.__setattr__(host, alias, envoy_at(host, path))
    host._aliases[alias] = path
