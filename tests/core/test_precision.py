"""`validate(against=)`: the drift of a model in half precision is what plain hooks on two modules measure."""

import copy

import pytest
import torch
from torch import nn

from nnterp import StandardizedTransformer
from nnterp.certificate import Certificate
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.values import VALUES

IDS = torch.randint(10, 400, (3, 9), generator=torch.Generator().manual_seed(0))
PROMPTS = IDS.tolist()
MODELS = {
    "llama": (torch.bfloat16, "model.layers.{}", "model.layers.{}.mlp"),
    "gpt2": (torch.float16, "transformer.h.{}", "transformer.h.{}.mlp"),
    "gemma2": (torch.bfloat16, "model.layers.{}", "model.layers.{}.mlp"),
    "mixtral": (torch.bfloat16, "model.layers.{}", "model.layers.{}.mlp"),
    "mamba": (torch.bfloat16, "backbone.layers.{}", None),
}


def half(model_type, dtype=torch.bfloat16, **options):
    return StandardizedTransformer(tiny_model(model_type, dtype=dtype), tokenizer=tiny_tokenizer(), **options)


@pytest.fixture(scope="module", params=MODELS)
def measured(request):
    dtype = MODELS[request.param][0]
    model = half(request.param, dtype, enable_attention_probs=request.param in ("llama", "gpt2"))
    weights = {name: tensor.clone() for name, tensor in model._module.state_dict().items()}
    return request.param, model, weights, model.validate(against="float32", prompts=PROMPTS)


def by_hooks(module, path, layers=4):
    """What the module at `path` returns in each layer, by plain forward hooks; and the logits and patterns."""
    kept, handles = [None] * layers, []
    for layer in range(layers):

        def keep(_, args, output, layer=layer):
            kept[layer] = (output if isinstance(output, torch.Tensor) else output[0]).detach().clone()

        handles.append(module.get_submodule(path.format(layer)).register_forward_hook(keep))
    with torch.no_grad():
        output = module(input_ids=IDS, use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    return kept, output


def plain(model):
    """The HuggingFace module in its own precision, and a copy in float32: neither runs in nnsight here."""
    low = copy.deepcopy(model._module)
    return low, copy.deepcopy(low).float()


def figures(mine, its):
    """(mean, worst) by a slow loop over positions."""
    norms = [float(one.double().norm()) for row in its for one in row]
    errors = [
        float((a.double() - b.double()).norm()) / max(float(b.double().norm()), 1e-3 * max(norms))
        for rows in zip(mine, its, strict=True)
        for a, b in zip(*rows, strict=True)
    ]
    return sum(errors) / len(errors), max(errors)


def close(line, expected):
    assert (line.mean, line.worst) == pytest.approx(expected, rel=1e-3), str(line)
    assert expected[0] > 0


def test_values_drift_as_hooks_say(measured):
    name, model, _, certificate = measured
    drift, modules = certificate.drift, plain(model)
    _, stream, mlp = MODELS[name]
    assert certificate.ok
    assert (drift.prompts, drift.positions) == (3, 27)
    for value, path in {"layers_output": stream, "mlps_output": mlp}.items():
        if path is None:
            continue
        (low, _), (high, _) = (by_hooks(module, path) for module in modules)
        assert [line.layer for line in drift.of(value)] == [0, 1, 2, 3]
        for line in drift.of(value):
            close(line, figures(low[line.layer], high[line.layer]))
        mean = [figures(a, b)[0] for a, b in zip(low, high, strict=True)]
        assert drift.worst(value).layer == mean.index(max(mean))


def test_predictions_agree_as_hooks_say(measured):
    name, model, _, certificate = measured
    low, high = (by_hooks(module, MODELS[name][1])[1].logits.double() for module in plain(model))
    same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(low.flatten(0, 1), high.flatten(0, 1), strict=True)]
    assert certificate.drift.agreement == sum(same) / 27
    expected = nn.functional.kl_div(low.log_softmax(-1), high.log_softmax(-1), log_target=True, reduction="sum") / 27
    assert certificate.drift.divergence == pytest.approx(float(expected), rel=1e-3)
    close(certificate.drift.of("logits")[0], figures(low, high))


def test_patterns_drift_as_hooks_say(measured):
    name, model, _, certificate = measured
    if not model.support()["attention_probabilities"]:
        assert name in ("mixtral", "mamba")
        with pytest.raises(KeyError, match="attention_probabilities was not compared"):
            certificate.drift.of("attention_probabilities")
        return
    low, high = (by_hooks(module, MODELS[name][1])[1].attentions for module in plain(model))
    for line in certificate.drift.of("attention_probabilities"):
        of_query = [a[line.layer].transpose(1, 2).flatten(2) for a in (low, high)]
        close(line, figures(*of_query))
    assert all(0 < line.worst < 0.2 for line in certificate.drift.of("attention_scores"))  # masked entries do not count


def test_all_that_the_model_has_is_compared(measured):
    _, model, _, certificate = measured
    without = {"mixer_states", "expert_weights", "expert_outputs", "expert_contributions"}
    served = [name for name, layers in model.support().layers.items() if layers]
    assert list(certificate.drift.values) == [*(name for name in served if name not in without), "logits"]
    assert set(certificate.drift.left_out) == without & set(served)
    for line in certificate.drift.lines:
        assert line.layer is None or VALUES[line.value].per_layer
        assert 0 <= line.mean <= line.worst < 0.6


def test_the_model_is_as_it_was(measured):
    _, model, weights, certificate = measured
    for name, tensor in model._module.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert {p.dtype for p in model._module.parameters()} != {torch.float32}
    assert model.certificate is certificate


def test_experts_that_differ_are_counted():
    """Half of the chosen experts at one position of two."""
    from nnterp.precision import _differing

    mine, its = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[3, 0], [2, 5]])
    assert _differing(mine, its).tolist() == [0, 0.5]


def test_it_prints_saves_and_loads(measured, tmp_path):
    certificate = measured[-1]
    certificate.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == certificate
    text = str(certificate)
    assert "Drift from the same weights in float32, 3 prompts, 27 positions" in text
    for value in certificate.drift.values:
        assert f"  {value} " in text
        assert f">{value}<" in certificate._repr_html_()
    from rich.console import Console

    with (console := Console(width=200)).capture() as shown:
        console.print(certificate)
    assert certificate.drift.values[-1] in shown.get()


def test_another_model_is_compared_with_its_own_weights():
    """The weights' own rounding counts when the reference is the model before it was rounded."""
    exact = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    model = half("llama")
    drift = model.validate(against=exact, prompts=PROMPTS).drift
    (low, _), (high, _) = (by_hooks(copy.deepcopy(one._module), "model.layers.{}") for one in (model, exact))
    for line in drift.of("layers_output"):
        close(line, figures(low[line.layer], high[line.layer]))
    assert drift.of("token_embeddings")[0].mean > 0
    assert drift.against.endswith("LlamaForCausalLM (float32)")


def test_what_cannot_be_compared_is_refused():
    model, exact = half("llama"), StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="it computes in float32 already"):
        exact.validate(against="float32")
    with pytest.raises(ValueError, match="'float32' or a StandardizedTransformer, not 'float64'"):
        model.validate(against="float64")
    with pytest.raises(ValueError, match=r"prompts are for validate\(against"):
        model.validate(prompts=PROMPTS)
    shallow = StandardizedTransformer(tiny_model("llama", num_hidden_layers=3), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="num_layers 3, and this one has 4"):
        model.validate(against=shallow)
    narrow = StandardizedTransformer(tiny_model("llama", intermediate_size=96), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="intermediate_size 96, and this one has"):
        model.validate(against=narrow)
    model._module.config.quantization_config = {"bits": 4}
    with pytest.raises(ValueError, match="its weights are quantised; load the model"):
        model.validate(against="float32")


def test_a_copy_that_does_not_fit_is_refused(monkeypatch):
    model = half("llama")
    monkeypatch.setattr("nnterp.memory.free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="A copy of the weights in float32 would take"):
        model.validate(against="float32")
