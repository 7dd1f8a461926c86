"""`project_on_vocab(hidden, tokens)`: the logits of some tokens are those columns of all logits."""

import pytest
import torch

from nnterp.errors import ShapeError

from ...models import eager
from .values_reference import ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = [7, 500, 7, 31]


# Plain; a softcap; a factor on the logits; a bias in the head; a head of several modules.
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "phi", "bert"])
def test_logits_of_some_tokens_are_huggingfaces(model_type):
    model, tokens = wrapped(model_type, check=True), ids(2, 6)
    with torch.no_grad():
        own = model._module(input_ids=tokens).logits[..., TOKENS]
        with model.trace(tokens):
            leaving = model.layers_output[-1].save()
            inside = model.project_on_vocab(leaving, TOKENS).save()
        for found in (inside, model.project_on_vocab(leaving, torch.tensor(TOKENS))):
            torch.testing.assert_close(found, own)
        torch.testing.assert_close(model.project_on_vocab(leaving[0, 1], TOKENS), own[0, 1])


def test_small_integers_are_ids():
    model, hidden = wrapped("llama", check=True), torch.randn(3, 64)
    found = model.project_on_vocab(hidden, torch.tensor([7, 31], dtype=torch.int8))
    torch.testing.assert_close(found, model.project_on_vocab(hidden)[:, [7, 31]])


def test_a_hook_on_every_module_counts():
    model, hidden = wrapped("llama", check=True), torch.randn(3, 64)
    head, before = model._module.lm_head, model.project_on_vocab(hidden, TOKENS)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, _, out: out * 2 if m is head else None)
    try:
        torch.testing.assert_close(model.project_on_vocab(hidden, TOKENS), before * 2)
    finally:
        handle.remove()


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_a_changed_head_is_run_as_it_is(change):
    model, hidden = eager.__wrapped__("llama"), torch.randn(3, 64)  # its own, since it is changed
    before, head = model.project_on_vocab(hidden, TOKENS), model._module.lm_head
    if change == "hook":
        head.register_forward_hook(lambda _, args, output: output * 2)
    else:
        state, plain = head.__dict__["__nnsight__"], head.weight.detach().clone()
        state.original = state.body = lambda _, given: given @ plain.T * 2
    after = model.project_on_vocab(hidden, TOKENS)
    torch.testing.assert_close(after, before * 2)
    torch.testing.assert_close(after, model.project_on_vocab(hidden)[:, TOKENS])


@pytest.mark.parametrize("tokens", [[], [-1], [509], [1.5], [[1, 2]], [True], torch.tensor(3), "cat", ["cat"], {1, 2}])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_what_is_no_list_of_ids_is_refused(tokens, model_type):
    model = wrapped(model_type, check=True)
    with pytest.raises(ValueError, match="ids from 0 to 508"):
        model.project_on_vocab(torch.zeros(2, 64), tokens)
    with pytest.raises(ShapeError):
        model.project_on_vocab(torch.zeros(2, 63), [1])


def test_a_final_norm_that_also_runs_on_embeddings_is_read_where_it_runs_last(tiny):
    model, ids = tiny("nanochat"), torch.tensor([[5, 9, 12, 40]])
    assert model.facts.repeated == {"model.norm": 2}
    with torch.no_grad():
        expected = model._module(ids, output_hidden_states=True)
    with torch.no_grad(), model.trace(ids):
        last = model.layers_output[-1].save()
        read = model.ln_final_output.clone().save()
        model.ln_final_output = read * 2
        written = model.logits.save()
    assert torch.equal(read, expected.hidden_states[-1])
    assert torch.equal(model.project_on_vocab(last), expected.logits)
    softcap = model._module.config.final_logit_softcapping
    assert torch.allclose(written, softcap * torch.tanh(model._module.lm_head(read * 2) / softcap), atol=1e-4)
