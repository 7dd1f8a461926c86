"""Texts of the errors for models whose parts are not found: what is missing, what is there, which name to give."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from nnterp.anatomy._modules import children


def listed(module: nn.Module) -> str:
    """Name and class of each child, in one line."""
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in children(module)) or "no modules"


def tree(module: nn.Module, depth: int, indent: str = "  ") -> str:
    """Name and class of the modules inside, one a line, `depth` levels down. Of a ModuleList, the first entry only."""
    lines: list[str] = []
    for name, child in children(module):
        lines.append(f"{indent}{name}: {type(child).__name__}")
        if depth > 1:
            inner = tree(child, depth - 1, indent + "  ")
            lines += [inner] if inner else []
        if isinstance(module, nn.ModuleList):
            lines.append(f"{indent}… {len(module)} in all")
            break
    return "\n".join(lines)


def no_match(field: str, asked: list[str], module: nn.Module, where: str) -> str:
    """The user's names match nothing. Shows the modules around the one with the closest name.

    Args:
        field: The field of `RenameConfig`.
        asked: The names it holds.
        module: Where they were looked for.
        where: The same in words.
    """
    paths = [path for path, _ in module.named_modules() if path]
    close = difflib.get_close_matches(asked[0], paths, n=3, cutoff=0.4) or difflib.get_close_matches(
        asked[0].rpartition(".")[2], [p.rpartition(".")[2] for p in paths], n=3, cutoff=0.4
    )
    around = module
    if close:
        matching = next(p for p in paths if p == close[0] or p.endswith(f".{close[0]}"))
        around = module.get_submodule(matching.rpartition(".")[0])
    hint = f" Close to it: {', '.join(dict.fromkeys(close))}." if close else ""
    wanted = asked[0] if len(asked) == 1 else asked
    return f"RenameConfig({field}={wanted!r}) matches nothing in {where}.{hint} What is there:\n{tree(around, depth=2)}"


def describe_missing(model: nn.Module, missing: Sequence[tuple[str, str]]) -> str:
    """Parts that every causal LM has were not found.

    Args:
        model: The model.
        missing: For each part, the field of `RenameConfig` that names it and what the part is.
    """
    fields = ", ".join(f"{field}=..." for field, _ in missing)
    lines = "\n".join(f"  {field}: {what}" for field, what in missing)
    return (
        f"nnterp does not recognise every part of {type(model).__name__}. "
        f"Pass rename_config=RenameConfig({fields}) with the names of:\n{lines}"
    )


def no_layers(model: nn.Module) -> str:
    """The model has no list of layers."""
    return (
        f"{type(model).__name__} has no list of layers that nnterp recognises: no ModuleList whose "
        f"entries hold modules of their own. Name it with RenameConfig(layers_name=...). The model's modules:\n"
        + tree(model, depth=3)
    )


def several_stacks(model: nn.Module, stacks: Sequence[str]) -> str:
    """The model has several lists of layers, and none of them is the one that makes the logits."""
    return (
        f"{type(model).__name__} has {len(stacks)} stacks of layers ({', '.join(stacks)}), so there is no "
        "one residual stream from embedding to logits. One of them can be named, as in "
        f"RenameConfig(layers_name={stacks[0]!r})."
    )


def no_layer_modules(model: nn.Module, lists: Sequence[str]) -> str:
    """The model keeps all attentions in one list and all feed-forwards in another (XLM)."""
    return (
        f"{type(model).__name__} has no layer modules: it keeps the parts of its layers in separate lists "
        f"({', '.join(lists)}), so no module carries a layer's input and output."
    )


def several_embeddings(model: nn.Module, path: str | None, number: int) -> str:
    """The model embeds several rows of codes and adds them up (Musicgen)."""
    return (
        f"{type(model).__name__} embeds its input with {number} tables ({path}), one for each of as "
        "many rows of codes that it reads as one sequence: rows of its input are no rows of a residual stream, "
        "so nnterp cannot serve it."
    )
