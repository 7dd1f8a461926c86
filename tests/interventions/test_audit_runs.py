"""The audit of attribution takes unedited runs from the estimates, and finds what activation patching finds."""

import pytest
import torch

from nnterp.interventions import activation_patching, attribution_patching, logit_difference
from nnterp.interventions._engine import _sweep as sweep_room

CLEAN = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15], [33, 70, 91, 140, 12]]
CORRUPTED = [[12, 42, 99, 93, 130, 201], [61, 31, 101, 180], [34, 70, 92, 140, 13]]
METRIC = logit_difference(5, 9)


@pytest.mark.parametrize("batch_size", ["auto", 1])  # 1: only the last pair's runs are there
@pytest.mark.parametrize(("kind", "direction"), [("llama", "denoising"), ("gpt2", "noising"), ("mamba", "denoising")])
def test_exact_effects_are_those_of_activation_patching(tiny, kind, direction, batch_size):
    model = tiny(kind)
    name, heads = ("layers_output", None) if kind == "mamba" else ("attention_head_outputs", "all")
    common = (model, CLEAN, CORRUPTED, METRIC, name, None, None if heads else "all", heads, direction)
    method = "integrated" if kind == "gpt2" else "gradient"
    found = attribution_patching(*common, method, 2, 10_000, batch_size=batch_size)
    exact = activation_patching(*common)
    assert len(found.audit) == found["scores"].numel()
    for cell in found.audit.cells:
        where = tuple(found.labels[axis].index(cell[axis]) for axis in found.axes["scores"])
        effect = exact["scores"][where] - found.unpatched[where[0]]
        assert cell["exact"] == pytest.approx(effect.item(), abs=2e-3, rel=1e-3)
    assert max(abs(cell["exact"]) for cell in found.audit.cells) > 0.1


def test_an_audit_runs_nothing_unedited(tiny, monkeypatch):
    """The estimates have run the pair already, and cells that begin at the first position need no cache."""
    model = tiny("gpt2")
    activation_patching(model, CLEAN, CORRUPTED, METRIC)  # the first sweep of a model proves its shortcuts
    monkeypatch.setattr(sweep_room, "run_base", None)
    found = attribution_patching(
        model, CLEAN[:1], CORRUPTED[:1], METRIC, "attention_head_outputs", heads="all", audit=5
    )
    assert len(found.audit) == 5


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bert"])
def test_logits_that_a_metric_does_not_read_are_not_computed(kind, tiny, monkeypatch):
    """A metric of two tokens gives what the same numbers give from all logits."""
    model, read, whole_rows = tiny(kind), set(), []
    activation_patching(model, CLEAN, CORRUPTED, METRIC)  # the first sweep of a model proves its shortcuts
    whole = type(model).project_on_vocab

    def watched(self, hidden, tokens=None):
        read.add(str(tokens.tolist())) if tokens is not None else whole_rows.append(len(hidden))
        return whole(self, hidden, tokens)

    monkeypatch.setattr(type(model), "project_on_vocab", watched)
    found = activation_patching(model, CLEAN, CORRUPTED, METRIC)
    assert read == {"[5, 9]"}
    assert sum(whole_rows) <= len(CLEAN)  # the reference runs
    every = activation_patching(model, CLEAN, CORRUPTED, lambda logits: logits[:, 5] - logits[:, 9])
    assert sum(whole_rows) > len(CLEAN)
    torch.testing.assert_close(found["scores"], every["scores"], atol=1e-4, rtol=1e-4, equal_nan=True)
