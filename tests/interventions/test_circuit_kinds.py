"""Edges (also integrated), their audit and faithfulness on 32 more architectures, against plain torch hooks."""

from __future__ import annotations

import math

import pytest
import torch

from nnterp.interventions import edge_attribution, faithfulness

from .slow_circuits import MORE, Slow
from .test_circuits import BOTH, CLEAN, CORRUPTED, check_ends, close, expected_scores, linear, scores_of


@pytest.mark.parametrize("kind", MORE)
def test_scores_audits_and_cut_runs_are_those_of_hooks(tiny, kind):
    model = tiny(kind)
    slow, metric = Slow(model, kind), linear(model)
    found = edge_attribution(model, *BOTH, metric, audit=4, by_pair=True)
    close(scores_of(found, 0), expected_scores(slow, metric, CLEAN, CORRUPTED))
    integrated = edge_attribution(model, CLEAN, CORRUPTED, metric, "integrated", steps=2, audit=0)
    close(scores_of(integrated), expected_scores(slow, metric, CLEAN, CORRUPTED, 2))

    every, plain = set(scores_of(found)), [float(metric(slow.plain(ids)[0][None])[0]) for ids in BOTH[0]]
    for cell in found.audit.cells:
        kept = every - {(cell["sender"], cell["receiver"])}
        exact = [
            float(metric(slow.cut(clean, corrupted, kept)[None])[0]) - own
            for clean, corrupted, own in zip(*BOTH, plain, strict=True)
        ]
        assert cell["exact"] == pytest.approx(sum(exact) / 2, abs=2e-3, rel=1e-3)

    size = 0.3
    kept = set(scores_of(found.top(math.floor(size * found.total))))
    cut = faithfulness(model, found, *BOTH, metric, (0.0, size, 1.0), controls=0)
    check_ends(model, found, cut, metric)
    expected = [float(metric(slow.cut(*pair, kept)[None])[0]) for pair in zip(*BOTH, strict=True)]
    torch.testing.assert_close(cut["by_prompt"][:, 1], torch.tensor(expected), atol=5e-3, rtol=1e-4)
    assert (cut["by_prompt"][:, 1] - cut["clean"]).abs().min() > 1e-2
