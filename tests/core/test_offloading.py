"""A model of which a part is kept on disk or in memory and brought in layer by layer is served like any other."""

import tempfile

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from nnterp import StandardizedTransformer
from nnterp.identity import checksum
from nnterp.interventions import (
    Component,
    TargetPrompt,
    ablate,
    activation_patching,
    attribution_patching,
    components,
    direct_logit_attribution,
    edge_attribution,
    fit_jacobian_lens,
    head_scores,
    logit_difference,
    logit_lens,
    patchscope_lens,
    path_patching,
    value_weighted_attention,
)
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer
from nnterp.values import VALUES

PROMPT, OTHER = "The capital of France is", "The capital of Japan is"
METRIC = logit_difference(7, 9)
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}
VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(0))


def on_disk(folder, model_type):
    """Half of the layers and the final norm on disk, as `from_pretrained` places them."""
    module = tiny_model(model_type)
    layers = LAYERS[model_type]
    far = (f"{layers}.1", f"{layers}.2", *(path for path in ("model.norm", "transformer.ln_f") if has(module, path)))
    every = {path for path, inner in module.named_modules() if path and not list(inner.children())}
    placed = dict.fromkeys(far, "disk")  # first, where transformers' pipeline looks for the device of its inputs
    placed |= {path: "cpu" for path in sorted(every - set(far)) if not path.startswith(f"{layers}.")}
    placed |= {f"{layers}.{i}": "cpu" for i in range(4) if f"{layers}.{i}" not in placed}
    options = {"device_map": placed, "offload_folder": tempfile.mkdtemp(dir=folder.parent)}
    return StandardizedTransformer(folder, enable_attention_probs=True, **options)


def in_memory(folder, model_type):
    """Every weight in memory apart from the module, brought in by accelerate's hooks, which know no device map."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer(), enable_attention_probs=True)


def has(module, path):
    return any(name == path for name, _ in module.named_modules())


CASES = {
    "llama on disk": (on_disk, "llama"),
    "gpt2 on disk": (on_disk, "gpt2"),
    "llama in memory": (in_memory, "llama"),
}


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    place, model_type = CASES[request.param]
    folder = tiny_checkpoint(model_type, tmp_path_factory.mktemp("model") / "checkpoint")
    offloaded = place(folder, model_type)
    offloaded.dispatch()
    module = AutoModelForCausalLM.from_pretrained(folder)
    whole = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    assert any(p.device.type == "meta" for p in offloaded._module.parameters()), "nothing was offloaded"
    assert not any(p.device.type == "meta" for p in whole._module.parameters())
    return offloaded, whole


def test_every_line_holds(both):
    certificate = both[0].certificate
    assert certificate.complete
    assert all(line.status == "passed" for line in certificate.lines if "checkpoint" not in line.name)
    assert certificate.device == "cpu"


def test_every_value_is_the_same(both):
    offloaded, whole = both
    for name, value in VALUES.items():
        layers = whole.support()[name]
        assert offloaded.support()[name] == layers
        if not layers or not value.per_layer:
            continue
        found = []
        for model in both:
            with torch.no_grad(), model.trace(PROMPT):
                found.append(getattr(model, name)[2].save())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}")


def steered(model):
    with torch.no_grad(), model.trace(PROMPT):
        model.steer(layers=2, steering_vector=VECTOR, factor=2)
        logits = model.logits.save()
    return logits


def standing(model):
    with model.steering(VECTOR, layers=2):
        return model.collect(PROMPT, "logits")["logits"]


def gradients(model):
    found = model.gradients([PROMPT, OTHER], lambda logits: logits[:, -1, 7].sum(), ["layers_output", "mlp_neurons"])
    return torch.cat([found["layers_output"].flatten(), found["mlp_neurons"].flatten()])


def to_disk(model):
    folder = tempfile.mkdtemp()
    return model.collect([PROMPT, "Hello"], "layers_output", to=f"{folder}/data", progress=False)[
        "layers_output", 2
    ].tensor()


def patchscope(model):
    target = TargetPrompt(OTHER, index_to_patch=-1)
    return patchscope_lens(model, source_prompts=[PROMPT], target_patch_prompts=target)


CALLS = {
    "collect": lambda m: m.collect([PROMPT, "Hello"], "attention_head_contributions")["attention_head_contributions"],
    "to disk": to_disk,
    "generation": lambda m: m.collect(PROMPT, "layers_output", max_new_tokens=4, do_sample=False)["layers_output"],
    "projection": lambda m: m.project_on_vocab(VECTOR).detach(),
    "logit lens": lambda m: logit_lens(m, [PROMPT, "Hello"]),
    "Jacobian lens": lambda m: torch.stack(
        [*fit_jacobian_lens(m, [PROMPT, OTHER], skip_first=0, held_out=0.0).weights.values()]
    ),
    "patching": lambda m: activation_patching(m, PROMPT, OTHER, METRIC, ["layers_output", "mlp_neurons"])["scores"],
    "path patching": lambda m: (
        path_patching(m, PROMPT, OTHER, Component("attention_head_outputs", 0, 0), "logits", METRIC).values
    ),
    "ablation": lambda m: ablate(m, PROMPT, components(m, "mlps_output"), metric=METRIC).values,
    "attribution": lambda m: attribution_patching(m, PROMPT, OTHER, METRIC).values,
    "direct attribution": lambda m: direct_logit_attribution(m, PROMPT, [[7]]).values,
    "circuit": lambda m: edge_attribution(m, PROMPT, OTHER, METRIC).scores.detach(),
    "heads": lambda m: head_scores(m, "induction").values,
    "weighted attention": lambda m: value_weighted_attention(m, [PROMPT]).values,
    "patchscope": patchscope,
    "steering": steered,
    "standing steering": standing,
    "gradients": gradients,
    "frozen gradients": lambda m: m.gradients(
        PROMPT, lambda logits: logits[0, -1, 7], "layers_output", frozen=("patterns", "norms", "gates")
    )["layers_output"],
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_give_the_same(both, name):
    found, expected = (CALLS[name](model) for model in both)
    assert expected.nan_to_num().any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_its_identity_is_that_of_its_weights(both):
    """What goes on from a dataset or a partial result compares weights, offloaded ones too."""
    offloaded, whole = both
    assert checksum(offloaded._module) == checksum(whole._module)
    with torch.no_grad():
        own = next(iter(whole._module.parameters())).view(-1)[:1]
        own += 1
        assert checksum(offloaded._module) != checksum(whole._module)
        own -= 1


def test_an_offloaded_weight_counts(both):
    module = both[0]._module
    path, inner = next((p, m) for p, m in module.named_modules() if any(q.is_meta for q in m.parameters(recurse=False)))
    name = next(name for name, p in inner.named_parameters(recurse=False) if p.is_meta)
    kept, before = inner._hf_hook.weights_map, checksum(module)
    inner._hf_hook.weights_map = {name: kept[name] + 1}
    try:
        assert checksum(module) != before, path
    finally:
        inner._hf_hook.weights_map = kept


def test_what_it_cannot_do_is_refused(both):
    with pytest.raises(ValueError, match="some of its weights are offloaded; load the model"):
        both[0].validate(against="float32")


def test_weights_that_nothing_brings_in_are_named():
    module = tiny_model("llama").to("meta")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM at model.embed_tokens are on the meta device"):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer())
