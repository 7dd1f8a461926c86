"""Path patching against plain torch hooks on what each part adds to the stream, named module by module."""

from __future__ import annotations

import contextlib

import pytest
import torch

from nnterp.errors import Unavailable
from nnterp.interventions import Component, path_patching

# Type → the layers, and in each layer the modules that end the attention and the MLP, and the one that the MLP begins
# with. Further modules that add to the stream follow. BLOOM's and MPT's attention and MLP add the stream themselves.
PARTS = {
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    "mpt": ("transformer.blocks", "attn.out_proj", "ffn.down_proj", "ffn.up_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj", "mlp.c_fc"),
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "falcon": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "cohere": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gemma2": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gemma3_text": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gemma4_text": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp", "post_per_layer_input_norm"),
    "granite": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "minicpm3": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2", "fc1"),
    "openai-gpt": ("transformer.h", "attn.c_proj", "mlp.c_proj", "mlp.c_fc"),
}
CLEAN, CORRUPTED = [5, 9, 12, 7, 30, 22, 17], [5, 9, 40, 7, 30, 33, 17]
EVERY = slice(None)
OTHER_CLEAN = [
    *CLEAN[:-1],
    61,
]  # ends with another token, so that a parallel block's MLP is another at the last position


class Slow:
    """Runs of the HuggingFace module in which outputs of modules are recorded or replaced."""

    def __init__(self, model, model_type):
        self.module, (self.layers, *self.ends, self.entry) = model._module, PARTS[model_type][:4]
        self.ends += PARTS[model_type][4:]
        self.heads, self.count = model.num_heads, model.num_layers

    def path(self, layer, name):
        return f"{self.layers}.{layer}.{name}"

    def all_parts(self):
        return [self.path(layer, name) for layer in range(self.count) for name in self.ends]

    @torch.no_grad()
    def run(self, ids, outputs=(), inputs=()):
        """Logits `[vocab]`; `outputs` and `inputs` are (path, function of `[seq, ...]` or None to keep it)."""
        with contextlib.ExitStack() as stack:
            for path, function in outputs:

                def after(_, args, output, function=function):
                    new = function(output.reshape(len(ids), -1))
                    return None if new is None else new.reshape(output.shape)

                stack.callback(self.module.get_submodule(path).register_forward_hook(after).remove)
            for path, function in inputs:

                def before(_, args, function=function):
                    new = function(args[0].reshape(len(ids), -1))
                    return None if new is None else (new.reshape(args[0].shape), *args[1:])

                stack.callback(self.module.get_submodule(path).register_forward_pre_hook(before).remove)
            return self.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()

    def recorded(self, ids, outputs=(), inputs=()):
        kept = {}
        self.run(
            ids,
            [(path, lambda x, p=path: kept.__setitem__(p, x.clone())) for path in outputs],
            [(path, lambda x, p=path: kept.__setitem__(("in", p), x.clone())) for path in inputs],
        )
        return kept

    def effect(self, into, source, sender, receiver):
        """Logits when `sender` (layer, index of its end, head, positions) is sent to `receiver` ("logits", ...)."""
        layer, end, head, at = sender
        path = self.path(layer, self.ends[end])
        given, own = self.recorded(source, [path], [path]), self.recorded(into, self.all_parts())

        def sent(x, new):
            x = x.clone()
            width = x.shape[1] // self.heads
            where = (at, EVERY if head is None else slice(head * width, (head + 1) * width))
            x[where] = new[where]
            return x

        arrived = {}
        outputs, inputs = [], []
        last = self.path(self.count - 1, self.ends[1])
        if receiver == "mlps_output":
            outputs.append((last, lambda x: arrived.__setitem__("x", x.clone())))
        if receiver == "mlps_input":
            inputs.append((self.path(self.count - 1, self.entry), lambda x: arrived.__setitem__("x", x.clone())))
        if head is None:
            outputs.append((path, lambda x: sent(x, given[path])))
        else:
            inputs.append((path, lambda x: sent(x, given["in", path])))
        outputs += [(part, lambda x, p=part: own[p]) for part in self.all_parts() if part != path]
        logits = self.run(into, outputs, inputs)
        if receiver == "logits":
            return logits
        put = (lambda x: arrived["x"],)
        if receiver == "mlps_output":
            return self.run(into, [(last, *put)])
        return self.run(into, [], [(self.path(self.count - 1, self.entry), *put)])


def scores(model, senders, receivers, metric):
    return path_patching(model, [OTHER_CLEAN], [CORRUPTED], senders, receivers, metric)["scores"][0]


@pytest.mark.parametrize("model_type", PARTS)
def test_what_is_sent_held_and_received_are_contributions(tiny, model_type):
    model = tiny(model_type)
    slow, last = Slow(model, model_type), model.num_layers - 1
    readout = torch.randn(model.vocab_size, generator=torch.Generator().manual_seed(0))

    def metric(logits):
        return logits.float() @ readout

    senders = [
        (Component("attention_head_outputs", 0, 0), (0, 0, 0, EVERY)),
        (Component("mlps_output", 0), (0, 1, None, EVERY)),
        (Component("mlp_contributions", 0), (0, 1, None, EVERY)),
        (Component("attentions_output", 0, positions=-1), (0, 0, None, -1)),
        (Component("mixer_contributions", 1), (1, 0, None, EVERY)),
    ]
    targets = {
        "logits": "logits",
        "mlps_input": Component("mlps_input", last),
        "mlps_output": Component("mlps_output", last),
        "mlp_contributions": Component("mlp_contributions", last),
    }
    unpatched = metric(slow.run(CORRUPTED))
    for name, receivers in targets.items():
        found = scores(model, [component for component, _ in senders], receivers, metric)
        kind = name.replace("contributions", "output").replace("mlp_", "mlps_")
        expected = torch.stack([metric(slow.effect(CORRUPTED, OTHER_CLEAN, sender, kind)) for _, sender in senders])
        torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max().clamp(min=1)), rtol=1e-3)
        assert ((found - unpatched).abs() > 1e-3).all(), name


def test_figures_of_a_tiny_bloom(tiny):
    model = tiny("bloom")
    readout = torch.randn(model.vocab_size, generator=torch.Generator().manual_seed(0))
    senders = [Component("attention_head_outputs", 0, 0), Component("mlps_output", 0)]
    found = path_patching(model, [CLEAN], [CORRUPTED], senders, "logits", lambda logits: logits.float() @ readout)
    torch.testing.assert_close(found["scores"][0], torch.tensor([32.448, 40.522]), atol=1e-3, rtol=0)
    assert found.labels["senders"] == ("attention_head_outputs[0] head 0", "mlps_output[0]")


def test_a_part_that_writes_into_another_one_sends_nothing(tiny):
    model = tiny("zamba")
    layer = next(block.index for block in model.anatomy.blocks if block.self_attn is not None)
    for value in ("attention_head_outputs", "attentions_output", "mlps_output"):
        with pytest.raises(Unavailable, match=f"Layer {layer} of Zamba.* has no (attention|mlp)_contributions"):
            path_patching(model, [CLEAN], [CORRUPTED], Component(value, layer), "logits", lambda x: x[:, 0])


def test_layers_whose_sum_is_unknown_are_refused(tiny):
    model = tiny("deepseek_v4")
    with pytest.raises(Unavailable, match=r"contributions|held"):
        path_patching(model, [CLEAN], [CORRUPTED], Component("mlps_output", 0), "logits", lambda x: x[:, 0])
