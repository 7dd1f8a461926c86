"""Figures of kinds of heads and of weighted attention, against the numbers in the results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.interventions import head_scores, value_weighted_attention


@pytest.fixture(scope="module")
def model():
    import nnterp

    return nnterp.StandardizedTransformer(nnterp.toy_checkpoint(), enable_attention_probs=True)


def test_heads_are_a_map_with_rings_around_those_beyond_the_control(model):
    result = head_scores(model, "previous_token", n=2, length=8, progress=False)
    figure = display.plot_heads(result)
    heat, rings = figure.data
    assert np.allclose(heat.z, result["scores"])
    assert heat.hovertext[1][1].startswith("layer 1, head 1<br>previous token score")
    assert "<br>control " in heat.hovertext[1][1]
    ringed = set(zip(rings.y, rings.x, strict=True))
    assert ringed == {(cell["layer"], cell["head"]) for cell in result.heads()}
    assert 0 < len(ringed) < result["scores"].numel()
    strict = display.plot_heads(result, threshold=0.5).data[1]
    assert set(zip(strict.y, strict.x, strict=True)) < ringed
    assert "Previous token heads" in figure.layout.title.text
    control = display.plot_heads(result, tensor="control")
    assert len(control.data) == 1
    assert np.allclose(control.data[0].z, result["control"])
    with pytest.raises(ValueError, match="no tensor 'by_prompt' over layers and heads"):
        display.plot_heads(result, tensor="by_prompt")
    with pytest.raises(ValueError, match="layers has 1 entries"):
        display.plot_heads(result, layers=[0])


def test_plain_numbers_are_a_map_without_rings():
    scores = torch.rand(3, 5)
    figure = display.plot_heads(scores, heads=list("abcde"))
    assert len(figure.data) == 1
    assert np.allclose(figure.data[0].z, scores)


def test_weighted_attention_is_drawn_up_to_its_largest_number_and_cut_to_its_prompt(model):
    result = value_weighted_attention(model, ["The capital of France is", "The city of"], layers=[4], progress=False)
    for prompt, size in ((0, 5), (1, 3)):
        heat = result.plot(prompt=prompt).data[0]
        own = result["weighted"][prompt, 0, :, :size, :size]
        drawn = np.array(heat.z, dtype=float)
        assert heat.zmax == pytest.approx(own.max().item(), rel=1e-5)
        assert np.nansum(drawn) == pytest.approx(own.sum().item(), rel=1e-5)
        assert heat.colorbar.title.text.replace("<br>", " ") == "attention × value norm"
    with pytest.raises(ValueError, match="one query's probabilities sum to"):
        display.plot_attention(torch.full((3, 3), 0.9))
    assert display.plot_attention(torch.full((3, 3), 0.9), weighted=True).data[0].zmax == pytest.approx(0.9)
