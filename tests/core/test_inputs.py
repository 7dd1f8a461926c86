"""Prompts have one way in: what is no text and no token id is refused, and padding is seen."""

import copy
import warnings

import numpy as np
import pytest
import torch

import nnterp
from nnterp import ModuleAccessor, StandardizedTransformer, nnsight_utils
from nnterp.errors import TrainingModeError
from nnterp.inputs import encode
from nnterp.interventions import TargetPrompt, activation_patching, logit_lens
from nnterp.prompts import next_token_probs
from nnterp.testing import tiny_model, tiny_tokenizer

PROMPT = "The capital of France is"


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7],
        (5, 6, 7),
        torch.tensor([5, 6, 7]),
        np.array([5, 6, 7]),
        [np.int64(5), 6, 7],
        torch.tensor([[5, 6, 7]]),
    ],
)
def test_token_ids_of_every_kind(tiny, ids):
    assert [row.ids for row in encode(tiny("llama"), ids)] == [(5, 6, 7)]


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        (b"Hello", TypeError),
        ([b"Hello"], TypeError),
        (torch.tensor([1.7, 2.9]), TypeError),
        (np.array([[1.5, 2.5]]), TypeError),
        (torch.tensor([True, False]), TypeError),
        ([True, False], TypeError),
        ([3.7, 4.0], TypeError),
        ([[3.7]], TypeError),
        ([1 + 2j], TypeError),
        ([5, -1], ValueError),
        ([5, 10_000], ValueError),
        (torch.tensor([5, 10_000]), ValueError),
        ([None], TypeError),
        (7, TypeError),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        encode,
        lambda m, p: m.collect(p, "layers_output"),
        lambda m, p: m.gradients(p, lambda logits: logits.sum(), "layers_output"),
        logit_lens,
        next_token_probs,
    ],
)
def test_what_is_no_prompt_is_refused(tiny, function, prompts, error):
    with pytest.raises(error):
        function(tiny("llama"), prompts)


def test_targets_are_tokens_and_each_counts_once(tiny):
    model = tiny("llama")
    plain = logit_lens(model, PROMPT)
    once = logit_lens(model, PROMPT, targets=[[[7, 7, 9]]])
    torch.testing.assert_close(once[..., 0], plain[..., 7] + plain[..., 9])
    for wrong in ([[[1.7]]], [[[True]]], [[b"x"]], torch.tensor([[0.5]])):
        with pytest.raises(TypeError):
            logit_lens(model, PROMPT, targets=wrong)
    with pytest.raises(TypeError):
        TargetPrompt("text", 1.7)


def test_padded_ids_without_a_mask_are_warned_of(tiny):
    model = tiny("llama")
    padded = torch.tensor([[5, 6, 7], [0, 5, 6]])
    with pytest.warns(UserWarning, match="attention mask"):
        encode(model, padded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(model, torch.tensor([[5, 6, 7], [8, 5, 6]]))
        rows = encode(model, {"input_ids": padded, "attention_mask": (padded != 0).long()})
    assert [row.ids for row in rows] == [(5, 6, 7), (5, 6)]


def test_rendered_chat_text_with_a_second_bos_is_warned_of():
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="another in front"):
        encode(model, "<bos>Hello")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(model, "Hello")


def test_padding_on_the_right_is_seen_by_the_mask_that_was_given(toy):
    tokenizer = copy.deepcopy(toy.tokenizer)
    tokenizer.padding_side = "right"
    texts = ["The Eiffel Tower is in the city of", PROMPT]
    right = tokenizer(texts, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="Pad on the left"), torch.no_grad(), toy.trace(right):
        toy.next_token_probs.save()
    with torch.no_grad(), toy.trace(texts):
        probs = toy.next_token_probs.save()
    with torch.no_grad():
        alone = toy._module(**toy.tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].softmax(-1)
    torch.testing.assert_close(probs[1], alone, atol=1e-4, rtol=1e-4)


def test_the_side_that_was_chosen_outlives_the_loading_of_weights():
    model = StandardizedTransformer(nnterp.toy_checkpoint(), tokenizer_kwargs={"padding_side": "right"})
    assert model.tokenizer.padding_side == "right"
    model.dispatch()
    assert model.tokenizer.padding_side == "right"
    model = StandardizedTransformer(nnterp.toy_checkpoint())
    model.tokenizer.padding_side = "right"
    model.dispatch()
    assert model.tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    "function",
    [
        lambda m: m.collect(PROMPT, "layers_output"),
        lambda m: m.gradients(PROMPT, lambda logits: logits.sum(), "layers_output"),
        lambda m: logit_lens(m, PROMPT),
        lambda m: next_token_probs(m, PROMPT),
        lambda m: activation_patching(m, PROMPT, PROMPT, lambda logits: logits[:, 5]),
        lambda m: nnsight_utils.get_token_activations(m, [PROMPT]),
        lambda m: nnsight_utils.collect_last_token_activations_session(m, [PROMPT], 1),
        lambda m: nnsight_utils.compute_next_token_probs(m, PROMPT),
    ],
)
def test_a_model_that_drops_units_out_is_refused(function):
    module = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    function(model)
    module.train()
    with pytest.raises(TrainingModeError, match=r"\.eval\(\)"):
        function(model)
    module.eval()
    function(model)


def test_training_mode_without_dropout_is_no_harm():
    model = StandardizedTransformer(tiny_model("llama").train(), tokenizer=tiny_tokenizer())
    model.collect(PROMPT, "layers_output")


def test_a_negative_layer_counts_from_the_models_last(tiny):
    model = tiny("llama")
    found = model.gradients(PROMPT, lambda logits: logits.sum(), "layers_output", layers=[0, 1])
    with pytest.raises(KeyError, match="Layer -1"):
        found["layers_output", -1]
    assert torch.equal(found["layers_output", -3], found["layers_output", 1])


def test_copies_are_refused_with_the_cure(tiny):
    model = tiny("llama")
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="StandardizedTransformer"):
            copied(model)
    other = StandardizedTransformer(copy.deepcopy(model._module), tokenizer=model.tokenizer)
    with torch.no_grad(), model.trace(PROMPT):
        mine = model.logits.save()
    with torch.no_grad(), other.trace(PROMPT):
        its = other.logits.save()
    assert torch.equal(mine, its)


def test_a_module_accessor_can_be_copied():
    accessor = ModuleAccessor(tiny_model("gpt2"))
    assert copy.copy(accessor).layers is accessor.layers
    assert copy.deepcopy(accessor).layers[0] is not accessor.layers[0]


@pytest.mark.parametrize(
    "function",
    [lambda x: x.mean(1), lambda x: x.amax(1), lambda x: x.abs(), lambda x: x.flatten(1).norm(dim=1)],
)
@pytest.mark.parametrize("name", ["layers_output", "attention_probabilities"])
def test_padding_never_enters_a_users_reduction(name, function):
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    prompts = ["The Eiffel Tower is in the city of", PROMPT, "The"]
    together = model.collect(prompts, name, layers=[3], reduce=function)[name, 3]
    for i, prompt in enumerate(prompts):
        with torch.no_grad(), model.trace(prompt):
            plain = getattr(model, name)[3].save()
        expected = function(plain)[0]
        found = together[(i, *(slice(0, size) for size in expected.shape))]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert together[i].count_nonzero() == expected.count_nonzero()


def test_a_mask_says_where_positions_are(tiny):
    model = tiny("llama")
    found = model.collect([PROMPT, PROMPT], "layers_output")
    assert found.mask.shape == found["layers_output"].shape[1:3]
    assert found["layers_output"][:, found.mask].dim() == 3
    assert model.collect([PROMPT, "The"], "layers_output", positions=-1).mask.tolist() == [True, True]
    assert model.collect([PROMPT, "The"], "layers_output", reduce="mean").mask is None


def test_positions_that_would_not_be_used_are_refused(tiny):
    """`collect` counts positions itself; others than its own gave the numbers of its own."""
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7], [9, 5, 6]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    usual = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.tensor([[0, 1, 2], [1, 0, 1]])}
    assert [row.ids for row in encode(model, usual)] == [(5, 6, 7), (5, 6)]
    for places in (torch.tensor([[3, 4, 5], [1, 3, 4]]), torch.tensor([1, 2, 3]), torch.zeros(3, 2, 3)):
        with pytest.raises(ValueError, match="position_ids of the encoding are not 0, 1, 2"):
            model.collect({**usual, "position_ids": places}, "layers_output")
    with pytest.raises(ValueError, match="inputs_embeds of the encoding would not be used here"):
        model.collect({"input_ids": ids, "inputs_embeds": torch.zeros(2, 3, 64)}, "layers_output")
