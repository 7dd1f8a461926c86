"""ProphetNet keeps its streams one after the other; they are shown as `[batch, seq, streams, hidden]`."""

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.readout import StreamLayout
from nnterp.testing import tiny_model, tiny_tokenizer

from .values_reference import ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def prophetnet():
    return wrapped("prophetnet", check=True)


def test_streams_are_huggingfaces_own(prophetnet):
    tokens = ids(2, 6)
    with torch.no_grad():
        own = prophetnet._module(input_ids=tokens, output_hidden_states=True)
    for layer in range(4):
        with torch.no_grad(), prophetnet.trace(tokens):
            entering = prophetnet.layers_input[layer].clone().save()
            neurons = prophetnet.mlp_neurons[layer].clone().save()
            leaving = prophetnet.layers_output[layer].clone().save()
        assert leaving.shape == (2, 6, 3, 64)
        assert neurons.shape == (2, 6, 3, 112)
        for stream, index in ((entering, layer), (leaving, layer + 1)):
            assert torch.equal(stream[:, :, 0], own.hidden_states[index])
            assert torch.equal(stream[:, :, 1:].transpose(1, 2).flatten(1, 2), own.hidden_states_ngram[index])
    torch.testing.assert_close(prophetnet.project_on_vocab(leaving), own.logits)


@pytest.mark.parametrize("name", ["layers_output", "attentions_output", "mlp_contributions", "mlp_neurons"])
def test_an_edit_in_place_is_an_assignment(prophetnet, name):
    tokens = ids(2, 6)
    with torch.no_grad(), prophetnet.trace(tokens):
        getattr(prophetnet, name)[1][0, 2, 1] *= 0.5
        edited = prophetnet.logits.save()
    with torch.no_grad(), prophetnet.trace(tokens):
        value = getattr(prophetnet, name)[1].clone()
        clean = prophetnet.logits.save()
        value[0, 2, 1] *= 0.5
    with torch.no_grad(), prophetnet.trace(tokens):
        value = getattr(prophetnet, name)[1].clone()
        value[0, 2, 1] *= 0.5
        getattr(prophetnet, name)[1] = value
        assigned = prophetnet.logits.save()
    torch.testing.assert_close(edited, assigned)
    assert (edited - clean)[0].abs().max() > 1e-4
    assert torch.equal(edited[1], clean[1])


def test_each_invoke_sees_its_own_rows(prophetnet):
    a, b = ids(1, 6, seed=1), ids(2, 6, seed=2)
    with torch.no_grad(), prophetnet.trace(b):
        alone = prophetnet.layers_output[1].clone().save()
    with torch.no_grad(), prophetnet.trace() as tracer:
        with tracer.invoke(a):
            other = prophetnet.layers_output[1].clone().save()
        with tracer.invoke(b):
            mine = prophetnet.layers_output[1].clone().save()
    assert other.shape[0] == 1
    torch.testing.assert_close(mine, alone)


def test_probabilities_are_those_the_values_are_weighted_with(prophetnet):
    """Not the copy that is reshaped for the output: what is written has an effect."""
    prophetnet.attention_probabilities.check_source(0)


def test_a_soft_prompt_of_any_length_is_no_stream():
    """CPM-Ant puts its trained positions in front of the tokens, 32 of them where it was published."""
    model = StandardizedTransformer(tiny_model("cpmant", prompt_length=32), tokenizer=tiny_tokenizer())
    assert model.readout.layout == StreamLayout(3, 0, 64, extra=32)
    with torch.no_grad(), model.trace(ids(1, 5)):
        hidden = model.layers_output[-1].save()
        logits = model.logits.save()
    assert hidden.shape == (1, 5, 64)  # the tokens' positions alone
    torch.testing.assert_close(model.project_on_vocab(hidden), logits)
