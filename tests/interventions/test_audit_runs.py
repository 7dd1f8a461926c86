"""The audit of attribution takes unedited runs from the estimates, and finds what activation patching finds."""

import pytest

from nnterp.interventions import activation_patching, attribution_patching, logit_difference

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
