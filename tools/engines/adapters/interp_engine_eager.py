"""interp-engine's eager backend, the one that serves every point; its others are vLLM's and need a GPU."""

from __future__ import annotations

from interp_engine import AddSpec, HookManager, SteeringSpec, capture, load_model, steer, sync_model

PACKAGES = ("interp-engine", "transformers", "torch")
NAME = "interp_engine"


def load(folder, pattern=False):
    model = load_model(str(folder), backend="eager", device="cpu", dtype="float32")
    sync_model(model).warmup()
    return model


def stream(model, ids, layer):
    return capture(model, ids, [f"resid_post.{layer}"])[f"resid_post.{layer}"]


def readout(model, ids, last):
    return sync_model(model).decode_residuals(stream(model, ids, last)[0])


def padded(model, rows, ids, mask, layer):
    return capture(model, ids, [f"resid_post.{layer}"], attention_mask=mask)[f"resid_post.{layer}"]


def padded_logits(model, rows, ids, mask):
    return capture(model, ids, ["final_norm"], attention_mask=mask).output.logits


def pattern(model, ids, layer):
    return capture(model, ids, [f"attn_probs.{layer}"])[f"attn_probs.{layer}"]


def attention(model, ids, layer):
    return capture(model, ids, [f"attn_out.{layer}"])[f"attn_out.{layer}"]


def mlp(model, ids, layer):
    return capture(model, ids, [f"mlp_out.{layer}"])[f"mlp_out.{layer}"]


def write(model, ids, layer, vector):
    with steer(model, SteeringSpec.at(f"resid_post.{layer}", AddSpec(vector=vector, scale=1.0))):
        return capture(model, ids, ["final_norm"]).output.logits


def head(model, ids, layer, index):
    def silence(z):
        z = z.clone()
        z.unflatten(-1, (model.n_heads, -1))[..., index, :] = 0
        return z

    module, side = model.resolve_point("z", layer)
    with HookManager() as hooks:
        hooks.write(module, silence, point=side)
        return capture(model, ids, ["final_norm"]).output.logits
