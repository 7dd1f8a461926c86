"""The certificate refuses no sound model: with weights that are zero, adapters, or quantised weights."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nnterp import RenameConfig, StandardizedTransformer
from nnterp.certificate import PARTS
from nnterp.errors import RenamingError
from nnterp.testing import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import mutations

ARCHITECTURES = (
    "llama gpt2 gemma2 olmo2 gpt_neox phi bloom falcon mixtral qwen3 cohere granite opt mamba jamba deepseek_v3"
).split()
IDS = torch.arange(5, 13)[None]


def loaded(module, **options):
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer(), **options)


def linears(module):
    """(path, module) of every matrix below the layers, whatever it is made of."""
    return [
        (path, inner)
        for path, inner in module.named_modules()
        if isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D"
    ]


def last_matrix(module, part):
    """The last matrix in a part: what it returns is what the part adds."""
    return [inner for path, inner in linears(module) if path.startswith(f"{part.exit}.")][-1]


def replace(module, path, new):
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)


class Lora(nn.Module):
    """A low-rank adapter around a matrix; its second factor begins at zero."""

    def __init__(self, base):
        super().__init__()
        weight = base.weight.T if type(base).__name__ == "Conv1D" else base.weight
        self.base_layer = base
        self.lora_A = nn.Linear(weight.shape[1], 4, bias=False)
        self.lora_B = nn.Linear(4, weight.shape[0], bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Quantised(nn.Module):
    """A matrix of 8-bit integers with a scale for each row, and no `weight`."""

    def __init__(self, base):
        super().__init__()
        weight = (base.weight.T if type(base).__name__ == "Conv1D" else base.weight).detach()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        self.register_buffer("rows", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.rows.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_parts_whose_weights_are_zero_are_no_wrong_maps(model_type):
    whole = loaded(tiny_model(model_type))
    module = tiny_model(model_type)
    silenced = [layer.mixer for layer in whole.anatomy.blocks[:2]] + [layer.mlp for layer in whole.anatomy.blocks[1:3]]
    with torch.no_grad():
        for part in silenced:
            if part is not None and any(path.startswith(f"{part.exit}.") for path, _ in linears(module)):
                for parameter in last_matrix(module, part).parameters():
                    parameter.zero_()
    before = {name: (parameter, parameter.clone()) for name, parameter in module.named_parameters()}
    model = loaded(module)
    assert model.certificate.ok
    assert "all zero" in model.certificate[PARTS].detail
    assert model.support().layers == whole.support().layers
    for name, parameter in module.named_parameters():  # the model's own weights were put back
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "olmo2", "mixtral"])
def test_a_layer_of_zeros_adds_nothing(model_type):
    module = tiny_model(model_type)
    path = loaded(tiny_model(model_type)).anatomy.blocks[1].path
    with torch.no_grad():
        for parameter in module.get_submodule(path).parameters():
            parameter.zero_()
    model = loaded(module)
    added = model.collect(IDS, ["layers_input", "layers_output", "mlp_contributions"], layers=[1], progress=False)
    assert torch.equal(added["layers_input"], added["layers_output"])
    assert not added["mlp_contributions"].any()


def test_a_zero_gate_is_read_as_zero():
    class Gated(LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
            return hidden_states + self.gate * self.mlp(self.post_attention_layernorm(hidden_states))

    module = tiny_model("llama")
    module.model.layers[1].__class__ = Gated
    module.model.layers[1].gate = nn.Parameter(torch.zeros(()))
    model = loaded(module)
    assert model.certificate.ok
    with torch.no_grad(), model.trace(IDS):
        made = model.mlps_output[1].save()
        added = model.mlp_contributions[1].save()
    assert made.abs().max() > 0.1
    assert not added.any()
    with torch.no_grad():
        module.model.layers[1].gate.fill_(0.5)
    with pytest.warns(UserWarning, match="gate, a learned factor, was edited"), torch.no_grad():
        added = model.collect(IDS, ["mlp_contributions", "mlps_output"], layers=[1], progress=False)
    torch.testing.assert_close(added["mlp_contributions"], 0.5 * added["mlps_output"])


@pytest.mark.parametrize("role", ["mlp", "self_attn"])
def test_a_module_that_returns_zeros_is_no_wrong_map(role):
    class Zeros(nn.Module):
        def forward(self, x=None, hidden_states=None, **kwargs):
            zeros = torch.zeros_like(x if x is not None else hidden_states)
            return zeros if role == "mlp" else (zeros, None)

    module = tiny_model("llama")
    setattr(module.model.layers[1], role, Zeros())
    model = loaded(module)
    value = "mlp_contributions" if role == "mlp" else "attention_contributions"
    assert model.support()[value] == (0, 2, 3)
    assert "returned zeros alone" in model.support().reasons[value][1]


def test_probabilities_are_proven_where_the_output_projection_is_zero():
    module = tiny_model("llama")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model = loaded(module, enable_attention_probs=True)
    model.attention_probabilities.check_source()


@pytest.mark.parametrize("wrapper", [Lora, Quantised])
@pytest.mark.parametrize("model_type", [t for t in ARCHITECTURES if t not in ("mamba", "jamba")])
def test_adapters_and_quantised_weights_raise_no_alarm(model_type, wrapper):
    module = tiny_model(model_type)
    for path, inner in linears(module):
        if not path.endswith(("router", "gate")):  # functions read a router's weight
            replace(module, path, wrapper(inner).eval())
    model = loaded(module)
    assert model.certificate.ok
    assert model.vocab_size == module(input_ids=IDS).logits.shape[-1]
    support = model.support()
    with torch.no_grad():
        for name, layers in support.layers.items():  # what is listed can be read
            if layers and layers != (-1,):
                model.collect(IDS, name, layers=[layers[-1]], progress=False)
        if layers := support["attention_head_contributions"]:
            with model.trace(IDS):
                heads = model.attention_head_contributions[layers[-1]].save()
                made = model.attentions_output[layers[-1]].save()
            out = model.facts.inside.attention[layers[-1]].out
            bias = (
                module.get_submodule(out)(heads.new_zeros(1, 1, module.get_submodule(out).in_features))
                if (wrapper is Quantised)
                else 0
            )
            if model_type != "bloom":  # adds the stream in its attention
                torch.testing.assert_close(heads.sum(2) + bias, made, rtol=1e-4, atol=1e-4)


def test_one_scale_for_all_positions_is_refused_as_such():
    """torch's dynamic quantisation rounds a whole batch by one scale, so a position changes what the others get."""
    try:
        module = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8)
        module(input_ids=IDS)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"torch cannot quantise dynamically here: {error}")
    with pytest.raises(RenamingError, match="moves information between positions"):
        loaded(module)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_wrong_maps_of_a_model_with_zeros_are_refused(model_type):
    module = tiny_model(model_type)
    right = loaded(module)
    with torch.no_grad():
        last_matrix(module, right.anatomy.blocks[1].mlp).weight.zero_()
        last_matrix(module, right.anatomy.blocks[2].mixer).weight.zero_()
    block = right.anatomy.blocks[0]
    attention, mlp = (part.path.removeprefix(f"{block.path}.") for part in (block.self_attn, block.mlp))
    mutations.decoys(module, right)
    wrong = [
        RenameConfig(attn_name=mlp, mlp_name=attention),
        *(RenameConfig(layers_name=f"decoy_{how}") for how in ("shifted", "short", "reversed", "copied", "single")),
        RenameConfig(lm_head_name="decoy_head"),
        RenameConfig(ln_final_name="decoy_norm"),
        *(
            RenameConfig(mlp_name=name)
            for name, _ in module.get_submodule(block.path).named_modules()
            if name
            not in (
                "",
                mlp,
            )
        ),
    ]
    for config in wrong:
        with pytest.raises(RenamingError):
            loaded(module, rename_config=config)
    assert loaded(module).certificate.ok
