"""Wrong names must not pass: every wrong map of every architecture is refused, and no right one is."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import mutations

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", mutations.ARCHITECTURES)
def test_every_wrong_map_is_refused_and_every_right_one_is_not(model_type):
    outcome = mutations.run(model_type)
    assert len(outcome.caught) >= 25
    assert outcome.missed == []
    assert outcome.false_alarms == []


def test_enough_architectures_are_tried():
    assert len(set(mutations.ARCHITECTURES)) >= 30
