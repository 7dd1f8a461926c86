"""The figure of a probe: its numbers are those of the result, and bands hold every repeat of the controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.interventions import probe


def traces(figure):
    return {trace.name: trace for trace in figure.data if trace.showlegend is not False}


def test_a_result_is_drawn_with_its_controls(toy):
    texts = ["I love it.", "I like cats.", "I enjoy tea.", "I hate it.", "I fear cats.", "I loathe tea."]
    result = probe(toy, texts, [1, 1, 1, 0, 0, 0], [1, 4], folds=3, repeats=3)
    figure = display.plot_probe(result)
    lines = traces(figure)
    assert list(lines) == ["probe", "shuffled labels", "random directions", "larger class"]
    np.testing.assert_allclose(lines["probe"].y, result["accuracy"].numpy(), rtol=1e-6)
    for name, words in (("shuffled", "shuffled labels"), ("random", "random directions")):
        np.testing.assert_allclose(lines[words].y, result[name].mean(1).numpy(), rtol=1e-6)
        (band,) = [trace for trace in figure.data if trace.showlegend is False and trace.legendgroup == words]
        edges = [*result[name].max(1).values.tolist(), *result[name].min(1).values.tolist()[::-1]]
        np.testing.assert_allclose(band.y, edges, rtol=1e-6)
    assert list(figure.layout.xaxis.ticktext) == ["1", "4"]
    assert list(lines["larger class"].y) == [0.5, 0.5]


def test_plain_numbers_are_drawn():
    figure = display.plot_probe([0.5, 0.9], {"<b>null</b>": torch.tensor([[0.4, 0.6], [0.5, 0.5]])}, layers=[3, 7])
    assert list(traces(figure)) == ["probe", "&lt;b&gt;null&lt;/b&gt;"]
    assert traces(figure)["probe"].hovertext[1] == "probe<br>layer 7: 0.9000"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([0.5, 0.9], {"null": [[0.5]]}), "has 1 layers, and accuracy has 2"),
        (([[0.5, 0.9]],), "accuracy"),
        (([50.0, 0.9],), "accuracy holds 50, and an accuracy is a share"),
        (([0.5], {"null": [[-0.1]]}), "null holds -0.1"),
        (([0.5], {}, None, 3), "majority holds 3"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    names = ("accuracy", "controls", "layers", "majority")
    with pytest.raises(ValueError, match=said):
        display.plot_probe(**dict(zip(names, arguments, strict=False)))


def test_another_result_is_refused(toy):
    from nnterp.interventions import logit_lens_table

    with pytest.raises(ValueError, match="no accuracy by layer; it has"):
        display.plot_probe(logit_lens_table(toy, "The capital of France is", layers=[0]))
