"""Give an nnsight model the standard names: attributes that point at the envoys of the native modules."""

from __future__ import annotations

from nnsight.intervention.envoy import Envoy

from nnterp.anatomy import Anatomy


def bind_names(model: Envoy, anatomy: Anatomy) -> None:
    """Make every standard name of `anatomy` an attribute of the envoy it belongs to, as nnsight's `rename=` would.

    `rename=` needs the names before the model exists, tries each of them on every module, and refuses a name that a
    native module bears with another meaning (ModernBERT's `lm_head` is a transform before its head). The paths are
    known exactly here, so they are bound one by one; `print(model)` shows both names.
    """
    for standard, native in anatomy.names():
        host_path, _, alias = standard.rpartition(".")
        if alias.isdigit():
            continue
        host = model
        if host_path:  # "layers.3": the standard path of a layer
            host = envoy_at(model, anatomy.blocks[int(host_path.rpartition(".")[2])].path)
        target = envoy_at(model, native)
        if host.__dict__.get(alias) is target:
            continue
        object.__setattr__(host, alias, target)
        prefix = f"{host.path}."
        host._aliases[alias] = target.path.removeprefix(prefix)


def envoy_at(model: Envoy, path: str) -> Envoy:
    """The envoy of the module at a native path, as in `module.get_submodule(path)`."""
    envoy = model
    for name in path.split("."):
        child = envoy._child_map.get(name)
        envoy = child if child is not None else getattr(envoy, name)
    return envoy
