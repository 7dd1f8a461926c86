"""The figure of a feature's contexts, against the numbers in the report."""

from __future__ import annotations

import numpy as np
import pytest

import nnterp
from nnterp import display
from nnterp.interventions import feature_report

TEXTS = ["I am happy. The weather today is lovely.", "I am sad. The weather today is awful.", "king king\n1135 1135"]


@pytest.fixture(scope="module")
def report():
    model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
    dictionary = nnterp.toy_dictionary("residual_4")
    return feature_report(model, dictionary, TEXTS, [399, 326, 1], top=2, progress=False)


def test_contexts_are_lines_of_tokens_coloured_by_activation(report):
    figure = display.plot_features(report, 399)
    contexts = report.contexts(399)
    boxes = figure.data[0]
    assert len(set(boxes.y)) == len(contexts) > 0
    assert np.allclose(boxes.marker.color, [value for context in contexts for value in context["activations"]])
    assert figure.layout.coloraxis.cmax == pytest.approx(contexts[0]["peak"])
    assert figure.layout.coloraxis.cmin == 0
    at = int(np.argmax(contexts[0]["activations"]))
    assert boxes.hovertext[at].startswith("+0 from the peak")
    assert boxes.text[at].replace("·", " ") == contexts[0]["tokens"][at]
    assert "Feature 399" in figure.layout.title.text
    assert "% of positions" in figure.layout.title.text
    one = display.plot_features(report, 399, top=1)
    assert len(one.data[0].y) == len(contexts[0]["tokens"])


def test_what_cannot_be_drawn_is_refused(report):
    with pytest.raises(ValueError, match="has 3 features: choose one with feature="):
        display.plot_features(report)
    with pytest.raises(ValueError, match="holds no feature 5"):
        display.plot_features(report, 5)
    silent = [f for f in (399, 326, 1) if not report.contexts(f)]
    assert silent, "every feature is active on these texts"
    with pytest.raises(ValueError, match="is not active on any of these texts"):
        display.plot_features(report, silent[0])
    with pytest.raises(TypeError, match="plot_features"):
        display.plot_features(3, 399)
