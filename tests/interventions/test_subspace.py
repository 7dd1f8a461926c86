"""Patching subspaces against plain hooks with projections, and what fitting them finds."""

import pytest
import torch

from nnterp.errors import InsideTraceError, ShapeError
from nnterp.interventions import Result, SubspaceResult, fit_subspace, logit_difference, patch_subspace

from .hooked import gradients_of_weights, run, value

CLEAN = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15]]
CORRUPTED = [[11, 42, 99, 93, 130, 201], [60, 31, 101, 180]]
METRIC = logit_difference(5, 9)
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo"}
ORDERED = [(a, b) for a in CAPITALS for b in CAPITALS if a != b]
COUNTRIES = (
    [f"The capital of {a} is" for a, _ in ORDERED],
    [f"The capital of {b} is" for _, b in ORDERED],
    logit_difference([f" {CAPITALS[a]}" for a, _ in ORDERED], [f" {CAPITALS[b]}" for _, b in ORDERED]),
)


def number(logits):
    return (logits[5] - logits[9]).item()


def by_hook(model, into, source, name, layer, basis, index):
    """The metric with one run's values in a subspace put into another, by a hook and the projection onto the basis."""
    project = basis @ torch.linalg.inv(basis.T @ basis) @ basis.T
    given = value(model, source, name, layer)

    def patched(x):
        x = x.clone()
        x[0][index] = x[0][index] + (given[index] - x[0][index]) @ project
        return x

    return number(run(model, into, [(name, layer, patched)]))


CASES = [("llama", "layers_output"), ("gpt2", "mlp_neurons"), ("opt", "mlp_contributions"), ("mamba", "layers_output")]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_subspace_is_patched_as_by_a_hook_with_a_projection(tiny, kind, name, direction):
    model = tiny(kind)
    width = value(model, CLEAN[0], name, 1).shape[-1]
    basis = torch.randn(width, 3, generator=torch.Generator().manual_seed(1))  # not orthonormal
    found = patch_subspace(
        model, CLEAN, CORRUPTED, METRIC, name, 1, basis, [1, -1], direction=direction, controls=2, batch_size=3
    )
    into, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    assert found["control"].shape == (2, 2)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(3))
    for i in range(2):
        at = torch.tensor([1, len(into[i]) - 1])
        expected = by_hook(model, into[i], source[i], name, 1, basis, at)
        assert found["scores"][i].item() == pytest.approx(expected, abs=1e-3)
        whole = by_hook(model, into[i], source[i], name, 1, torch.eye(width), at)
        assert found["whole"][i].item() == pytest.approx(whole, abs=1e-3)
        for side, prompt in (("clean", CLEAN[i]), ("corrupted", CORRUPTED[i])):
            assert found[side][i].item() == pytest.approx(number(run(model, prompt)), abs=1e-3)
    assert (found["scores"] - found["whole"]).abs().max() > 1e-2
    everything = patch_subspace(model, CLEAN, CORRUPTED, METRIC, name, 1, torch.eye(width), [1, -1], controls=1)
    torch.testing.assert_close(everything["scores"], everything["whole"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(everything["control"][:, 0], everything["whole"], atol=1e-3, rtol=1e-3)


def test_one_head_of_a_value(tiny):
    model = tiny("llama")
    given = value(model, CLEAN[0], "attention_head_outputs", 1)
    basis = torch.randn(given.shape[-1], 2, generator=torch.Generator().manual_seed(1))
    found = patch_subspace(model, CLEAN[:1], CORRUPTED[:1], METRIC, "attention_head_outputs", 1, basis, -1, head=2)
    expected = by_hook(model, CORRUPTED[0], CLEAN[0], "attention_head_outputs", 1, basis, (torch.tensor([5]), 2))
    assert found["scores"][0].item() == pytest.approx(expected, abs=1e-3)


def test_what_is_recovered():
    found = SubspaceResult(
        {
            "scores": torch.tensor([1.0, 3.0]),
            "control": torch.tensor([[0.0, 2.0], [0.0, 4.0]]),
            "clean": torch.tensor([2.0, 4.0]),
            "corrupted": torch.tensor([0.0, 0.0]),
            "basis": torch.ones(1, 1),
        },
        {
            "scores": ("prompts",),
            "control": ("prompts", "controls"),
            "clean": ("prompts",),
            "corrupted": ("prompts",),
            "basis": ("width", "dimensions"),
        },
        {"prompts": ("a", "b"), "controls": (0, 1), "width": (0,), "dimensions": (0,)},
        about={"arguments": {"direction": "denoising"}},
    )
    assert found.recovered() == pytest.approx(1 - 2 / 20)
    assert found.recovered("control") == pytest.approx(0.5)


def test_a_fitted_subspace_recovers_what_random_ones_do_not(toy, tmp_path):
    before = gradients_of_weights(toy._module)
    found = fit_subspace(toy, *COUNTRIES, "layers_output", 3, 8, positions=[3, -1], steps=40)
    losses = found["losses"]
    assert losses.shape == (40,)
    assert losses[-5:].mean() < 0.2 * losses[0]
    assert len(found.labels["prompts"]) == 5
    assert set(found.labels["prompts"]) | set(found.about["arguments"]["fitted_on"]) == set(COUNTRIES[0])
    assert found.recovered() > 0.7
    assert found.recovered("control") < 0.3
    assert found.recovered("whole") > 0.95
    again = patch_subspace(toy, *COUNTRIES, "layers_output", 3, found, positions=[3, -1])
    assert again.recovered() > 0.7
    found.save(tmp_path / "subspace")
    loaded = Result.load(tmp_path / "subspace")
    assert torch.equal(loaded.basis, found.basis)
    assert "8 of 128 dimensions, 5 pairs" in repr(loaded)
    same = fit_subspace(toy, *COUNTRIES, "layers_output", 3, 8, positions=[3, -1], steps=3)
    torch.testing.assert_close(same["losses"], losses[:3])
    assert gradients_of_weights(toy._module) == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_only_direction_that_matters_is_found(tiny, kind):
    """Before the head, a difference of two logits depends on one direction, except for what the norm divides by."""
    model = tiny(kind)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(10, 250, (200, 5), generator=generator).tolist() for _ in range(2))
    last = model.num_layers - 1
    found = fit_subspace(model, clean, corrupted, METRIC, "layers_output", last, 1, steps=150, lr=0.02)
    head = model._module.get_submodule(model.anatomy.lm_head).weight
    norm = model._module.get_submodule(model.anatomy.ln_final).weight
    direction = (head[5] - head[9]) * norm
    direction = direction - direction.mean() if kind == "gpt2" else direction
    assert torch.cosine_similarity(found.basis[:, 0], direction.detach(), dim=0).abs() > 0.95
    assert found.recovered() > 0.8 > 0.3 > found.recovered("control")


def test_the_loss_is_that_of_patched_runs(tiny):
    """The first loss, of prompts of different lengths in one batch, against exact runs with the same subspace."""
    model = tiny("gemma2")
    clean, corrupted = [*CLEAN, [33, 70, 91]], [*CORRUPTED, [34, 70, 92]]
    found = fit_subspace(
        model, clean, corrupted, METRIC, "layers_output", 1, 3, steps=1, lr=1e-12, held_out=0.3, direction="noising"
    )
    held = found.labels["prompts"]
    inside = [i for i, ids in enumerate(clean) if model.tokenizer.decode(ids) not in held]
    assert len(inside) == 2
    exact = patch_subspace(
        model,
        [clean[i] for i in inside],
        [corrupted[i] for i in inside],
        METRIC,
        "layers_output",
        1,
        found,
        direction="noising",
    )
    assert found["losses"][0].item() == pytest.approx(1 - exact.recovered(), abs=1e-4)


def test_refusals(toy):
    one = ("The capital of France is", "The capital of Italy is", logit_difference(" Paris", " Rome"))
    with pytest.raises(ShapeError, match=r"\[128, dimensions\]"):
        patch_subspace(toy, *one, "layers_output", 3, torch.randn(64, 2))
    with pytest.raises(ValueError, match="depend on others"):
        patch_subspace(toy, *one, "layers_output", 3, torch.ones(128, 2))
    with pytest.raises(TypeError, match="basis is a tensor"):
        patch_subspace(toy, *one, "layers_output", 3, "x")
    with pytest.raises(ValueError, match="at least two pairs"):
        fit_subspace(toy, *one, "layers_output", 3)
    many = ([one[0]] * 4, [one[1]] * 4)
    with pytest.raises(ValueError, match="differentiable"):
        fit_subspace(toy, *many, lambda logits: logits.argmax(-1).float(), "layers_output", 3)
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_subspace(toy, many[0], many[0], one[2], "layers_output", 3)
    with pytest.raises(ValueError, match="dimensions must be at least 1, at most 128"):
        fit_subspace(toy, *many, one[2], "layers_output", 3, 129)
    with pytest.raises(ValueError, match="share no subspace"):
        patch_subspace(toy, *one, "attention_probabilities", 3, torch.randn(5, 1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        fit_subspace(toy, *many, one[2], "layers_output", 3)
    with pytest.raises(InsideTraceError), toy.trace("a"):
        patch_subspace(toy, *one, "layers_output", 3, torch.randn(128, 1))


def test_the_subspace_so_far_outlives_an_error(toy):
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return logits[:, 7] - logits[:, 8]

    with pytest.raises(KeyboardInterrupt) as caught:
        fit_subspace(toy, *COUNTRIES[:2], failing, "layers_output", 3, 2, steps=50, batch_size=4)
    partial = caught.value.partial
    assert partial.basis.shape == (128, 2)
    assert len(partial["losses"]) >= 1
    again = patch_subspace(toy, *COUNTRIES, "layers_output", 3, partial)
    assert again.basis.shape == (128, 2)
