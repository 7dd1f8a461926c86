"""Quantised models are proven and served like any other, and equal plain hooks on the same HuggingFace model."""

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from nnterp import StandardizedTransformer
from nnterp.errors import CertificateError, Unavailable
from nnterp.interventions import (
    activation_patching,
    attribution_patching,
    fit_jacobian_lens,
    logit_lens,
    patchscope_lens,
    repeat_prompt,
)
from nnterp.testing import tiny_checkpoint

CLEAN, CORRUPTED = "The capital of France is", "The capital of Japan is"
LAYERS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}
MATRICES = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}


def torchao(kind):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, kind)())


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**options)


KINDS = {
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "int8-rounded": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "llm-int8": lambda: bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
}
ROUNDED = ("int8-rounded", "llm-int8")  # what a matrix is given is rounded to 8 bits as well
CASES = [("int8", "llama"), ("nf4", "llama"), ("nf4", "gpt2"), ("int8-rounded", "llama"), ("llm-int8", "llama")]


def load(folder, config, **options):
    model = StandardizedTransformer(folder, quantization_config=config, device_map="cpu", **options)
    model.dispatch()
    return model


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def quantised(request, tmp_path_factory):
    """(kind, type, model, the same HuggingFace module for plain hooks)."""
    kind, model_type = request.param
    config = KINDS[kind]()
    folder = tiny_checkpoint(model_type, tmp_path_factory.mktemp("model"))
    model = load(folder, config, enable_attention_probs=True)
    return kind, model_type, model, model._module


def close(kind, actual, expected):
    """Where inputs are rounded too, the last bit of a sum can move a number by a whole step of 8 bits."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (3e-2 if kind in ROUNDED else 1e-5), float(error)


def hooked(module, ids, edits=(), reads=()):
    """Logits, and what some modules return, of a plain forward pass in which `edits` replace outputs."""
    kept, handles = {}, []
    for path, edit in edits:

        def change(_, args, output, edit=edit):
            return edit(output.clone()) if isinstance(output, torch.Tensor) else (edit(output[0].clone()), *output[1:])

        handles.append(module.get_submodule(path).register_forward_hook(change))
    for path in reads:

        def keep(_, args, output, path=path):
            kept[path] = (output if isinstance(output, torch.Tensor) else output[0]).detach().clone()

        handles.append(module.get_submodule(path).register_forward_hook(keep))
    try:
        output = module(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return output.logits, kept


def ids_of(model, text):
    return model.tokenizer(text).input_ids


def test_every_line_holds(quantised):
    _, model_type, model, module = quantised
    assert model.certificate.complete
    assert model.certificate.ok
    matrix = module.get_submodule(MATRICES[model_type].format(0)).weight
    assert type(matrix) is not torch.nn.Parameter or not matrix.is_floating_point(), "nothing is quantised"


def test_values_equal_hooks(quantised):
    kind, model_type, model, module = quantised
    paths = [LAYERS[model_type].format(i) for i in range(4)]
    mlps = [f"{path}.mlp" for path in paths]
    with torch.no_grad():
        logits, kept = hooked(module, ids_of(model, CLEAN), reads=[*paths, *mlps])
    found = model.collect(CLEAN, ["layers_output", "mlps_output", "attention_head_outputs", "logits"])
    close(kind, found["layers_output"], torch.stack([kept[path] for path in paths]))
    close(kind, found["mlps_output"], torch.stack([kept[path] for path in mlps]))
    close(kind, found["logits"], logits)


def test_what_heads_add_is_served_where_it_adds_up(quantised):
    kind, _, model, _ = quantised
    if kind in ROUNDED:
        with pytest.raises(Unavailable, match="rounds what it is given, so heads do not add up"):
            model.collect(CLEAN, "attention_head_contributions")
        return
    found = model.collect(CLEAN, ["attention_head_contributions", "attentions_output"])
    bias = [getattr(model.layers[i].self_attn._module, "c_proj", None) for i in range(4)]
    added = torch.stack([torch.zeros(64) if one is None else one.bias.detach() for one in bias])[:, None, None]
    close(kind, found["attention_head_contributions"].sum(3) + added, found["attentions_output"])


def test_the_lens_reads_what_hooks_read(quantised):
    kind, model_type, model, module = quantised
    with torch.no_grad():
        _, kept = hooked(module, ids_of(model, CLEAN), reads=[LAYERS[model_type].format(i) for i in range(4)])
        norm = module.model.norm if model_type == "llama" else module.transformer.ln_f
        expected = [module.lm_head(norm(state[:, -1])).softmax(-1) for state in kept.values()]
    close(kind, logit_lens(model, CLEAN)[0], torch.cat(expected))


def test_patching_and_steering_equal_hooks(quantised):
    kind, model_type, model, module = quantised
    clean, corrupted = ids_of(model, CLEAN), ids_of(model, CORRUPTED)
    assert len(clean) == len(corrupted)
    path = LAYERS[model_type].format(1)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def patch(position, state):
        def edit(output):
            output[:, position] = state[:, position]
            return output

        return edit

    with torch.no_grad():
        _, kept = hooked(module, clean, reads=[path])
        expected = torch.stack(
            [hooked(module, corrupted, [(path, patch(p, kept[path]))])[0][0, -1, 7] for p in range(len(clean))]
        )
        steered, _ = hooked(module, clean, [(path, lambda output: output + 2 * vector)])
    scores = activation_patching(model, CLEAN, CORRUPTED, lambda logits: logits[:, 7], layers=[1])["scores"][0]
    close(kind, scores, expected)
    with torch.no_grad(), model.trace(CLEAN):
        model.steer(layers=1, steering_vector=vector, factor=2)
        logits = model.logits.save()
    close(kind, logits, steered)


def test_a_patchscope_equals_hooks(quantised):
    kind, model_type, model, module = quantised
    target = repeat_prompt(words=["France", "Japan"])
    ids, at = ids_of(model, target.prompt), target.index_to_patch
    with torch.no_grad():
        path = LAYERS[model_type].format(2)
        _, kept = hooked(module, ids_of(model, CLEAN), reads=[path])

        def put(output):
            output[:, at] = kept[path][:, -1]
            return output

        expected = hooked(module, ids, [(path, put)])[0][0, -1].softmax(-1)
    found = patchscope_lens(model, source_prompts=[CLEAN], target_patch_prompts=target, layers=[2])
    close(kind, found[0, 0], expected)


def test_a_dataset_on_disk_holds_the_same(quantised, tmp_path):
    kind, _, model, _ = quantised
    prompts = [CLEAN, CORRUPTED, "Hello"]
    dataset = model.collect(prompts, "layers_output", positions=-1, to=tmp_path / "data", progress=False)
    expected = model.collect(prompts, "layers_output", positions=-1)["layers_output"]
    for i in range(3):
        close(kind, dataset["layers_output"].prompt(i), expected[:, i])


def test_gradients_equal_autograd_or_are_refused(quantised):
    kind, model_type, model, module = quantised
    if kind == "int8-rounded":
        for call in (
            lambda: model.gradients(CLEAN, lambda logits: logits[0, -1, 7], "layers_output"),
            lambda: attribution_patching(model, CLEAN, CORRUPTED, lambda logits: logits[:, 7]),
            lambda: fit_jacobian_lens(model, [CLEAN, CORRUPTED], skip_first=0, held_out=0.0),
        ):
            with pytest.raises(Unavailable, match="is quantised and hands on no gradient"):
                call()
        return
    path, roots = LAYERS[model_type].format(1), []

    def root(output):
        roots.append(output.detach().requires_grad_())
        return roots[0]

    logits, _ = hooked(module, ids_of(model, CLEAN), [(path, root)])
    (expected,) = torch.autograd.grad(logits[0, -1, 7], roots)
    found = model.gradients(CLEAN, lambda logits: logits[0, -1, 7], "layers_output", layers=[1])
    close(kind, found["layers_output", 1], expected)


def test_it_can_be_compared_with_the_model_that_was_quantised(quantised):
    _, model_type, model, _ = quantised
    with pytest.raises(ValueError, match="its weights are quantised"):
        model.validate(against="float32")
    whole = StandardizedTransformer(model.repo_id)
    whole.dispatch()
    prompts = [ids_of(model, CLEAN)]
    drift = model.validate(against=whole, prompts=prompts).drift
    with torch.no_grad():
        path = LAYERS[model_type].format(3)
        states = [
            hooked(copy.deepcopy(one), prompts[0], reads=[path])[1][path][0] for one in (model._module, whole._module)
        ]
    error = (states[0] - states[1]).double().norm(dim=-1) / states[1].double().norm(dim=-1)
    assert drift.of("layers_output")[3].mean == pytest.approx(float(error.mean()), rel=0.1)
    assert 1e-4 < drift.of("layers_output")[3].mean < 0.5


def test_a_layer_that_looks_at_other_rows_is_refused_by_name(tmp_path):
    """LLM.int8() as it is loaded by default: a large number anywhere in a batch changes every row."""
    config = bitsandbytes(load_in_8bit=True)
    folder = tiny_checkpoint("llama", tmp_path)
    with pytest.raises(CertificateError, match=r"llm_int8_threshold=6.0, so that what it returns at a position"):
        load(folder, config)
    model = load(folder, config, check_renaming=False)
    layer = model._module.model.layers[0].mlp.down_proj
    x = torch.randn(1, 2, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = layer(x.clone())[0, 0]
        x[0, 1, 5] = 50
        assert not torch.equal(layer(x)[0, 0], alone), "the reason for the refusal has gone"


def test_no_proof_of_it_is_kept(quantised):
    from nnterp.proofs._key import why_none

    assert why_none(quantised[2]) == "the model is quantised"
