"""Vectors by gradient descent against the same descent with a torch hook; the weights stay as they are."""

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.interventions import SteeringVector, optimize_vector
from nnterp.testing import tiny_model, tiny_tokenizer

PROMPTS = ["The capital of France is", "A cat"]


def by_hooks(model, ids, lengths, layer, start, steps, lr):
    """Adam on the log-probability of the last `lengths` tokens, one row at a time, by a hook on the layer."""
    module, value = model._module, start.clone().requires_grad_(True)
    adam, losses = torch.optim.Adam([value], lr=lr), []

    def add(_, __, output):
        stream = output if isinstance(output, torch.Tensor) else output[0]
        return stream + value if isinstance(output, torch.Tensor) else (stream + value, *output[1:])

    handle = module.get_submodule(model.layer_paths[layer]).register_forward_hook(add)
    for _ in range(steps):
        adam.zero_grad()
        loss = 0
        for row, length in zip(ids, lengths, strict=True):
            logs = module(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
            loss = loss - sum(logs[i - 1, row[i]] for i in range(len(row) - length, len(row))) / len(ids)
        (value.grad,) = torch.autograd.grad(loss, value)
        losses.append(loss.item())
        adam.step()
    handle.remove()
    return value.detach(), losses


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "jamba"])
def test_equals_the_same_descent_with_a_hook(tiny, kind):
    model = tiny(kind)
    targets = [[7, 9, 11], [12]]
    rows = [[*model.tokenizer(p).input_ids, *t] for p, t in zip(PROMPTS, targets, strict=True)]
    before = {name: p.clone() for name, p in model._module.named_parameters()}
    wanted = {name: p.requires_grad for name, p in model._module.named_parameters()}
    grads = {name: p.grad for name, p in model._module.named_parameters()}
    found = optimize_vector(
        model, PROMPTS, targets, 1, steps=5, lr=0.2, seed=3, batch_size=1 if kind == "llama" else 16
    )
    start = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(3)) * 1e-2
    value, losses = by_hooks(model, rows, [3, 1], 1, start, 5, 0.2)
    assert found.layers == (1,)
    torch.testing.assert_close(found[1], value, rtol=1e-3, atol=1e-3)
    assert found.details["losses"][:5] == pytest.approx(losses, rel=1e-3)
    assert len(found.details["losses"]) == 6
    assert found.details["losses"][-1] < losses[0]
    for name, parameter in model._module.named_parameters():
        assert parameter.grad is grads[name]
        assert parameter.requires_grad == wanted[name]
        assert torch.equal(parameter, before[name])


def test_the_target_is_what_comes_next_and_the_norm_holds(toy):
    found = optimize_vector(
        toy, ["The capital of France is", "The capital of Japan is"], " Rome", 2, steps=40, norm=12.0
    )
    assert found.norms[2] <= 12.0 * (1 + 1e-5)
    (rome,) = toy.tokenizer(" Rome").input_ids
    with torch.no_grad(), toy.steering(found), toy.trace("The capital of Italy was; the capital of France is"):
        logits = toy.logits[0, -1].save()
    assert logits.argmax() == rome
    losses = found.details["losses"]
    assert losses[-1] < 0.2 * losses[0]
    again = optimize_vector(
        toy, ["The capital of France is", "The capital of Japan is"], [" Rome", " Rome"], 2, steps=40, norm=12.0
    )
    assert again.similarity(found)[2] > 0.9999
    assert again.details["seed"] == 0


def test_the_loss_is_that_of_the_returned_vector(tiny):
    model = tiny("llama")
    found = optimize_vector(model, PROMPTS[0], [[5, 6]], -1, steps=3)
    ids = [*model.tokenizer(PROMPTS[0]).input_ids, 5, 6]
    with torch.no_grad(), model.steering(found), model.trace(ids):
        logs = model.logits[0].log_softmax(-1).save()
    assert found.details["losses"][-1] == pytest.approx(-(logs[-3, 5] + logs[-2, 6]).item(), rel=1e-4)


def test_works_under_no_grad_with_frozen_and_half_precision_weights():
    module = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        found = optimize_vector(model, PROMPTS, [[7]] * 2, 1, steps=8, lr=0.5)
    assert found.details["losses"][-1] < found.details["losses"][0]
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((PROMPTS, ["a", "b", "c"], 1), {}, ValueError, "3 targets for 2 prompts"),
        ((PROMPTS, "", 1), {}, ValueError, "no tokens"),
        ((PROMPTS, "a", 99), {}, IndexError, "99"),
        ((PROMPTS, "a", 1), {"steps": 0}, ValueError, "steps=0"),
        ((PROMPTS, "a", 1), {"lr": -1.0}, ValueError, "positive"),
        ((PROMPTS, "a", 1), {"norm": 0.0}, ValueError, "positive"),
        ((PROMPTS, [[10**9], [1]], 1), {}, ValueError, "token id"),
        (([], "a", 1), {}, ValueError, "No prompts"),
    ],
)
def test_refuses(tiny, arguments, options, error, message):
    with pytest.raises(error, match=message):
        optimize_vector(tiny("llama"), *arguments, **options)


def test_an_interrupt_keeps_the_vector_so_far(tiny, monkeypatch):
    from nnterp.interventions._vectors import _optimize

    model, whole, calls = tiny("llama"), _optimize._descend, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    wanted = [p.requires_grad for p in model._module.parameters()]
    monkeypatch.setattr(_optimize, "_descend", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        optimize_vector(model, PROMPTS, [[7]] * 2, 1, steps=5)
    assert isinstance(caught.value.partial, SteeringVector)
    assert len(caught.value.partial.details["losses"]) == 2
    assert [p.requires_grad for p in model._module.parameters()] == wanted
