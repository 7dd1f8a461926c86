"""Plain torch hooks on single calls of modules, for tests of models whose modules run several times."""

import contextlib
from types import SimpleNamespace

import torch


def _first(x):
    return x[0] if isinstance(x, (tuple, list)) else x


def seen(module, run):
    """Run a module: `calls` has what each call of each inner module was given and returned, `result` what came back."""
    calls, handles = {}, []

    def hook(path):
        def keep(_, args, kwargs, output):
            given = _first(args) if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
            made = _first(output)
            pair = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in (given, made))
            calls.setdefault(path, []).append(pair)

        return keep

    for path, inner in module.named_modules():
        if path:
            handles.append(inner.register_forward_hook(hook(path), with_kwargs=True))
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return SimpleNamespace(calls=calls, result=result)


@contextlib.contextmanager
def at_call(module, path, number, edit, given=False):
    """While the block is open, the `number`-th call of a module from now on is edited, from 0.

    Args:
        module: The model.
        path: The module.
        number: The call.
        edit: Function of what the module returns, or, with `given`, of what it is given. One with two arguments is also
            given what enters the layer, for modules of a layer.
        given: Whether to edit what the module is given.
    """
    inner, count, entered = module.get_submodule(path), [0], []
    layer = module.get_submodule(".".join(path.split(".")[:3]))

    def note(_, args, kwargs):
        entered.append(args[0] if args else kwargs["hidden_states"])

    def before(_, args, kwargs):
        count[0] += 1
        if count[0] - 1 != number:
            return None
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def after(_, args, output):
        count[0] += 1
        if count[0] - 1 != number:
            return None
        made = _first(output)
        new = edit(made, entered[-1]) if edit.__code__.co_argcount == 2 else edit(made)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True)]
    if given:
        handles.append(inner.register_forward_pre_hook(before, with_kwargs=True))
    else:
        handles.append(inner.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
