"""The patching figure of several prompts: one of them, or a mean of columns that are the same thing in each prompt."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.display._results.alignment import same_template
from nnterp.interventions import Result, activation_patching, target_probability
from nnterp.positions import last_of

FRANCE = ["The", " capital", " of", " France", " is"]
ITALY = ["The", " capital", " of", " Italy", " is"]
TOWER = ["The", " Eiffel", " Tower", " is", " in", " the", " city", " of"]


def sweep_of(*prompts, labels=None, extra=(), seed=0):
    """A result whose scores differ in every cell, NaN past the end of a shorter prompt; `extra` are axes in between."""
    width = max(map(len, prompts))
    axes = {"prompts": ["".join(tokens) for tokens in prompts], "layers": [0, 1, 2], **dict(extra)}
    axes["positions"] = range(width) if labels is None else labels
    scores = torch.randn([len(names) for names in axes.values()], generator=torch.Generator().manual_seed(seed))
    for i, tokens in enumerate(prompts):
        scores[i, ..., len(tokens) :] = torch.nan
    tokens = tuple((*tokens, *[None] * (width - len(tokens))) for tokens in prompts)
    labels = {name: tuple(labels) for name, labels in axes.items()}
    return SimpleNamespace(tensors={"scores": scores}, axes={"scores": tuple(axes)}, labels=labels, tokens=tokens)


@pytest.mark.parametrize("prompt", [0, 1, -1])
def test_one_prompt_by_its_index(prompt):
    result = sweep_of(FRANCE, TOWER)
    figure = display.plot_patching(result, prompt=prompt)
    tokens = [FRANCE, TOWER][prompt]
    assert np.allclose(figure.data[0].z, result.tensors["scores"][prompt, :, : len(tokens)])
    assert list(figure.layout.xaxis.ticktext) == [display.visible(token) for token in tokens]
    assert "".join(tokens) in figure.layout.title.text.replace("<br>", " ")
    assert "mean of" not in figure.data[0].hovertext[0][0]


def test_prompts_of_the_same_text_are_told_apart_by_their_index():
    result = sweep_of(FRANCE, FRANCE)
    for prompt in range(2):
        assert np.allclose(display.plot_patching(result, prompt=prompt).data[0].z, result.tensors["scores"][prompt])


def test_a_prompt_is_chosen_once_and_has_to_exist():
    result = sweep_of(FRANCE, TOWER)
    with pytest.raises(IndexError, match="2 prompts, so there is no prompt 2"):
        display.plot_patching(result, prompt=2)
    with pytest.raises(ValueError, match="Give prompt=1 or prompts='mean', not both"):
        display.plot_patching(result, prompt=1, prompts="mean")
    with pytest.raises(ValueError, match='draw one with prompt=i, i from 0 to 1, or their mean with prompts="mean"'):
        display.plot_patching(result)
    with pytest.raises(TypeError, match="no argument 'prompt'"):
        display.plot_patching(torch.rand(2, 2), prompt=0)


@pytest.mark.parametrize(
    "prompts",
    [
        (FRANCE, TOWER),
        (FRANCE, ITALY, TOWER),
        (FRANCE, ["When", " Mary", " met", " John", " there"]),
        # The same number of tokens, but the words after the second token are shifted.
        (["The", " capital", " of", " Sri", " Lanka", " is"], ["The", " capital", " city", " of", " France", " is"]),
        (FRANCE, [*ITALY, " in"]),
    ],
)
def test_different_templates_are_not_averaged(prompts):
    result = sweep_of(*prompts)
    with pytest.raises(ValueError, match=r"do not match: at \d+ one has '.*' and the other .*prompt=i"):
        display.plot_patching(result, prompts="mean")


def test_refusal_names_a_column_in_which_the_prompts_differ():
    with pytest.raises(ValueError, match=r"prompts 1 and 0 .*: at 1 one has ' Eiffel' and the other ' capital'"):
        display.plot_patching(sweep_of(FRANCE, TOWER), prompts="mean")


def test_one_template_is_averaged_column_by_column():
    spain = [*FRANCE[:3], " Spain", " is"]
    result = sweep_of(FRANCE, ITALY, spain)
    figure = display.plot_patching(result, prompts="mean")
    assert np.allclose(figure.data[0].z, result.tensors["scores"].mean(0), atol=1e-6)
    assert list(figure.layout.xaxis.ticktext) == ["The", "·capital", "·of", "·France|·Italy|…", "·is"]
    assert figure.data[0].hovertext[1][3].startswith("layer 1<br>position 3  ·France|·Italy|…<br>")
    assert {text.split("<br>")[-1] for row in figure.data[0].hovertext for text in row} == {"mean of 3 prompts"}
    assert "mean over 3 prompts" in figure.layout.title.text.replace("<br>", " ")
    two = display.plot_patching(sweep_of(FRANCE, ITALY), prompts="mean")
    assert two.layout.xaxis.ticktext[3] == "·France|·Italy"


def test_columns_that_only_some_prompts_have_say_of_how_many_they_are_the_mean():
    result = sweep_of(FRANCE, [*FRANCE, " Paris", ","], [*FRANCE, " Paris"])
    figure = display.plot_patching(result, prompts="mean")
    scores = result.tensors["scores"]
    for layer in range(3):
        for column in range(7):
            there = [s for s in scores[:, layer, column].tolist() if s == s]
            assert figure.data[0].z[layer][column] == pytest.approx(sum(there) / len(there), abs=1e-6)
            said = f"mean of {len(there)} prompt{'s' if len(there) > 1 else ''}"
            assert figure.data[0].hovertext[layer][column].endswith(said)
    assert list(figure.layout.xaxis.ticktext)[3:] == ["·France (n=3)", "·is (n=3)", "·Paris (n=2)", ", (n=1)"]
    assert "mean over up to 3 prompts" in figure.layout.title.text.replace("<br>", " ")


def test_a_prompt_without_scores_does_not_count():
    result = sweep_of(FRANCE, ITALY)
    result.tensors["scores"][1] = torch.nan  # as normalized() gives where clean and corrupted score the same
    figure = display.plot_patching(result, prompts="mean")
    assert np.allclose(figure.data[0].z, result.tensors["scores"][0])
    assert figure.data[0].hovertext[0][0].endswith("mean of 1 prompt")
    result.tensors["scores"][0, 1, 2] = torch.nan
    assert np.isnan(np.array(display.plot_patching(result, prompts="mean").data[0].z, dtype=float)[1, 2])


def test_selectors_and_the_last_token_are_the_same_thing_in_all_prompts():
    labels = ["last_of('The')", -1]
    result = sweep_of(["The", " is"], ["The", " of"], labels=labels)
    figure = display.plot_patching(result, prompts="mean")
    assert np.allclose(figure.data[0].z, result.tensors["scores"].mean(0), atol=1e-6)
    assert list(figure.layout.xaxis.ticktext) == ["last_of('The')", "-1"]
    assert figure.data[0].hovertext[0][0].startswith("layer 0<br>position last_of('The')<br>")
    for index in (4, -2):
        result = sweep_of(["The", " is"], ["The", " of"], labels=["last_of('The')", index])
        with pytest.raises(ValueError, match=f"at {index} one has ' is' and the other ' of'"):
            display.plot_patching(result, prompts="mean")


def test_heads_at_one_position_are_averaged_only_where_the_position_is_the_same_thing():
    heads = [("heads", [0, 1])]
    result = sweep_of(FRANCE, ITALY, extra=heads)
    figure = display.plot_patching(result, positions=3, prompts="mean")
    assert np.allclose(figure.data[0].z, result.tensors["scores"][..., 3].mean(0), atol=1e-6)
    other = sweep_of(FRANCE, TOWER, extra=heads)
    with pytest.raises(ValueError, match="do not match"):
        display.plot_patching(other, positions=3, prompts="mean")
    everywhere = display.plot_patching(other, positions="mean", prompts="mean")
    assert np.allclose(everywhere.data[0].z, other.tensors["scores"].nanmean(-1).mean(0), atol=1e-6)
    assert "mean over positions, mean over 2 prompts" in everywhere.layout.title.text.replace("<br>", " ")


def test_positions_without_tokens_are_not_averaged():
    result = sweep_of(FRANCE, ITALY)
    result.tokens = ()
    with pytest.raises(ValueError, match="does not have its prompts' tokens"):
        display.plot_patching(result, prompts="mean")
    assert np.allclose(display.plot_patching(result, prompt=1).data[0].z, result.tensors["scores"][1])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a b c d e", "a b x d e", True),
        ("a b c", "a b c", True),
        ("a M b J c d", "a J b M c d", True),
        ("a b c d", "a b x y", False),
        ("a b c d e", "a b c d", False),
        ("a b c d e f g", "a b x c e f g", False),
        ("", "", False),
    ],
)
def test_what_one_template_is(one, other, same):
    padded = [*one.split(), None, None], [*other.split(), None, None]
    assert same_template(*padded) == same_template(*padded[::-1]) == same


def test_several_prompts_of_a_model(tmp_path):
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model, tiny_tokenizer

    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    pairs = ["The capital of France is", "The Eiffel Tower is in the city of"]
    clean = [model.tokenizer(text)["input_ids"] for text in pairs]
    corrupted = [[*ids[:1], ids[1] + 1, *ids[2:]] for ids in clean]
    metric = target_probability(40)
    result = activation_patching(model, clean, corrupted, metric, progress=False)
    result.save(tmp_path / "patching")
    for patched in (result, Result.load(tmp_path / "patching")):
        for prompt, ids in enumerate(clean):
            one = activation_patching(model, ids, corrupted[prompt], metric, progress=False)
            figure = patched.plot(prompt=prompt)
            assert np.allclose(figure.data[0].z, one["scores"][0], atol=1e-6)
            assert figure.layout.xaxis.ticktext == one.plot().layout.xaxis.ticktext
        with pytest.raises(ValueError, match="do not match"):
            patched.plot(prompts="mean")
    texts = [text.replace("capital", "city").replace("Eiffel", "Great") for text in pairs]
    selected = activation_patching(
        model, pairs, texts, metric, positions=[last_of("The"), last_of("is"), -1], progress=False
    )
    heat = selected.plot(prompts="mean").data[0]
    assert np.allclose(heat.z, selected["scores"].mean(0), atol=1e-6)
    assert heat.hovertext[0][1].split("<br>")[1] == "position last_of('is')"


def test_other_figures_take_the_index_of_a_prompt():
    values = torch.rand(2, 3)
    labels = {"prompts": ("x", "y"), "positions": (0, 1, 2)}
    tokens = (("a", "b", None), ("c", "d", "e"))
    result = SimpleNamespace(
        tensors={"loss": values}, axes={"loss": ("prompts", "positions")}, labels=labels, tokens=tokens
    )
    assert np.allclose(display.plot_tokens(result, prompt=0).data[0].marker.color, values[0, :2])
    assert list(display.plot_tokens(result, prompt=1).data[0].text) == ["c", "d", "e"]
    with pytest.raises(ValueError, match="2 prompts: choose one with prompt=i, i from 0 to 1"):
        display.plot_tokens(result)
    pattern = torch.rand(2, 3, 3).softmax(-1)
    result = SimpleNamespace(
        tensors={"pattern": pattern},
        axes={"pattern": ("prompts", "queries", "keys")},
        labels={"prompts": ("x", "y"), "queries": range(3), "keys": range(3)},
    )
    assert np.allclose(display.plot_attention(result, prompt=1).data[0].z, pattern[1])
    with pytest.raises(TypeError, match="no argument 'prompt'"):
        display.plot_attention(pattern, prompt=1)
    with pytest.raises(TypeError, match="no argument 'prompt'"):
        display.plot_tokens(["a"], [1.0], prompt=1)
