"""The published example, and a table of facts, on the toy checkpoint that comes with nnterp."""

import pytest
import torch

from nnterp.interventions import logit_lens
from nnterp.prompt_utils import Prompt, run_prompts
from nnterp.prompts import next_token_probs, prompts_from_table
from nnterp.prompts import run_prompts as run_prompts_with_options

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Germany": "Berlin"}


def test_the_published_example(toy):
    model = toy
    prompts = [
        Prompt.from_strings(
            "The capital of France is", {"target": "Paris", "other": ["London", "Madrid"]}, model.tokenizer
        )
    ]

    # Get probabilities for all target categories
    results = run_prompts(model, prompts)
    assert results["target"].shape == results["other"].shape == (1,)
    assert results["target"].item() > 0.9 > 0.1 > results["other"].item()

    # Combine with interventions
    results = run_prompts(model, prompts, get_probs_func=logit_lens)
    assert results["target"].shape == (1, model.num_layers)
    assert results["target"][0, -1].item() > 0.9
    assert results["target"][0, 0].item() < 0.5
    single = logit_lens(model, ["The capital of France is"])
    for name, tokens in prompts[0].target_tokens.items():
        assert torch.allclose(results[name], single[:, :, tokens].sum(-1), atol=1e-5)


@pytest.mark.parametrize("scoring", ["first_token", "sequence"])
@pytest.mark.parametrize("lens", [None, logit_lens])
def test_capitals_out_of_a_table(toy, scoring, lens):
    table = [
        {"country": country, "capital": capital, "others": [c for c in CAPITALS.values() if c != capital]}
        for country, capital in CAPITALS.items()
    ]
    targets = {"target": "{capital}", "other": "{others}"}
    prompts = prompts_from_table("The capital of {country} is", table, targets, toy, distinct=True)
    options = {"scoring": scoring, "get_probs_func": lens, "tqdm": None}
    results = run_prompts_with_options(toy, prompts, batch_size=2, **options)
    accuracy = torch.as_tensor(results.accuracy())
    assert accuracy.flatten()[-1] == 1
    assert (results.logit_difference("target", "other").view(len(table), -1)[:, -1] > 2).all()
    if lens is not None:
        assert accuracy[0] < 1, "the first layer does not know it yet"
    if scoring == "first_token" and lens is None:
        probs = next_token_probs(toy, [prompt.prompt for prompt in prompts])
        assert results.accuracy(among="vocabulary") == 1
        for i, prompt in enumerate(prompts):
            assert probs[i].argmax() in prompt.target_tokens["target"]
