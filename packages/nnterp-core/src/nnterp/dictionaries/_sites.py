"""Where published dictionaries say they belong, as values of nnterp."""

from __future__ import annotations

import re

from nnterp.values import canonical

_TRANSFORMER_LENS = {
    "mlp.hook_in": "mlps_input",
    "mlp.hook_out": "mlps_output",
    "hook_attn_in": "layers_input",
    "hook_mlp_in": "layers_mid",
}
_MODULES = {
    "": ("layers_input", "layers_output"),
    "mlp": ("mlps_input", "mlps_output"),
    "feed_forward": ("mlps_input", "mlps_output"),
    "self_attn": ("attentions_input", "attentions_output"),
    "attn": ("attentions_input", "attentions_output"),
    "attention": ("attentions_input", "attentions_output"),
}
_HUGGINGFACE = {
    "output": "layers_output",
    "mlp.input": "mlps_input",
    "mlp.output": "mlps_output",
    "self_attn.o_proj.input": "attention_head_outputs",
    "self_attn.output": "attentions_output",
    "pre_feedforward_layernorm.output": "mlps_input",
    "post_feedforward_layernorm.output": "mlp_contributions",
    "post_attention_layernorm.output": "attention_contributions",
}
_LAYER = re.compile(r"(?:[\w.]+\.)?(?:layers|h|blocks|layer)\.(\d+)(?:\.(.+))?")


def site_of_hook(name: str | None) -> str | None:
    """The value, with its layer, that a name of TransformerLens or of nnterp stands for; None if there is none.

    `blocks.3.ln2.hook_normalized` has none: it is normalised, and not yet multiplied by the norm's weight.
    """
    if not isinstance(name, str):
        return None
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block and block[2] in _TRANSFORMER_LENS:
        return f"{_TRANSFORMER_LENS[block[2]]}[{int(block[1])}]"
    try:
        value, layer = canonical(name)
    except ValueError:
        return None
    return value.name if layer is None else f"{value.name}[{layer}]"


def sites_of_module(path: str) -> tuple[str, str] | None:
    """The values, with their layer, that a native module is given and returns, as in `"layers.5.mlp"`; None if unknown.

    The path of a model's own code may come before it: `transformer.h.5`, `gpt_neox.layers.5.attention`.
    """
    if path.endswith(("embed_tokens", "wte", "embed_in")):
        return "token_embeddings", "token_embeddings"
    found = _LAYER.fullmatch(path)
    if found is None or (found[2] or "") not in _MODULES:
        return None
    given, returned = _MODULES[found[2] or ""]
    return f"{given}[{int(found[1])}]", f"{returned}[{int(found[1])}]"


def site_of_native(name: str | None) -> str | None:
    """The value that the input or output of a native module stands for, as in `"model.layers.5.mlp.output"`."""
    found = _LAYER.fullmatch(name) if isinstance(name, str) else None
    if found is None or (found[2] or "") not in _HUGGINGFACE:
        return None
    return f"{_HUGGINGFACE[found[2]]}[{int(found[1])}]"
