"""Gradients equal `torch.autograd` on the plain model, and `.grad` inside a trace."""

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.values import Site

from .values_reference import arguments, ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["layers_output", "attentions_output", "attention_head_outputs", "mlp_neurons", "layers_input"]


def metric(logits):
    return logits[:, -1, 7].sum() - logits[:, -1, 11].sum()


def plain_gradient(module, site, tokens):
    """The gradient with respect to a module's input or output, by hooks and autograd alone."""
    seen = {}

    def first(x):
        return x[0] if isinstance(x, (tuple, list)) else x

    target = module.get_submodule(site.path)
    if site.side == "output":
        handle = target.register_forward_hook(lambda _, a, out: seen.setdefault("x", first(out)) is None)
        handle.remove()

        def keep(_, args, out):
            seen["x"] = first(out)

        handle = target.register_forward_hook(keep)
    else:

        def keep(_, args, kwargs):
            seen["x"] = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))

        handle = target.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        score = metric(module(**arguments(module, tokens)).logits)
        return seen["x"].detach(), torch.autograd.grad(score, seen["x"])[0]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "gemma2", "gpt_neox", "qwen3_moe", "bloom", "falcon", "granite"]
)
def test_equal_autograd_on_the_plain_model(model_type):
    model, tokens = wrapped(model_type, eager=False, check=True), ids()
    have = [n for n in NAMES if model.support().available(n, 2)]
    got = model.gradients(tokens, metric, have[::-1], layers=[2, 1])
    for name in have:
        place = model.place(name, 2)
        site = place if isinstance(place, Site) else place.place
        value, gradient = plain_gradient(model._module, site, tokens)
        for mine, theirs in ((got.value((name, 2)), value), (got[name, 2], gradient)):
            torch.testing.assert_close(mine.reshape(theirs.shape), theirs, atol=1e-5, rtol=1e-4)
    assert got.layers[have[0]] == (2, 1)


@pytest.mark.parametrize("value", ["mlps_output", "mlp_contributions"])
def test_what_the_model_adds_to_in_place_is_kept_as_it_was(value):
    """Falcon adds its attention's output to its feed-forward's in place."""
    model, tokens, seen = wrapped("falcon", eager=False, check=True), ids(), {}

    def keep(_, args, out):
        seen["value"] = out.detach().clone()
        out.register_hook(lambda gradient: seen.update(gradient=gradient.clone()))

    handle = model._module.transformer.h[1].mlp.register_forward_hook(keep)
    metric(model._module(**arguments(model._module, tokens)).logits).backward()
    handle.remove()
    model._module.zero_grad()
    got = model.gradients(tokens, metric, value)
    assert torch.allclose(got.value((value, 1)), seen["value"], atol=1e-5)
    assert torch.allclose(got[value, 1], seen["gradient"], atol=1e-5)


def test_derived_values():
    """What is no tensor of the model: its gradient is that of what a change of it changes."""
    model, tokens = wrapped("granite", check=True), ids()  # contributions are scaled by 0.7
    names = [
        "attention_contributions",
        "mlp_contributions",
        "layers_mid",
        "attention_head_contributions",
        "layers_output",
    ]
    got = model.gradients(tokens, metric, names)
    # A change of what the feed-forward adds is the same change of the layer's output.
    torch.testing.assert_close(got["mlp_contributions"], got["layers_output"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got["attention_contributions"], got["layers_mid"], atol=1e-5, rtol=1e-4)
    heads = got["attention_head_contributions"]
    assert heads.shape[3] == model.num_heads
    assert torch.equal(heads[:, :, :, 0], heads[:, :, :, 1])
    # And by finite differences, through the accessor's own write.
    step = torch.randn(got.value("attention_head_contributions").shape[1:], generator=torch.Generator().manual_seed(0))
    scores = []
    for sign in (1, -1):
        with torch.no_grad(), model.trace(tokens):
            value = model.attention_head_contributions[1]
            model.attention_head_contributions[1] = value + sign * 1e-2 * step
            scores.append(metric(model.logits).item())
            scores.save()
    slope = (scores[0] - scores[1]) / 2e-2
    assert slope == pytest.approx((heads[1] * step).sum().item(), rel=2e-2, abs=1e-2)


def test_probabilities_and_transformer_lens_names():
    model, tokens = wrapped("llama", check=True), ids()
    got = model.gradients(tokens, metric, ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"])
    probs, values = got.value("attention_probabilities")[0], got["blocks.1.attn.hook_v"]
    assert probs.shape == got["attention_probabilities", 1].shape == (2, 4, 12, 12)
    assert values.shape == (2, 12, model.num_kv_heads, model.head_dim)
    assert got["attention_probabilities"].abs().max() > 0


def test_frozen_weights():
    model, tokens = wrapped("gpt2", check=True), ids()
    expected = model.gradients(tokens, metric, "layers_output")
    for parameter in model._module.parameters():
        parameter.requires_grad_(False)
    try:
        got = model.gradients(tokens, metric, "layers_output")
    finally:
        for parameter in model._module.parameters():
            parameter.requires_grad_(True)
    torch.testing.assert_close(got["layers_output"], expected["layers_output"])


def test_refusals():
    model, tokens = wrapped("gpt2", check=True), ids()
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model.gradients(tokens, metric, "layers_output")
    with pytest.raises(ValueError, match="one number"):
        model.gradients(tokens, lambda logits: logits[:, -1], "layers_output")
    with pytest.raises(ValueError, match="differentiable"):
        model.gradients(tokens, lambda logits: logits.argmax().float(), "layers_output")
    with pytest.raises(InsideTraceError), model.trace(tokens):
        model.gradients(tokens, metric, "layers_output")
    with pytest.raises(KeyError, match="not asked for"):
        model.gradients(tokens, metric, "layers_output")["mlp_neurons"]


def test_grad_of_an_accessor_inside_a_trace():
    """Gradients come backwards, so they are read from the last layer to the first."""
    model, tokens = wrapped("llama", check=True), ids()
    with model.trace(tokens):
        early, late = model.layers_output[1], model.layers_output[3]
        score = metric(model.logits)
        with score.backward():
            late_grad = late.grad.save()
            early_grad = early.grad.save()
    model._module.zero_grad()
    got = model.gradients(tokens, metric, "layers_output")
    torch.testing.assert_close(late_grad, got["layers_output", 3])
    torch.testing.assert_close(early_grad, got["layers_output", 1])


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("diffllama", "attention_values"),
        ("diffllama", "attention_scores"),
        ("diffllama", "attention_head_contributions"),
        ("deepseek_v4", "attention_head_contributions"),
        ("jetmoe", "attention_head_outputs"),
        ("deepseek_v3", "shared_expert_neurons"),
    ],
)
def test_gradients_are_what_a_step_changes(model_type, name):
    """Values kept in parts, several times over, or behind two projections: the derivative along it is its square."""
    module = tiny_model(model_type).double()
    module.set_experts_implementation("eager")  # the grouped products know no double precision
    model = StandardizedTransformer(
        module, tokenizer=tiny_tokenizer(), enable_attention_probs=True, check_renaming=False
    )
    tokens, layer = ids(2, 8), model.support()[name][-1]

    gradient = model.gradients(tokens, metric, name, layers=layer)[name, layer]
    step = gradient / gradient.abs().max()
    moved = []
    for size in (1e-3, -1e-3):
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            value = getattr(model, name)[layer]
            getattr(model, name)[layer] = value + size * step
            moved.append(metric(model.logits).save())
    along = (gradient * step).sum()
    assert along > 0.1
    # Norms and softmaxes round to single precision inside.
    assert abs((moved[0] - moved[1]).item() / 2e-3 - along.item()) < 5e-3 * along.item()
