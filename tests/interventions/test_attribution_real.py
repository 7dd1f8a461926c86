"""Attribution patching on a trained model: the heads that exact patching finds, and an audit that agrees."""

import pytest

from nnterp.interventions import attribution_patching, logit_difference

pytestmark = [pytest.mark.real, pytest.mark.slow]

STORE = "When {} and {} went to the store, {} gave a drink to"


def test_indirect_objects_on_smollm2(real):
    """Exact patching finds 23.3 (0.57 of the difference), 29.1 (0.27) and 20.0 (0.19)."""
    model = real("smollm2")
    pairs = [("Mary", "John"), ("John", "Mary"), ("Tom", "Mary")]
    found = attribution_patching(
        model,
        [STORE.format(a, b, b) for a, b in pairs],
        [STORE.format(a, b, a) for a, b in pairs],
        logit_difference([f" {a}" for a, _ in pairs], [f" {b}" for _, b in pairs]),
        "attention_head_outputs",
        heads="all",
        audit=20,
        progress=False,
    )
    parts = found.normalized()["scores"].mean(0)
    strongest = [divmod(int(i), parts.shape[1]) for i in parts.flatten().argsort(descending=True)[:6]]
    assert strongest[0] == (23, 3)
    assert {(29, 1), (20, 0)} < set(strongest)
    assert 0.4 < parts[23, 3] < 0.7
    assert found.audit.rank_correlation > 0.9
    assert found.audit.sign_errors == 0
