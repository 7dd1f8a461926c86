"""A slow and plain reference of attribution graphs: HuggingFace's modules with torch hooks, one target at a time.

Feed-forwards return leaves, patterns are constants, and every norm is the linear map that it is at its own scale. The
formulas of transcoders stand here again.
"""

from __future__ import annotations

import contextlib
from functools import cache
from unittest import mock

import torch

from nnterp.interventions import attribution_graph
from nnterp.traced import Activation, Dictionary

# Type → layers, the feed-forward in a layer (its input is what transcoders read), what it adds to the stream if that is
# not what it returns, the last norm, the head.
BUILDS = {
    "gpt2": ("transformer.h", "mlp", "", "transformer.ln_f", "lm_head"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "", "gpt_neox.final_layer_norm", "lm_head"),
    "falcon": ("transformer.h", "mlp", "", "transformer.ln_f", "lm_head"),
    "bloom": ("transformer.h", "mlp", "dense_4h_to_h", "transformer.ln_f", "lm_head"),
    "phi": ("model.layers", "mlp", "", "model.final_layernorm", "lm_head"),
    **dict.fromkeys(
        ("llama", "gemma2", "gemma3_text", "qwen3", "mixtral", "olmo2", "granite", "cohere"),
        ("model.layers", "mlp", "", "model.norm", "lm_head"),
    ),
}


def encoded(transcoder, x):
    """Pre-activations of a transcoder."""
    return (x - transcoder.input_bias) @ transcoder.encoder.T + transcoder.encoder_bias


def norm_at_its_scale(module, args, output):
    """The linear map that a norm is at its scale."""
    x = args[0]
    bias = getattr(module, "bias", None)
    own = output if bias is None else output - bias
    centred = x - x.mean(-1, keepdim=True) if "layer" in type(module).__name__.lower() else x
    line = centred * (own / centred).detach()
    return line if bias is None else line + bias


@contextlib.contextmanager
def still(module):
    """Patterns and scales are constants in the backward pass."""
    softmax, sdpa = torch.nn.functional.softmax, torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, **kwargs):
        return sdpa(query.detach(), key.detach(), value, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch.nn.functional, "softmax", lambda *a, **k: softmax(*a, **k).detach())
        )
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        for inner in module.modules():
            if "norm" in type(inner).__name__.lower():
                stack.callback(inner.register_forward_hook(norm_at_its_scale).remove)
        yield


class Slow:
    """One prompt of a model with transcoders `{layer: transcoder}`.

    Attributes:
        x: What each transcoder reads, in the graph of gradients.
        leaves: What takes the place of each feed-forward's output.
        begin: The stream entering the first layer.
    """

    def __init__(self, model, model_type, transcoders, ids):
        self.transcoders, module = transcoders, model._module
        layers, mlp, inner, _, head = BUILDS[model_type]
        self.x, self.leaves = {}, {}
        blocks = module.get_submodule(layers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(still(module))

            def entering(_, args, kwargs):
                old = args[0] if args else kwargs["hidden_states"]
                self.begin = old.detach().clone().requires_grad_(True)
                return ((self.begin, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.begin})

            stack.callback(blocks[0].register_forward_pre_hook(entering, with_kwargs=True).remove)
            for layer, block in enumerate(blocks):
                part = block.get_submodule(mlp)

                def given(_, args, layer=layer):
                    self.x[layer] = args[0]

                def returned(_, args, output, layer=layer):
                    out = output[0] if isinstance(output, tuple) else output
                    leaf = self.leaves[layer] = out.detach().clone().requires_grad_(True)
                    new = leaf
                    if transcoders[layer].skip is not None:
                        line = self.x[layer] @ transcoders[layer].skip.T
                        new = leaf + line - line.detach()
                    return (new, *output[1:]) if isinstance(output, tuple) else new

                stack.callback(part.register_forward_pre_hook(given).remove)
                stack.callback((part.get_submodule(inner) if inner else part).register_forward_hook(returned).remove)
            capped = []
            stack.callback(
                module.get_submodule(head).register_forward_hook(lambda m, a, output: capped.append(output)).remove
            )
            module(input_ids=torch.tensor([ids]), use_cache=False)
        config = module.config
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
        self.logits = capped[0][0, -1] * scale

    def pre_activation(self, layer, position, feature):
        return encoded(self.transcoders[layer], self.x[layer])[0, position, feature]

    def logit(self, token):
        return self.logits[token] - self.logits.mean()

    def features(self):
        """Activations of all features, `[seq, features]` by layer."""
        return {layer: encoded(own, self.x[layer])[0].detach().relu() for layer, own in self.transcoders.items()}

    def errors(self):
        found = {}
        for layer, own in self.transcoders.items():
            made = self.features()[layer] @ own.decoder + own.decoder_bias
            if own.skip is not None:
                made = made + self.x[layer][0].detach() @ own.skip.T
            found[layer] = self.leaves[layer][0].detach() - made
        return found

    def effects(self, target):
        """The direct effect of every source on a target: (kind, layer, position, feature) → number."""
        roots = [self.begin, *(self.leaves[layer] for layer in self.leaves)]
        slopes = torch.autograd.grad(target, roots, retain_graph=True, allow_unused=True)
        slopes = [torch.zeros_like(root) if s is None else s for root, s in zip(roots, slopes, strict=True)]
        found = {
            ("embedding", None, position): float(slopes[0][0, position] @ self.begin[0, position].detach())
            for position in range(self.begin.shape[1])
        }
        activations, errors = self.features(), self.errors()
        for layer, slope in zip(self.leaves, slopes[1:], strict=True):
            along = slope[0] @ self.transcoders[layer].decoder.T * activations[layer]
            for position, feature in activations[layer].nonzero().tolist():
                found["feature", layer, position, feature] = float(along[position, feature])
            for position, error in enumerate(errors[layer]):
                found["error", layer, position] = float(slope[0, position] @ error)
        return found


IDS = [5, 9, 12, 7, 30, 22, 17]


def transcoders_of(model, features=20, seed=0, skip=False, activation=Activation):
    """Random transcoders of every feed-forward."""
    generator = torch.Generator().manual_seed(seed)
    width = model.hidden_size

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    return {
        layer: Dictionary(
            random(features, width, scale=width**-0.5),
            random(features, scale=0.3),
            random(features, width, scale=0.3),
            random(width, scale=0.1),
            activation(),
            input_bias=random(width, scale=0.1),
            skip=random(width, width, scale=0.5 * width**-0.5) if skip else None,
            reads=f"mlps_input[{layer}]",
        )
        for layer in range(model.num_layers)
    }


@cache
def whole(model):
    """The graph of one model, with skip transcoders, made once."""
    return attribution_graph(model, transcoders_of(model, skip=True), IDS, progress=False)


def parts_of(own):
    return own.encoder, own.encoder_bias, own.decoder, own.decoder_bias, own.activation, own.input_bias
