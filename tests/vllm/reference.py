"""HuggingFace's own numbers of a checkpoint, by plain torch hooks, in a process that has neither vLLM nor nnterp.

python reference.py FOLDER OUT: see `main` for what is written.
"""

import contextlib
import sys

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROMPTS = ([5, 17, 101, 33, 64, 9, 250], [7, 8, 99], [41, 300, 12, 13, 60])
STEERED, SKIPPED, WRITTEN, NEW = (1, 2), (1, 2), 2, 6

LLAMA = {
    "layers": "model.layers",
    "attn": "self_attn",
    "mlp": "mlp",
    "out": "self_attn.o_proj",
    "down": "mlp.down_proj",
    "mid": "post_attention_layernorm",
    "norm": "model.norm",
    "embed": "model.embed_tokens",
}
NAMES = {
    "gpt2": {
        "layers": "transformer.h",
        "attn": "attn",
        "mlp": "mlp",
        "out": "attn.c_proj",
        "down": "mlp.c_proj",
        "mid": "ln_2",
        "norm": "transformer.ln_f",
        "embed": "transformer.wte",
    },
    "gemma3_text": {**LLAMA, "mid": "pre_feedforward_layernorm"},
    "mixtral": {**LLAMA, "down": None},
}
# value → (where, side)
SITES = {
    "layers_input": ("", "in"),
    "attentions_input": ("attn", "in"),
    "attention_head_outputs": ("out", "in"),
    "attentions_output": ("attn", "out"),
    "layers_mid": ("mid", "alias"),
    "mlps_input": ("mlp", "in"),
    "mlp_neurons": ("down", "in"),
    "mlps_output": ("mlp", "out"),
    "layers_output": ("", "out"),
}
INSIDE = ("attention_queries", "attention_keys", "attention_values")


def edited(tensor):
    """A change that no norm undoes, and that is the same in every layout."""
    return 0.5 * tensor + tensor.abs()


class Run:
    """One forward pass of the plain model, watched by hooks, with one value edited if asked."""

    def __init__(self, model, edit=None):
        self.model, self.edit, self.values, self.stack = model, edit, {}, contextlib.ExitStack()
        names = NAMES.get(model.config.model_type, LLAMA)
        layers = model.get_submodule(names["layers"])
        self.watch("token_embeddings", None, model.get_submodule(names["embed"]), "out")
        self.watch("ln_final_output", None, model.get_submodule(names["norm"]), "out")
        for i, layer in enumerate(layers):
            for value, (where, side) in SITES.items():
                if where and names[where] is None:
                    continue
                self.watch(value, i, layer.get_submodule(names[where]) if where else layer, side)
        self.owners = {id(layer.get_submodule(names["attn"])): i for i, layer in enumerate(layers)}

    def changed(self, value, layer, tensor):
        self.values[value, layer] = tensor.detach().clone()
        return edited(tensor) if self.edit == (value, layer) else None

    def watch(self, value, layer, module, side):
        def before(_, args, kwargs):
            keyed = not args or not args[0].is_floating_point()
            tensor = kwargs["hidden_states"] if keyed else args[0]
            new = self.changed(value, layer, tensor)
            if new is None:
                return None
            if side == "alias":  # the residual is the same tensor
                tensor.copy_(new)
                return None
            return (args, {**kwargs, "hidden_states": new}) if keyed else ((new, *args[1:]), kwargs)

        def after(_, args, output):
            tensor = output[0] if isinstance(output, tuple) else output
            new = self.changed(value, layer, tensor)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        if side == "out":
            handle = module.register_forward_hook(after)
        else:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        self.stack.callback(handle.remove)

    def attention(self, module, query, key, value, *args, **kwargs):
        layer, given = self.owners[id(module)], [query, key, value]
        for k, name in enumerate(INSIDE):
            new = self.changed(name, layer, given[k].transpose(1, 2))
            if new is not None:
                given[k] = new.transpose(1, 2)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *given, *args, **kwargs)

    def __call__(self, ids):
        global ATTENTION
        ATTENTION = self.attention
        with self.stack, torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits


ATTENTION = None


def spy(*args, **kwargs):
    return ATTENTION(*args, **kwargs)


def hooked(model, layer, function):
    """Replace what a layer returns by a function of it."""
    names = NAMES.get(model.config.model_type, LLAMA)
    module = model.get_submodule(names["layers"])[layer]

    def after(_, args, output):
        new = function(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)


def greedy(model, ids):
    given = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def main(folder, out):
    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="spy").eval()
    plain.generation_config = GenerationConfig()  # no end token, no penalties: the most probable token of every step
    names = NAMES.get(model.config.model_type, LLAMA)
    vector = torch.randn(model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1))
    found = {"vector": vector, "read": [], "logits": [], "lens": [], "written": {}}
    for ids in PROMPTS:
        run = Run(model)
        found["logits"].append(run(ids)[0])
        found["read"].append(run.values)
        depth = len(model.get_submodule(names["layers"]))
        streams = torch.cat([run.values["layers_output", i][:, -1] for i in range(depth)])
        normed = plain.get_submodule(names["norm"])(streams)
        found["lens"].append(plain.lm_head(normed).softmax(-1).detach())
    scale = found["scale"] = float(found["read"][0]["layers_output", 1].norm(dim=-1).mean()) / float(vector.norm())
    values = dict.fromkeys(name for name, layer in found["read"][0] if layer is not None)
    for target in [*((name, WRITTEN) for name in values), ("token_embeddings", None), ("ln_final_output", None)]:
        found["written"][target] = Run(model, target)(PROMPTS[0])[0]
    found["greedy"] = [greedy(plain, ids) for ids in PROMPTS]
    handles = [hooked(plain, layer, lambda stream: stream + scale * vector) for layer in STEERED]
    with torch.no_grad():
        found["steered"] = [plain(torch.tensor([ids])).logits[0] for ids in PROMPTS]
    found["steered greedy"] = [greedy(plain, ids) for ids in PROMPTS]
    for handle in handles:
        handle.remove()
    kept = {}
    first = plain.get_submodule(names["layers"])[SKIPPED[0]]
    before = first.register_forward_pre_hook(
        lambda _, args, kwargs: kept.update(stream=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    after = hooked(plain, SKIPPED[-1], lambda _: kept["stream"])
    with torch.no_grad():
        found["skipped"] = [plain(torch.tensor([ids])).logits[0] for ids in PROMPTS]
    before.remove()
    after.remove()
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
