"""Give an nnsight model the standard names: attributes that point at the envoys of the native modules."""

from __future__ import annotations

from collections.abc import Iterable

from nnsight.intervention.envoy import Envoy


def bind_names(model: Envoy, names: Iterable[tuple[str, str]], layer_paths: tuple[str, ...]) -> None:
    """Make every standard name an attribute of the envoy it belongs to, as nnsight's `rename=` would.

    `rename=` needs the names before the model exists, tries each of them on every module, and refuses a name that a
    native module already has with another meaning (ModernBERT's `lm_head` is a transform before its head). Here the
    exact paths are known, so each name is bound to one module; `print(model)` shows both names.

    Args:
        model: The nnsight model.
        names: Pairs of (standard path, native path), as `Anatomy.names()` gives them.
        layer_paths: Native path of each layer.
    """
    for standard, native in names:
        host_path, _, alias = standard.rpartition(".")
        if alias.isdigit():
            continue
        host = model
        if host_path:  # "layers.3": the standard path of a layer
            host = envoy_at(model, layer_paths[int(host_path.rpartition(".")[2])])
        target = envoy_at(model, native)
        if host.__dict__.get(alias) is target:
            continue
        object.__setattr__(host, alias, target)
        host._aliases[alias] = target.path.removeprefix(f"{host.path}.")


def envoy_at(model: Envoy, path: str) -> Envoy:
    """The envoy of the module at a native path, as in `module.get_submodule(path)`."""
    envoy = model
    for name in path.split("."):
        child = envoy._child_map.get(name)
        envoy = child if child is not None else getattr(envoy, name)
    return envoy
