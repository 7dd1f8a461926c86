"""The mean over prompts of a patching map: only of columns that are the same place, with how many prompts it is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.interventions import PatchingResult, activation_patching, target_probability
from nnterp.positions import last_of

FRANCE = ("The", " capital", " of", " France", " is")
SPAIN = ("The", " capital", " of", " Spain", " is")
MARY = ("Then", " Mary", " and", " John", " left")
JOHN = ("Then", " John", " and", " Mary", " left")


def sweep(*tokens, positions=None, scores=None):
    """A result of two layers whose scores are different in every cell."""
    width = max(map(len, tokens))
    if scores is None:
        scores = torch.arange(len(tokens) * 2 * width, dtype=torch.float).view(len(tokens), 2, width) ** 2
        for prompt, row in enumerate(tokens):
            scores[prompt, :, len(row) :] = float("nan")
    return PatchingResult(
        {"scores": scores},
        {"scores": ("prompts", "layers", "positions")},
        {
            "prompts": tuple("".join(row) for row in tokens),
            "layers": (0, 1),
            "positions": tuple(range(width)) if positions is None else positions,
        },
        tuple((*row, *(None,) * (width - len(row))) for row in tokens),
    )


@pytest.mark.parametrize("prompt", [0, 1, -1])
def test_one_prompt_by_its_index(prompt):
    result = sweep(FRANCE, FRANCE)  # the same text twice, which a label cannot tell apart
    figure = result.plot(prompt=prompt)
    assert np.array_equal(figure.data[0].z, result["scores"][prompt])
    assert "position 3  ·France" in figure.data[0].hovertext[1][3]
    assert "mean of" not in figure.data[0].hovertext[1][3]


def test_a_wrong_prompt_is_refused():
    result = sweep(FRANCE, SPAIN)
    with pytest.raises(IndexError, match="there is no prompt 2"):
        result.plot(prompt=2)
    with pytest.raises(ValueError, match="not both"):
        result.plot(prompt=0, prompts="mean")
    with pytest.raises(ValueError, match=r"by its index with prompt=0 to prompt=1"):
        result.plot()
    with pytest.raises(TypeError, match="no argument 'prompt'"):
        display.plot_patching(torch.rand(2, 2), prompt=0)


@pytest.mark.parametrize(("pair", "shown"), [((FRANCE, SPAIN), "·France|·Spain"), ((MARY, JOHN), "·John|·Mary")])
def test_prompts_of_one_template_are_averaged(pair, shown):
    result = sweep(*pair)
    figure = result.plot(prompts="mean")
    assert np.allclose(figure.data[0].z, result["scores"].mean(0))
    assert list(figure.layout.xaxis.ticktext)[3] == shown
    assert figure.data[0].hovertext[0][3].endswith("<br>mean of 2 of 2 prompts")


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (("The", " capital", " of", " the", " country", " is"), "prompt 0 has 5 tokens and prompt 1 has 6"),
        (("Paris", " lies", " in", " old", " France"), "prompts 0 and 1 are not of one template"),
        # Half of the tokens agree by position, but the rest is the same words one place further on.
        (("The", " capital", " now", " of", " is"), "prompts 0 and 1 are not of one template"),
    ],
)
def test_other_prompts_are_refused(other, why):
    result = sweep(FRANCE, other)
    with pytest.raises(ValueError, match=f"{why}. Draw one prompt with prompt=0"):
        result.plot(prompts="mean")
    assert np.array_equal(result.plot(prompt=0).data[0].z, result["scores"][0], equal_nan=True)


def test_columns_selected_by_text_are_averaged_whatever_their_tokens():
    labels = ("last_of('9 lives')", "at('it\\'s 3', -1)", -1)
    result = sweep(("a", "b", "c"), ("d", "e", "f"), positions=labels)
    figure = result.plot(prompts="mean")
    assert np.allclose(figure.data[0].z, result["scores"].mean(0))
    assert figure.layout.xaxis.title.text == "position"
    assert "position last_of('9 lives')<br>" in figure.data[0].hovertext[0][0]


def test_columns_selected_by_number_need_the_same_token():
    assert np.allclose(sweep(("a", "b"), ("a", "b"), positions=(2, 9)).plot(prompts="mean").data[0].z[0], [8, 13])
    with pytest.raises(ValueError, match="position 9 is 'b' in prompt 0 and 'c' in prompt 1"):
        sweep(("a", "b"), ("a", "c"), positions=(2, 9)).plot(prompts="mean")
    with pytest.raises(ValueError, match=r"position slice\(0, 3, None\) is 'b'"):
        sweep(("a", "b"), ("a", "c"), positions=("at('x')", "slice(0, 3, None)")).plot(prompts="mean")


def test_a_column_says_how_many_prompts_it_is_the_mean_of():
    scores = torch.tensor([[[1.0, 2.0]] * 2, [[3.0, float("nan")]] * 2, [[5.0, float("nan")]] * 2])
    figure = sweep(*[("a", "b")] * 3, scores=scores).plot(prompts="mean")
    assert np.allclose(figure.data[0].z, [[3, 2], [3, 2]])
    assert list(figure.layout.xaxis.ticktext) == ["a", "(1/3) b"]
    assert figure.data[0].hovertext[0][0].endswith("mean of 3 of 3 prompts")
    assert figure.data[0].hovertext[0][1].endswith("mean of 1 of 3 prompts")


def test_a_result_without_tokens_is_refused():
    result = PatchingResult(
        {"scores": torch.rand(2, 2, 3)},
        {"scores": ("prompts", "layers", "positions")},
        {"prompts": ("a", "b"), "layers": (0, 1), "positions": (0, 1, 2)},
    )
    with pytest.raises(ValueError, match="does not carry their tokens"):
        result.plot(prompts="mean")
    assert np.allclose(result.plot(prompt=1).data[0].z, result["scores"][1])


def test_other_figures_take_a_prompt_too():
    scores = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    ablation = PatchingResult(
        {"scores": scores, "baseline": torch.tensor([1.0, 2.0])},
        {"scores": ("prompts", "components"), "baseline": ("prompts",)},
        {"prompts": ("a", "b"), "components": ("x", "y")},
    )
    assert list(display.plot_components(ablation, prompt=1).data[0].x) == [1, 3]
    loss = PatchingResult(
        {"loss": scores},
        {"loss": ("prompts", "positions")},
        {"prompts": ("a", "b"), "positions": (0, 1)},
        (("p", "q"), ("r", "s")),
    )
    bars = display.plot_tokens(loss, prompt=1).data[0]
    assert (list(bars.text), list(bars.marker.color)) == (["r", "s"], [3, 5])
    pattern = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.25, 0.75]]])
    attention = PatchingResult(
        {"a": pattern},
        {"a": ("prompts", "queries", "keys")},
        {"prompts": ("a", "b"), "queries": (0, 1), "keys": (0, 1)},
        (("p", "q"), ("r", "s")),
    )
    heat = display.plot_attention(attention, prompt=1).data[0]
    assert np.allclose(heat.z[1], [0.25, 0.75])
    assert "key 1  s" in heat.hovertext[1][1]
    with pytest.raises(TypeError, match="no argument 'prompt'"):
        display.plot_attention(pattern[0], prompt=1)


def test_a_real_sweep_over_two_templates():
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model, tiny_tokenizer

    model = StandardizedTransformer(tiny_model("gpt2"), tokenizer=tiny_tokenizer())
    clean = ["The capital of France is", "In the city of Paris stands the old tower of France and"]
    corrupted = [text.replace("France", "Japan") for text in clean]
    where = [last_of("of"), -1]
    selected = activation_patching(model, clean, corrupted, target_probability(40), positions=where, progress=False)
    assert not torch.equal(selected["scores"][0], selected["scores"][1])
    assert np.allclose(selected.plot(prompts="mean").data[0].z, selected["scores"].mean(0))
    assert np.allclose(selected.plot(prompt=1).data[0].z, selected["scores"][1])
