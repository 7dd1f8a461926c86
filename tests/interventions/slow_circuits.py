"""A slow and plain reference of edges: HuggingFace's modules with torch hooks, one prompt and one circuit at a time.

Every head's query, key and value, every MLP and the logits are given a stream of their own by a function of the test.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

import torch

ROLES = ("query", "key", "value")
SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GPT2_HEADS = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


@dataclass(frozen=True)
class Build:
    """Where a model type keeps the parts of a layer; Llama's places unless said otherwise.

    Attributes:
        layers: The list of layers.
        first: The norm before the attention; None if it has none.
        projections: Modules that make queries, keys and values, one after the other where there are several for one
            role; a single entry makes all three.
        fused: What a single entry returns: all queries, all keys, all values ("roles"), or this order for each head.
        out: W_O.
        post: The norm after the attention, if there is one.
        second: What reads the stream for the MLP: its norm, or the MLP itself.
        end: What returns what the MLP adds.
        last: The norm before the unembedding.
        parallel: Whether attention and MLP read the same stream. If `second` is no norm, they share `first`.
        scale: The entry of the config that multiplies what attention and MLP add.
    """

    layers: str = "model.layers"
    first: str | None = "input_layernorm"
    projections: tuple[str, ...] = SEPARATE
    fused: Literal["roles"] | tuple[str, ...] = ROLES
    out: str = "self_attn.o_proj"
    post: str | None = None
    second: str = "post_attention_layernorm"
    end: str = "mlp"
    last: str = "model.norm"
    parallel: bool = False
    scale: str | None = None


LLAMA = Build()
GEMMA2 = replace(
    LLAMA, post="post_attention_layernorm", second="pre_feedforward_layernorm", end="post_feedforward_layernorm"
)
GPT2 = Build(
    *("transformer.h", "ln_1", ("attn.c_attn",), "roles", "attn.c_proj"), second="ln_2", last="transformer.ln_f"
)
GPTJ = replace(GPT2, projections=GPT2_HEADS, out="attn.out_proj", second="mlp", parallel=True)
COHERE = Build(second="mlp", parallel=True)
OPT = Build(
    *("model.decoder.layers", "self_attn_layer_norm"),
    out="self_attn.out_proj",
    second="final_layer_norm",
    end="fc2",
    last="model.decoder.final_layer_norm",
)
POST = Build(first=None, post="post_attention_layernorm", second="mlp", end="post_feedforward_layernorm")
NORMED_HEADS = (*(f"self_attn.{x}_proj self_attn.{x}_norm" for x in "qk"), SEPARATE[2])
FUSED, DENSE = ("self_attention.query_key_value",), "self_attention.dense"

# Those that all tests run on.
BUILDS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gemma2": GEMMA2,
    "gpt_neox": Build(
        *("gpt_neox.layers", "input_layernorm", ("attention.query_key_value",)),
        out="attention.dense",
        last="gpt_neox.final_layer_norm",
        parallel=True,
    ),
}
MORE = {
    # Sequential blocks: norms with biases, grouped heads, norms of each head, attention sinks, mixtures of experts.
    **dict.fromkeys(
        "gemma mistral qwen2 qwen3 smollm3 stablelm starcoder2 nemotron mixtral qwen2_moe qwen3_moe gpt_oss".split(),
        LLAMA,
    ),
    "olmoe": Build(projections=NORMED_HEADS),  # a norm of all heads' queries, and of all keys
    "opt": OPT,
    "xglm": replace(OPT, layers="model.layers", last="model.layer_norm"),
    "biogpt": replace(OPT, layers="biogpt.layers", last="biogpt.layer_norm"),
    "gpt_neo": replace(
        GPT2, projections=tuple(f"attn.attention.{x}_proj" for x in "qkv"), out="attn.attention.out_proj"
    ),
    # One projection for queries, keys and values. BLOOM and MPT add the stream inside of the MLP.
    "phi3": Build(projections=("self_attn.qkv_proj",), fused="roles"),
    "gpt_bigcode": GPT2,  # one key and value for all heads
    "bloom": Build(
        *("transformer.h", "input_layernorm", FUSED),
        out=DENSE,
        end="mlp.dense_4h_to_h",
        last="transformer.ln_f",
    ),
    "mpt": Build(
        *("transformer.blocks", "norm_1", ("attn.Wqkv",), "roles", "attn.out_proj"),
        second="norm_2",
        end="ffn.down_proj",
        last="transformer.norm_f",
    ),
    # Multipliers of what a layer adds.
    "granite": Build(scale="residual_multiplier"),
    "granitemoe": Build(scale="residual_multiplier", end="block_sparse_moe"),
    # Norms after attention and MLP; OLMo 2 and EXAONE 4 have none before them.
    "gemma3_text": GEMMA2,
    "glm4": Build(post="post_self_attn_layernorm", end="post_mlp_layernorm"),
    "olmo2": replace(POST, projections=NORMED_HEADS),
    "exaone4": POST,
    # Parallel blocks with one norm.
    "cohere": COHERE,
    "phi": replace(COHERE, out="self_attn.dense", last="model.final_layernorm"),
    "falcon": Build(
        *("transformer.h", "input_layernorm", FUSED, "roles", DENSE),
        second="mlp",
        last="transformer.ln_f",
        parallel=True,
    ),
    "gptj": GPTJ,
    "codegen": replace(GPTJ, projections=("attn.qkv_proj",), fused=("query", "value", "key")),
}


class Slow:
    """Runs of one prompt.

    Attributes:
        heads: Heads of queries, of keys and of values.
        readers: Names of all that reads, in forward order.
    """

    def __init__(self, model, model_type):
        self.module, self.type, self.count = model._module, model_type, model.num_layers
        self.build = {**BUILDS, **MORE}[model_type]
        self.layers = self.module.get_submodule(self.build.layers)
        self.scale = 1.0 if self.build.scale is None else getattr(self.module.config, self.build.scale)
        self.known = {}
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
            before(self.module.get_submodule(self.build.last), lambda x: reads("logits", x, writes))
            logits = self.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        return logits, writes

    def watch(self, layer, block, reads, writes, before, after):
        given = {}
        build = self.build
        norm = block.get_submodule(build.first).forward if build.first else lambda x: x
        projections = [[block.get_submodule(path) for path in paths.split()] for paths in build.projections]

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
        out = block.get_submodule(build.out)

        def heads(z):
            weight = out.weight.T if isinstance(out, torch.nn.Linear) else out.weight  # [heads × head_dim, hidden]
            width = weight.shape[0] // self.heads["query"]
            each = [
                z[..., h * width : (h + 1) * width] @ weight[h * width : (h + 1) * width]
                for h in range(self.heads["query"])
            ]
            if build.post is not None:
                post, whole = block.get_submodule(build.post), sum(each)
                eps = getattr(post, "eps", getattr(post, "variance_epsilon", None))
                scale = torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
                weight = 1 + post.weight if self.type.startswith("gemma") else post.weight
                each = [one * scale * weight for one in each]
            writes.update({f"L{layer} H{h}": self.scale * one for h, one in enumerate(each)})

        before(out, heads)

        def second(x):
            stream = reads(f"L{layer} mlp", given["x"] if build.parallel else x.view_as(given["x"]), writes)
            return norm(stream) if build.parallel and build.second == "mlp" else stream.view_as(x)

        def ending(x):
            x = x[0] if isinstance(x, tuple) else x  # beside it mixtures may return what their router chose
            writes[f"L{layer} mlp"] = self.scale * x.view_as(given["x"])

        before(block.get_submodule(build.second), second)
        after(block.get_submodule(build.end), ending)

    def part(self, made, role, head):
        """One head's part of what a projection returns."""
        width = self.head_dim
        if len(self.build.projections) > 1:
            start = head
        elif self.build.fused == "roles":
            start = head + sum(self.heads[before] for before in ROLES[: ROLES.index(role)])
        else:
            start = 3 * head + self.build.fused.index(role)
        return made[..., start * width : (start + 1) * width]

    def joined(self, parts):
        """What a projection returns, of its heads' parts."""
        if len(self.build.projections) > 1 or self.build.fused == "roles":
            order = sorted(parts, key=lambda key: (ROLES.index(key[0]), key[1]))
        else:
            order = sorted(parts, key=lambda key: (key[1], self.build.fused.index(key[0])))
        return torch.cat([parts[key] for key in order], dim=-1)

    def plain(self, ids):
        """Logits, writes and the stream that each reader reads, without changes; kept for the next call."""
        if tuple(ids) not in self.known:
            self.known[tuple(ids)] = self.unchanged(ids)
        return self.known[tuple(ids)]

    def unchanged(self, ids):
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
