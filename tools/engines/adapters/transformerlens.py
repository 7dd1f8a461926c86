"""TransformerLens 4: `TransformerBridge`, without compatibility mode, which keeps HuggingFace's weights as they are."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_lens

PACKAGES = ("transformer-lens", "transformers", "torch")
NAME = "transformer_lens"


def load(folder, pattern=False):
    return TransformerBridge.boot_transformers(str(folder), device="cpu")  # float32 and eager attention by default


def cached(bridge, ids, name, **kwargs):
    return bridge.run_with_cache(ids, names_filter=name, **kwargs)[1][name]


def stream(bridge, ids, layer):
    return cached(bridge, ids, f"blocks.{layer}.hook_resid_post")


def readout(bridge, ids, last):
    return logit_lens(bridge, ids, positions=None, layers=[-1]).values[0]


def padded(bridge, rows, ids, mask, layer):
    return cached(bridge, ids, f"blocks.{layer}.hook_resid_post", attention_mask=mask)


def padded_logits(bridge, rows, ids, mask):
    return bridge(ids, attention_mask=mask)


def pattern(bridge, ids, layer):
    return cached(bridge, ids, f"blocks.{layer}.attn.hook_pattern")


def attention(bridge, ids, layer):
    return cached(bridge, ids, f"blocks.{layer}.hook_attn_out")


def mlp(bridge, ids, layer):
    return cached(bridge, ids, f"blocks.{layer}.hook_mlp_out")


def write(bridge, ids, layer, vector):
    def add(value, hook):
        return value + vector

    return bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)])


def head(bridge, ids, layer, index):
    def silence(z, hook):
        heads = z.unflatten(-1, (bridge.cfg.n_heads, -1)) if z.ndim == 3 else z  # latent attention has no axis of heads
        heads[:, :, index] = 0
        return z

    return bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", silence)])
