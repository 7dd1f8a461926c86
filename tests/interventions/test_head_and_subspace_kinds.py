"""Kinds of heads, and subspaces patched and fitted, on architectures of every build, against plain torch hooks."""

from __future__ import annotations

import pytest
import torch

from nnterp.interventions import fit_subspace, head_scores, logit_difference, patch_subspace
from nnterp.interventions._heads import _run

from .hooked import ending
from .hooked import run as run_anew
from .test_architectures import ALL, NO_ATTENTION, eager, run, value
from .test_head_scores import KINDS, share

pytestmark = pytest.mark.slow

PROMPTS = [[11, 42, 57, 42, 42, 57, 93], [60, 77, 60, 15, 77]]
TARGETS = [57, 77]
CLEAN = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15], [33, 70, 91, 140, 12]]
CORRUPTED = [[11, 42, 99, 93, 130, 201], [60, 31, 101, 180], [34, 70, 92, 140, 13]]
METRIC = logit_difference(5, 9)
WITH_ATTENTION = [kind for kind in ALL if kind not in NO_ATTENTION]
# Attention adds what W_O returns: no norm and no multiplier stands between, and heads have values of one kind.
PLAIN_ENDS = """
gpt2 llama gemma mistral mixtral qwen2 qwen3 qwen3_moe phi phi3 gpt_neox gptj gpt_neo opt falcon codegen cohere cohere2
olmo stablelm starcoder2 jamba lfm2 bamba nemotron xglm gpt_bigcode smollm3 biogpt ministral gpt_oss
""".split()


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_scores_equal_a_slow_loop_over_plain_patterns(kind):
    model = eager(kind)
    layer = model.attention_layers[-1]
    patterns = [value(model, ids, "attention_probabilities", layer) for ids in PROMPTS]
    for name in KINDS[WITH_ATTENTION.index(kind) % 2 :: 2]:
        found = head_scores(model, name, PROMPTS, layers=[layer], draws=2, progress=False)["by_prompt"][:, 0]
        for i, ids in enumerate(PROMPTS):
            expected = torch.tensor([share(head, ids, name) for head in patterns[i]])
            torch.testing.assert_close(found[i], expected, atol=2e-5, rtol=1e-4)


def values_of(model, ids, layer):
    """What each head writes if it attends to one position alone, before W_O: `[keys, heads, head_dim]`, by hooks."""
    found = []
    for key in range(len(ids)):
        seen = []

        def alone(pattern, key=key):
            new = torch.zeros_like(pattern)
            new[..., key] = 1
            return new

        hooks = [("attention_probabilities", layer, alone), ("attention_head_outputs", layer, seen.append)]
        run_anew(model, ids, hooks)
        found.append(seen[0][0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("kind", PLAIN_ENDS)
@torch.no_grad()
def test_name_movers_equal_a_loop_of_forced_patterns(kind, monkeypatch):
    """Random heads copy hardly anything into the top five of 509 tokens, so the comparison is on the top hundred."""
    monkeypatch.setattr(_run, "COPIED", 100)
    model = eager(kind)
    layer, module = model.attention_layers[-1], model._module
    found = head_scores(model, "name_mover", PROMPTS, TARGETS, layers=[layer], draws=2, progress=False)
    norm, head = (module.get_submodule(path) for path in (model.anatomy.ln_final, model.anatomy.lm_head))
    out = ending(model, "self_attn", layer)
    for i, (ids, token) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        values, pattern = values_of(model, ids, layer), value(model, ids, "attention_probabilities", layer)
        expected = torch.zeros(values.shape[1])
        for key in [k for k, own in enumerate(ids[:-1]) if own == token]:
            for h in range(len(expected)):
                alone = torch.zeros_like(values[key])
                alone[h] = values[key, h]
                written = out(alone.reshape(1, 1, -1)) - out(torch.zeros_like(alone).reshape(1, 1, -1))
                logits = head(norm(written))[0, 0]
                expected[h] += pattern[h, -1, key] * (token in logits.topk(100).indices)
        torch.testing.assert_close(found["by_prompt"][i, 0], expected, atol=1e-5, rtol=1e-4)


def number(logits):
    return (logits[5] - logits[9]).item()


def by_hook(model, i, layer, basis, at):
    """The metric of the corrupted run with the clean run's stream in a subspace, by a hook and a projection."""
    given = value(model, CLEAN[i], "layers_output", layer)[at]
    project = basis @ torch.linalg.inv(basis.T @ basis) @ basis.T

    def patched(x):
        x = x.clone()
        x[0, at] = x[0, at] + (given - x[0, at]) @ project
        return x

    return number(run_anew(model, CORRUPTED[i], [("layers_output", layer, patched)]))


@pytest.mark.parametrize("kind", ALL)
def test_subspaces_are_patched_and_fitted_as_by_hooks(kind):
    model = eager(kind)
    layer = model.num_layers // 2
    basis = torch.randn(model.hidden_size, 3, generator=torch.Generator().manual_seed(1))
    call = (model, CLEAN, CORRUPTED, METRIC, "layers_output", layer)
    found = patch_subspace(*call, basis, [1, -1], controls=1)
    size = max(1.0, *(float(run(model, ids).abs().max()) for ids in CORRUPTED))
    for i, ids in enumerate(CORRUPTED):
        expected = by_hook(model, i, layer, basis, torch.tensor([1, len(ids) - 1]))
        assert found["scores"][i].item() == pytest.approx(expected, abs=1e-4 * size)
    assert (found["scores"] - found["corrupted"]).abs().max() > 1e-3

    fitted = fit_subspace(*call, 2, [1, -1], steps=2, lr=1e-9, held_out=0.3, controls=1)
    held = fitted.labels["prompts"]
    losses, gaps = [], []
    for i, ids in enumerate(CORRUPTED):
        expected = by_hook(model, i, layer, fitted.basis, torch.tensor([1, len(ids) - 1]))
        source, into = number(run(model, CLEAN[i])), number(run(model, ids))
        label = model.tokenizer.decode(CLEAN[i])
        if label in held:
            assert fitted["scores"][held.index(label)].item() == pytest.approx(expected, abs=1e-4 * size)
        else:
            losses.append((expected - source) ** 2)
            gaps.append((into - source) ** 2)
    assert len(losses) == 2
    assert fitted["losses"].tolist() == pytest.approx([sum(losses) / sum(gaps)] * 2, rel=1e-3, abs=1e-3)
