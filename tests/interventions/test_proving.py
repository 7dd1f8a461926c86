"""What is proven once for a model is kept on it, and proven anew with it."""

import pytest

import nnterp
from nnterp import StandardizedTransformer
from nnterp.interventions import _proving, activation_patching, components, logit_difference
from nnterp.interventions._engine import Shortcuts
from nnterp.interventions._proving import proven_shortcuts
from nnterp.testing import tiny_model, tiny_tokenizer

CLEAN, CORRUPTED = [11, 42, 57, 93], [11, 42, 99, 93]


@pytest.fixture
def model():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture
def runs(model):
    """Counts forward passes of the model."""
    ran = []
    handle = model._module.register_forward_pre_hook(lambda *_: ran.append(True))
    yield ran
    handle.remove()


def test_shortcuts_are_proven_once_until_the_model_is_validated_anew(model, runs):
    first = proven_shortcuts(model)
    assert first.prefix
    assert runs
    assert first in model.proofs.values()
    runs.clear()
    assert proven_shortcuts(model) is first
    assert not runs
    model.validate()
    assert not model.proofs
    runs.clear()
    assert proven_shortcuts(model) == first
    assert runs


def test_a_proof_holds_for_one_dtype_and_mode(model, runs):
    proven_shortcuts(model)
    runs.clear()
    model._module.train()
    proven_shortcuts(model)
    assert runs
    assert len(model.proofs) == 2


def test_another_model_has_proofs_of_its_own(model):
    proven_shortcuts(model)
    assert not StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer()).proofs


def test_heads_are_counted_once(model, runs):
    listed = components(model, "attention_head_outputs", heads="all")
    assert len(listed) == model.num_layers * model.num_heads
    assert runs
    runs.clear()
    assert components(model, "attention_head_outputs", heads="all") == listed
    assert not runs


def test_nothing_is_proven_for_a_remote_run(model, runs):
    assert proven_shortcuts(model, remote=True) == Shortcuts()
    assert not runs
    assert not model.proofs


def test_a_call_proves_at_most_once(model, runs):
    metric = logit_difference(5, 9)
    activation_patching(model, CLEAN, CORRUPTED, metric)
    first = len(runs)
    runs.clear()
    again = activation_patching(model, CLEAN, CORRUPTED, metric)
    assert 0 < len(runs) < first
    assert again["scores"].isfinite().all()


def test_shortcuts_are_taken_from_disk_for_the_very_same_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NNTERP_CACHE", str(tmp_path))
    first = proven_shortcuts(StandardizedTransformer(nnterp.toy_checkpoint()))
    model = StandardizedTransformer(nnterp.toy_checkpoint())
    model.dispatch()
    edited = StandardizedTransformer(nnterp.toy_checkpoint())
    edited.dispatch()
    edited._module.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1e-3
    proofs = []
    prove = _proving._prove
    monkeypatch.setattr(_proving, "_prove", lambda own: proofs.append(own) or prove(own))
    assert proven_shortcuts(model) == first
    assert proofs == []
    proven_shortcuts(edited)
    assert proofs == [edited]
