def directory_of(model: StandardizedTransformer) -> Directory:
    """Look everything up, as a request needs it that is answered where nothing can be looked up."""
    from nnterp.values._table import VALUES

    entries = {}
    for value in VALUES.values():
        if value.per_layer:
            several = [(b.index, i) for b in model.anatomy.blocks for i in range(len(b.attentions))]
            at = [*range(model.num_layers), *(several if value.role == "self_attn" else ())]
            entries[value.name] = _per_layer(model, lambda layer, name=value.name: model.place(name, layer), at)
        else:
            found, reason = _or_reason(lambda name=value.name: model.place(name))
            entries[value.name] = [(found, reason, None)]
    for role in ("self_attn", "mixer", "mlp"):
        layers = range(model.num_layers)
        entries[role] = _per_layer(model, lambda layer, role=role: model.module_path(role, layer), layers)
    return Directory(entries)


def _per_layer(
    model: StandardizedTransformer, look_up: Any, at: Iterable[int | tuple[int, int]]
) -> list[tuple[Any, str, tuple[Any, ...] | None]]:
    groups: dict[tuple[Any, str], list[Any]] = {}
    for layer in at:
        path = model.layer_paths[layer[0] if isinstance(layer, tuple) else layer]
        found, reason = _or_reason(lambda layer=layer: look_up(layer))
        reason = reason.replace(f"Layer {layer} of", "A layer of").replace(path, _LAYER)
        groups.setdefault((relocated(found, path, _LAYER), reason), []).append(layer)
    return [(found, reason, tuple(layers)) for (found, reason), layers in groups.items()]


def _or_reason(look_up: Any) -> tuple[Any, str]:
    try:
        return look_up(), ""
    except Unavailable as error:
        return None, str(error)
