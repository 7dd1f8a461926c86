"""Models with several residual streams, and models of which some layers run only with an image."""

from __future__ import annotations

import warnings

import nnsight
import pytest
import torch

from nnterp import StandardizedTransformer, attach, detach
from nnterp.errors import Unavailable
from nnterp.interventions import (
    Component,
    TargetPrompt,
    activation_patching,
    dictionary_fit,
    feature_report,
    logit_lens,
    logit_lens_table,
    optimize_vector,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    path_patching,
)
from nnterp.nnsight_utils import collect_token_activations_batched, get_token_activations
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced import Dictionary, JumpRelu

STREAMS = ["deepseek_v4", "hy_v4", "gemma3n_text", "prophetnet"]
PROMPTS = [[5, 9, 12, 7, 30], [22, 17, 41], [60, 8, 75, 33]]
RUN = (0, 2)  # the layers of the tiny Mllama that run on a text: cross-attention stands in 1 and 3


@pytest.mark.parametrize("model_type", STREAMS)
def test_the_lens_reads_all_streams_of_a_layer(tiny, model_type):
    """The last layer gives HuggingFace's logits; every layer what the readout gives for its whole stream."""
    model = tiny(model_type)
    found = logit_lens(model, PROMPTS, positions=slice(None))
    last = logit_lens(model, PROMPTS)
    assert found.shape[1] == model.num_layers
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            logits = model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            torch.testing.assert_close(found[i, -1, : len(prompt)], logits.float().softmax(-1))
            torch.testing.assert_close(last[i], found[i, :, len(prompt) - 1])
            assert found[i, :, len(prompt) :].isnan().all()
            with model.trace([prompt]):
                streams = nnsight.save([model.layers_output[layer] for layer in range(model.num_layers)])
            for layer, whole in enumerate(streams):
                read = model.project_on_vocab(whole)[0].float().softmax(-1)
                torch.testing.assert_close(found[i, layer, : len(prompt)], read)


@pytest.mark.parametrize("model_type", STREAMS)
def test_what_is_built_on_the_lens_with_several_streams(tiny, model_type):
    model = tiny(model_type)
    probs = logit_lens(model, PROMPTS)
    table = logit_lens_table(model, PROMPTS, targets=7, positions=-1)
    torch.testing.assert_close(table["target_probs"].squeeze(), probs[:, :, 7])
    torch.testing.assert_close(
        logit_lens(model, PROMPTS, targets=[[[7, 9]]] * 3).squeeze(), probs[:, :, [7, 9]].sum(-1)
    )
    scope = patchscope_lens(model, PROMPTS, TargetPrompt("The cat sat", -1))
    torch.testing.assert_close(scope[:, -1], probs[:, -1])  # the source's last state, where only the readout follows


@pytest.mark.parametrize("model_type", STREAMS)
def test_the_getters_of_1x_count_tokens_and_not_rows(tiny, model_type):
    model = tiny(model_type)
    found = get_token_activations(model, [PROMPTS[0]])
    with torch.no_grad(), model.trace([PROMPTS[0]]):
        stream = model.layers_output[1].save()
    batch = model.readout.layout.batch
    torch.testing.assert_close(found[1], stream.select(batch + 1, -1).movedim(batch, 0))


@pytest.fixture(scope="module")
def mllama():
    return StandardizedTransformer(tiny_model("mllama"), tokenizer=tiny_tokenizer())


CALLS = {
    "logit_lens": lambda m: logit_lens(m, PROMPTS).transpose(0, 1),
    "logit_lens_table": lambda m: logit_lens_table(m, PROMPTS, positions=-1)["entropy"].transpose(0, 1),
    "patchscope_lens": lambda m: patchscope_lens(m, PROMPTS, TargetPrompt("The cat", -1)).transpose(0, 1),
    "patchscope_generate": lambda m: torch.stack(
        list(patchscope_generate(m, PROMPTS, TargetPrompt("The cat", -1), max_new_tokens=2).values())
    ),
    "patch_object_attn_lens": lambda m: patch_object_attn_lens(m, [PROMPTS[0]], PROMPTS, 0).transpose(0, 1),
    "activation_patching": lambda m: activation_patching(m, [PROMPTS[0]], [[5, 9, 13, 7, 30]], lambda lo: lo[:, 3])[
        "scores"
    ].transpose(0, 1),
    "collect": lambda m: m.collect(PROMPTS, "layers_output", positions=-1)["layers_output"],
    "generation": lambda m: m.collect([PROMPTS[0]], "layers_output", max_new_tokens=2)["layers_output"],
    "gradients": lambda m: m.gradients([PROMPTS[0]], lambda lo: lo[:, -1].sum(), "layers_output")["layers_output"],
    "get_token_activations": lambda m: get_token_activations(m, PROMPTS),
    "collect_token_activations_batched": lambda m: collect_token_activations_batched(m, PROMPTS, 2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_layers_that_need_an_image_are_left_out_by_name(mllama, call):
    with pytest.warns(UserWarning, match="Layers 1 and 3 of MllamaForCausalLM run only with an image|Layers 1, 3 of"):
        found = call(mllama)
    assert len(found) == len(RUN)
    assert not found.isnan().any()


def test_numbers_of_the_layers_that_run(mllama):
    kept = {}
    layers = mllama._module.model.layers
    handles = [
        layers[i].register_forward_hook(lambda _module, _given, made, i=i: kept.setdefault(i, made)) for i in RUN
    ]
    with torch.no_grad():
        logits = mllama._module(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        acts = mllama.collect([PROMPTS[0]], "layers_output")
        probs = logit_lens(mllama, [PROMPTS[0]])
        table = logit_lens_table(mllama, [PROMPTS[0]])
    assert acts.layers["layers_output"] == table.labels["layers"] == RUN
    for i, stream in kept.items():
        expected = stream if isinstance(stream, torch.Tensor) else stream[0]
        torch.testing.assert_close(acts["layers_output", i][0], expected[0])
    torch.testing.assert_close(probs[0, -1], logits.softmax(-1))


def transcoder(model):
    w = torch.randn(8, model.hidden_size, generator=torch.Generator().manual_seed(0))
    return Dictionary(w, torch.zeros(8), w, torch.zeros(model.hidden_size), JumpRelu(torch.zeros(8)))


def patched_features(model, at):
    attach(model, transcoder(model), at=at)
    try:
        return activation_patching(model, [PROMPTS[0]], [[5, 9, 13, 7, 30]], lambda lo: lo[:, 3], "features")
    finally:
        detach(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: logit_lens(m, PROMPTS, layers=[1]),
        lambda m: m.collect(PROMPTS, "layers_output", layers=[0, 3]),
        lambda m: patchscope_lens(m, PROMPTS, layers=3),
        lambda m: m.gradients([PROMPTS[0]], lambda lo: lo.sum(), "layers_output", layers=[1]),
        lambda m: optimize_vector(m, [PROMPTS[0]], [7], layer=1),
        lambda m: dictionary_fit(m, transcoder(m), PROMPTS, at="layers_output[1]"),
        lambda m: feature_report(m, transcoder(m), PROMPTS, [0], at="layers_output[1]"),
        lambda m: patched_features(m, "layers_output[1]"),
    ],
)
def test_a_layer_that_needs_an_image_is_refused_when_it_is_asked_for(mllama, call):
    with pytest.raises(Unavailable, match=r"run only with an image.*0 and 2 run on texts|only with an image.*0, 2"):
        call(mllama)


def test_paths_go_around_layers_that_need_an_image(mllama):
    result = path_patching(
        mllama, [PROMPTS[0]], [[5, 9, 13, 7, 30]], [Component("mlps_output", 0)], "logits", lambda lo: lo[:, 3]
    )
    assert result["scores"].isfinite().all()
    assert not torch.equal(result["scores"][:, 0], result["clean"])
