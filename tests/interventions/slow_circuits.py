"""A slow and plain reference of edges: HuggingFace's modules with torch hooks, one prompt and one circuit at a time.

Every head's query, key and value, every MLP and the logits are given a stream of their own by a function of the test.
"""

from __future__ import annotations

import contextlib

import torch

# Type → layers, norm before attention, its projections, W_O, norm after it, norm before the MLP, what ends the MLP, the
# last norm, and whether attention and MLP read the same stream.
BUILDS = {
    "gpt2": ("transformer.h", "ln_1", ("attn.c_attn",), "attn.c_proj", None, "ln_2", "mlp", "transformer.ln_f", False),
    "llama": (
        *("model.layers", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        *("self_attn.o_proj", None, "post_attention_layernorm", "mlp", "model.norm", False),
    ),
    "gemma2": (
        *("model.layers", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        *("self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        *("model.norm", False),
    ),
    "gpt_neox": (
        *("gpt_neox.layers", "input_layernorm", ("attention.query_key_value",), "attention.dense", None),
        *("post_attention_layernorm", "mlp", "gpt_neox.final_layer_norm", True),
    ),
}
SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = ("model.layers", "input_layernorm", SEPARATE, "self_attn.o_proj")
# Biases; parallel blocks that share one norm; mixtures of experts; post-norms; norms of each head, or of all heads.
MORE = {
    **dict.fromkeys(
        ("stablelm", "starcoder2", "nemotron", "qwen3", "mixtral", "qwen3_moe"),
        (*_LLAMA, None, "post_attention_layernorm", "mlp", "model.norm", False),
    ),
    "gemma3_text": BUILDS["gemma2"],
    "cohere": (*_LLAMA, None, "mlp", "mlp", "model.norm", True),
    "phi": (*_LLAMA[:3], "self_attn.dense", None, "mlp", "mlp", "model.final_layernorm", True),
    "gptj": (
        *("transformer.h", "ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.out_proj", None, "mlp", "mlp"),
        *("transformer.ln_f", True),
    ),
    "olmo2": (
        *("model.layers", None, (*(f"self_attn.{x}_proj self_attn.{x}_norm" for x in "qk"), SEPARATE[2])),
        *("self_attn.o_proj", "post_attention_layernorm", "mlp", "post_feedforward_layernorm", "model.norm", False),
    ),
}
ROLES = ("query", "key", "value")


class Slow:
    """Runs of one prompt.

    Attributes:
        heads: Heads of queries, of keys and of values.
        readers: Names of all that reads, in forward order.
    """

    def __init__(self, model, model_type):
        self.module, self.type, self.count = model._module, model_type, model.num_layers
        layers, self.norm, self.projections, self.out, self.post, self.second, self.end, self.last, self.parallel = {
            **BUILDS,
            **MORE,
        }[model_type]
        self.layers = self.module.get_submodule(layers)
        kv = model.num_kv_heads
        self.heads = dict(zip(ROLES, (model.num_heads, kv, kv), strict=True))
        self.head_dim = model.head_dim

    def readers_of(self, layer):
        """(role, head) of what reads the stream in a layer."""
        return [(role, head) for role in ROLES for head in range(self.heads[role])] + [("mlp", None)]

    def name(self, role, layer, head):
        """As nnterp calls it."""
        if role == "mlp":
            return f"L{layer} mlp"
        group = self.heads["query"] // self.heads[role]
        if group == 1:
            return f"L{layer} H{head} {role}"
        return f"L{layer} KV{head} {role} (heads {', '.join(str(group * head + k) for k in range(group))})"

    def run(self, ids, reads, embeddings=None):
        """One run.

        Args:
            ids: Token ids.
            reads: A function of the name of what reads, what the plain run would read, and what was written so far (a
                dict by name); it returns the stream to read.
            embeddings: What the embedding returns, if not what it would.

        Returns:
            Logits at the last position, and all that was written.
        """
        writes = {}
        with contextlib.ExitStack() as stack:

            def before(module, hook):
                def wrapped(_, args, kwargs):
                    if args:
                        new = hook(args[0])
                        return None if new is None else ((new, *args[1:]), kwargs)
                    new = hook(kwargs["hidden_states"])
                    return None if new is None else (args, {**kwargs, "hidden_states": new})

                stack.callback(module.register_forward_pre_hook(wrapped, with_kwargs=True).remove)

            def after(module, hook):
                stack.callback(module.register_forward_hook(lambda m, args, output: hook(output)).remove)

            if embeddings is not None:
                after(self.module.get_input_embeddings(), lambda _: embeddings)
            for layer, block in enumerate(self.layers):
                self.watch(layer, block, reads, writes, before, after)
            before(self.module.get_submodule(self.last), lambda x: reads("logits", x, writes))
            logits = self.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        return logits, writes

    def watch(self, layer, block, reads, writes, before, after):
        given = {}
        norm = block.get_submodule(self.norm).forward if self.norm else lambda x: x
        projections = [[block.get_submodule(path) for path in paths.split()] for paths in self.projections]

        def entering(x):
            given["x"] = x
            if layer == 0:
                writes["embeddings"] = x

        before(block, entering)

        def projected(index):
            def hook(output):
                """The projection's output with every head's part made of the stream that this head reads."""
                own = [r for r in self.readers_of(layer) if r[0] != "mlp"]
                if len(projections) > 1:
                    own = [r for r in own if r[0] == ROLES[index]]
                parts = {}
                for role, head in own:
                    stream = reads(self.name(role, layer, head), given["x"], writes)
                    made = norm(stream)
                    for module in projections[index]:
                        made = module.forward(made)
                    parts[role, head] = self.part(made, role, head)
                return self.joined(parts)

            return hook

        for index, modules in enumerate(projections):
            after(modules[-1], projected(index))
        out = block.get_submodule(self.out)

        def heads(z):
            weight = out.weight if self.type == "gpt2" else out.weight.T  # [heads × head_dim, hidden]
            width = weight.shape[0] // self.heads["query"]
            each = [
                z[..., h * width : (h + 1) * width] @ weight[h * width : (h + 1) * width]
                for h in range(self.heads["query"])
            ]
            if self.post is not None:
                post, whole = block.get_submodule(self.post), sum(each)
                eps = getattr(post, "eps", getattr(post, "variance_epsilon", None))
                scale = torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
                weight = 1 + post.weight if self.type.startswith("gemma") else post.weight
                each = [one * scale * weight for one in each]
            writes.update({f"L{layer} H{h}": one for h, one in enumerate(each)})

        before(out, heads)

        def second(x):
            stream = reads(f"L{layer} mlp", given["x"] if self.parallel else x, writes)
            return norm(stream) if self.parallel and self.second == "mlp" else stream

        before(block.get_submodule(self.second), second)
        after(block.get_submodule(self.end), lambda x: writes.__setitem__(f"L{layer} mlp", x))

    def part(self, made, role, head):
        """One head's part of what a projection returns."""
        width = self.head_dim
        if self.type == "gpt2":
            start = ROLES.index(role) * self.heads["query"] * width + head * width
        elif self.type == "gpt_neox":
            start = (3 * head + ROLES.index(role)) * width
        else:
            start = head * width
        return made[..., start : start + width]

    def joined(self, parts):
        """What a projection returns, of its heads' parts."""
        if self.type == "gpt_neox":
            order = sorted(parts, key=lambda key: (key[1], ROLES.index(key[0])))
        else:
            order = sorted(parts, key=lambda key: (ROLES.index(key[0]), key[1]))
        return torch.cat([parts[key] for key in order], dim=-1)

    def plain(self, ids):
        """Logits, writes and the stream that each reader reads, without changes."""
        streams = {}

        def reads(name, stream, _):
            streams[name] = stream
            return stream

        with torch.no_grad():
            return *self.run(ids, reads), streams

    def gradients(self, ids, metric, embeddings=None):
        """The gradient of the metric with respect to what each reader reads, through it alone; by name."""
        leaves = {}

        def reads(name, stream, _):
            leaves[name] = torch.zeros_like(stream, requires_grad=True)
            return stream + leaves[name]

        logits, _ = self.run(ids, reads, embeddings)
        made = torch.autograd.grad(metric(logits[None])[0], list(leaves.values()))
        return dict(zip(leaves, made, strict=True))

    def cut(self, ids, other, kept):
        """Logits of a run in which edges not in `kept`, a set of pairs of names, carry the other prompt's writes."""
        _, theirs, streams = self.plain(other)

        def reads(name, _, writes):
            stream = streams[name].clone()
            for sender, written in writes.items():
                if (sender, name) in kept:
                    stream = stream + written - theirs[sender]
            return stream

        with torch.no_grad():
            return self.run(ids, reads)[0]
