"""Results that a researcher recognises, on the trained toy checkpoint, and the published examples."""

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.interventions import (
    Component,
    TargetPrompt,
    ablate,
    activation_patching,
    components,
    logit_difference,
    logit_lens,
    patchscope_lens,
    patchscope_table,
    path_patching,
    repeat_prompt,
    steer,
    target_probability,
)
from nnterp.testing import tiny_model, tiny_tokenizer

CAPITALS = {"France": " Paris", "Japan": " Tokyo", "Italy": " Rome", "Poland": " Warsaw"}
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
NAMES = logit_difference(" Mary", " John")


def test_the_capital_emerges_over_depth(toy):
    prompts = [f"The capital of {country} is" for country in CAPITALS]
    probs = logit_lens(toy, prompts, targets=list(CAPITALS.values()))[..., 0]
    assert (probs[:, :2] < 0.1).all()
    assert (probs[:, -1] > 0.9).all()
    assert (probs[:, -1] > probs[:, toy.num_layers // 2 - 1] + 0.2).all()
    found = logit_lens(toy, prompts, targets=list(CAPITALS.values()), top_k=1, ranks=True, entropy=True)
    assert (found["target_ranks"][:, -1] == 0).all()
    assert (found["entropy"][:, -1] < found["entropy"][:, 2]).all()


def test_the_patchscope_reads_the_country_out_of_the_source(toy):
    read = patchscope_table(toy, [f"The capital of {country}" for country in CAPITALS], repeat_prompt(), top_k=1)
    for i, country in enumerate(CAPITALS):
        assert read.vocabulary[read["top_ids"][i, 0, 0].item()] == f" {country}"
    target = TargetPrompt("The capital of Spain is", -2)
    moved = patchscope_lens(toy, [f"Once I lived in {country}" for country in CAPITALS], target, layers=1)
    for i, capital in enumerate(CAPITALS.values()):
        (token,) = toy.tokenizer(capital, add_special_tokens=False).input_ids
        assert moved[i, 0].argmax() == token
        assert moved[i, 0, token] > 0.5


def test_patching_lights_the_second_name_and_then_the_last_token(toy):
    found = activation_patching(toy, CLEAN, CORRUPTED, NAMES)
    assert found["clean"] > 3
    assert found["corrupted"] < -3
    scores = found.normalized()["scores"][0]
    second, last = found.tokens[0].index(" John", 5), len(found.tokens[0]) - 1
    assert scores[0].argmax() == second
    assert scores[0, second] > 0.9
    assert scores[-1].argmax() == last
    assert scores[-1, last] == pytest.approx(1, abs=1e-3)
    rest = [p for p in range(last + 1) if p not in (second, last)]
    assert scores[:, rest].abs().max() < 0.1
    assert (scores[1:, last] >= scores[:-1, last] - 0.1).all(), "what the last token knows only grows"


def test_few_heads_carry_the_name(toy):
    found = activation_patching(toy, CLEAN, CORRUPTED, NAMES, "attention_head_outputs", heads="all").normalized()
    best = found.top(2)
    assert best[0]["scores"] > 0.4
    assert sum(cell["scores"] for cell in best) > 0.6
    mover = Component("attention_head_outputs", best[0]["layer"], best[0]["head"])
    without = ablate(toy, CLEAN, mover, "resample", NAMES, reference=CORRUPTED)
    assert without["scores"] < without["baseline"] - 2
    senders = components(toy, "attention_head_outputs", heads="all")
    direct = path_patching(toy, CLEAN, CORRUPTED, senders, "logits", NAMES)
    best_sender = senders[int(direct["scores"][0].argmax())]
    assert (best_sender.layer, best_sender.heads) == (mover.layer, mover.heads)


def test_ablating_the_reader_of_the_capital(toy):
    prompts = [f"The capital of {country} is" for country in CAPITALS]
    metric = target_probability(list(CAPITALS.values()))
    whole = components(toy, "mixer_contributions")
    found = ablate(toy, prompts, [list(whole)], "zero", metric)
    assert (found["baseline"] > 0.9).all()
    assert (found["scores"] < 0.1).all(), "without any attention no country is known at the last token"


def published():
    return StandardizedTransformer(tiny_model("gpt2", num_layers=12), tokenizer=tiny_tokenizer())


def test_the_readme_example():
    model = published()

    # Logit lens: decode hidden states at each layer
    layer_probs = logit_lens(model, ["The capital of France is"])
    # Shape: (batch, layers, vocab_size)
    assert layer_probs.shape == (1, 12, model.vocab_size)

    target = TargetPrompt("The capital of France is", index_to_patch=-1)
    patchscope_probs = patchscope_lens(
        model, source_prompts=["The capital of England is"], target_patch_prompts=target, layer_to_patch=10
    )
    assert patchscope_probs.shape == (1, 1, model.vocab_size)
    assert torch.allclose(patchscope_probs.sum(-1), torch.ones(1, 1), atol=1e-5)

    with model.trace("Hello, how are you?"):
        steering_vector = torch.randn(model.hidden_size)
        model.steer(layers=[5, 10], steering_vector=steering_vector, factor=1.5)
        steering_vector = steering_vector.save()
        by_method = model.logits.save()
    with model.trace("Hello, how are you?"):
        steer(model, layers=[5, 10], steering_vector=steering_vector, factor=1.5)
        by_function = model.logits.save()
    assert torch.equal(by_method, by_function)
