"""Probes against scikit-learn fitted by hand; their null controls; what they hand on."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnterp import Condition
from nnterp.interventions import Result, probe
from nnterp.positions import last_of
from tests.interventions.test_steering_vectors import states

WORDS = ["cat", "dog", "king", "river", "tea", "book", "city", "song"]
TEXTS = [f"I {verb} the {word}." for verb in ("love", "hate") for word in WORDS]
LABELS = [True] * len(WORDS) + [False] * len(WORDS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_held_out_accuracy_is_scikit_learns(tiny, kind):
    model = tiny(kind)
    found = probe(model, TEXTS, LABELS, layers=[0, 2], folds=4, seed=1)
    assert found.labels["layers"] == (0, 2)
    for i, layer in enumerate((0, 2)):
        x, y = states(model, TEXTS, layer).numpy(), np.array(LABELS)
        right = np.zeros(len(y), dtype=bool)
        accuracies = []
        for fit, held in StratifiedKFold(4, shuffle=True, random_state=1).split(x, y):
            fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[fit], y[fit])
            right[held] = fitted.predict(x[held]) == y[held]
            accuracies.append(right[held].mean())
        assert found["accuracy"][i].item() == pytest.approx(right.mean())
        assert found["fold_accuracy"][i].tolist() == pytest.approx(accuracies)
        whole = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
        called = torch.tensor(x) @ found.directions[layer].double() > float(found["thresholds"][i])
        assert called.tolist() == whole.predict(x).tolist()
        assert found.directions[layer].norm().item() == pytest.approx(1)
    assert found["majority"].item() == 0.5


@pytest.mark.slow
def test_the_tone_is_there_and_the_controls_are_not(toy):
    found = probe(toy, TEXTS, LABELS, position=None, repeats=8)
    assert found["accuracy"].max() >= 0.9
    assert found["shuffled"].shape == (toy.num_layers, 8)
    assert abs(found["shuffled"].mean().item() - 0.5) < 0.15
    assert found["random"].mean() < found["accuracy"].mean()
    assert found["accuracy"][found.best()] == found["accuracy"].max()
    same = probe(toy, TEXTS, LABELS, position=None, repeats=2, batch_size=3)
    torch.testing.assert_close(same["accuracy"], found["accuracy"])
    for name in ("shuffled", "random"):
        torch.testing.assert_close(same[name], found[name][:, :2])
    other = probe(toy, TEXTS, LABELS, layers=0, position=None, repeats=8, controls=["shuffled"], seed=5)
    assert not torch.equal(other["shuffled"], found["shuffled"][:1])


def test_what_is_not_there_is_not_found(tiny):
    """Labels that have nothing to do with the texts give chance, not training accuracy."""
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    labels = torch.rand(64, generator=torch.Generator().manual_seed(0)) > 0.5
    found = probe(tiny("llama"), texts, labels, layers=1, controls=["random"])
    assert found["accuracy"].item() < 0.7
    assert "shuffled" not in found.tensors
    bare = probe(tiny("llama"), texts, labels, layers=1, controls=[], test_size=0.25)
    assert bare["fold_accuracy"].shape == (1, 1)
    assert set(bare.tensors) == {"accuracy", "fold_accuracy", "majority", "unit_directions", "thresholds"}


@pytest.mark.parametrize("position", [-1, None, last_of("the")])
def test_its_condition_chooses_the_rows_that_it_calls_positive(toy, position, tmp_path):
    found = probe(toy, TEXTS, LABELS, layers=[1, 3], position=position, folds=2, controls=[])
    found.save(tmp_path / "probe")
    found = Result.load(tmp_path / "probe")
    condition = found.condition(3)
    assert isinstance(condition, Condition)
    assert condition.position == position
    with torch.no_grad(), toy.trace(TEXTS, use_cache=False):
        rows = condition.rows(toy).save()
    assert rows.tolist() == LABELS
    with torch.no_grad(), toy.trace(TEXTS, use_cache=False):
        rows = found.condition(3, below=True).rows(toy).save()
    assert rows.tolist() == [not label for label in LABELS]
    vector = found.vector()
    assert (vector.layers, vector.method) == ((1, 3), "probe")
    vector.check(toy)
    with pytest.raises(KeyError, match="no probe at layer 2; there are: 1, 3"):
        found.condition(2)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS[:3], {}, "3 labels for 16 texts"),
        ([True] * 16, {}, "two classes"),
        ([0, 1, 2, 3] * 4, {}, "two classes"),
        ([True] + [False] * 15, {}, "folds=5.*smaller class has texts, 1"),
        (LABELS, {"folds": 1}, "folds=1"),
        (LABELS, {"test_size": 1.5}, "test_size=1.5"),
        (LABELS, {"controls": ["noise"]}, "controls="),
        (LABELS, {"controls": "random"}, "controls="),
        (LABELS, {"position": [0, 1]}, "position="),
        (LABELS, {"repeats": 0}, "repeats=0"),
    ],
)
def test_refuses(tiny, labels, options, message):
    with pytest.raises(ValueError, match=message):
        probe(tiny("llama"), TEXTS, labels, **options)
