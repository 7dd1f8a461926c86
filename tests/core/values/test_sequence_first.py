"""XLNet keeps its stream as `[seq, batch, hidden]`: every accessor shows and takes it batch first."""

import dataclasses

import pytest
import torch
from torch import nn

from nnterp import StandardizedTransformer
from nnterp.errors import Unavailable, Unproven
from nnterp.testing import tiny_model, tiny_tokenizer

from .values_reference import ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

STREAMS = (
    "layers_input attentions_input attentions_output attention_contributions layers_mid mlps_input mlps_output "
    "mlp_neurons mlp_contributions layers_output"
).split()
INSIDE = ["attention_queries", "attention_keys", "attention_values"]


@pytest.fixture(scope="module")
def xlnet():
    return wrapped("xlnet", check=True)


def own(module, tokens, layer):
    """The same values by plain hooks on the HuggingFace module, turned by hand."""
    block, seen = module.transformer.layer[layer], {}

    def keep(name, turned):
        seen[name] = turned.detach().clone().transpose(0, 1)

    handles = [
        block.register_forward_pre_hook(lambda m, a: keep("layers_input", a[0])),
        block.register_forward_hook(lambda m, a, out: keep("layers_output", out[0])),
        block.rel_attn.register_forward_pre_hook(lambda m, a: keep("attentions_input", a[0])),
        block.rel_attn.layer_norm.register_forward_pre_hook(lambda m, a: keep("summed", a[0])),
        block.rel_attn.register_forward_hook(lambda m, a, out: keep("layers_mid", out[0])),
        block.ff.register_forward_pre_hook(lambda m, a: keep("mlps_input", a[0])),
        block.ff.layer_2.register_forward_pre_hook(lambda m, a: keep("mlp_neurons", a[0])),
        block.ff.layer_2.register_forward_hook(lambda m, a, out: keep("mlps_output", out)),
    ]
    with torch.no_grad():
        hidden = module(input_ids=tokens, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["layers_output"], hidden[layer + 1], atol=0, rtol=0)
    seen["attentions_output"] = seen["attention_contributions"] = seen["summed"] - seen["layers_input"]
    seen["mlp_contributions"] = seen["mlps_output"]
    return seen


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_values_equal_plain_hooks(xlnet, rows):
    """Also with as many rows as positions, where the two axes cannot be told apart by their sizes."""
    tokens = ids(rows, 12)
    expected = own(xlnet._module, tokens, 1)
    for name in STREAMS:
        with torch.no_grad(), xlnet.trace(tokens):
            value = getattr(xlnet, name)[1].clone().save()
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    with torch.no_grad(), xlnet.trace(tokens):
        embedded = xlnet.token_embeddings.clone().save()
    torch.testing.assert_close(embedded, xlnet._module.transformer.word_embedding(tokens))


# What a part is given is the stream itself here, which the model adds to as well.
SHARED = ("attentions_input", "mlps_input")


@pytest.mark.parametrize("name", [n for n in (*STREAMS, *INSIDE) if n not in SHARED])
def test_an_edit_in_place_is_an_assignment(xlnet, name):
    tokens = ids(3, 7)
    with torch.no_grad(), xlnet.trace(tokens):
        clean = xlnet.logits.save()
    with torch.no_grad(), xlnet.trace(tokens):
        getattr(xlnet, name)[1][1, 2:4] *= 0.5
        edited = xlnet.logits.save()
    with torch.no_grad(), xlnet.trace(tokens):
        value = getattr(xlnet, name)[1].clone()
        value[1, 2:4] *= 0.5
        getattr(xlnet, name)[1] = value
        assigned = xlnet.logits.save()
    torch.testing.assert_close(edited, assigned)
    moved = (edited - clean).abs().amax(dim=(1, 2))
    assert moved[1] > 1e-4
    assert moved[0] == moved[2] == 0


@pytest.mark.parametrize("name", [*STREAMS, *INSIDE, "attention_probabilities"])
@pytest.mark.parametrize("length", [3, 8])
def test_each_invoke_sees_and_writes_its_own_rows(xlnet, name, length):
    """Also with as many positions as rows in all, where nnsight would cut the wrong axis."""
    a, b = ids(1, length, seed=1), ids(2, length, seed=2)
    with torch.no_grad(), xlnet.trace(b):
        alone = getattr(xlnet, name)[1].clone().save()
        getattr(xlnet, name)[1] = alone * 0.5
        expected = xlnet.logits.save()
    with torch.no_grad(), xlnet.trace(a):
        other = xlnet.logits.save()
    with torch.no_grad(), xlnet.trace() as tracer:
        with tracer.invoke(a):
            untouched = xlnet.logits.save()
        with tracer.invoke(b):
            mine = getattr(xlnet, name)[1].clone().save()
            getattr(xlnet, name)[1] = mine * 0.5
            halved = xlnet.logits.save()
    torch.testing.assert_close(mine, alone)
    torch.testing.assert_close(halved, expected)
    torch.testing.assert_close(untouched, other)


def test_collect_and_the_readout(xlnet):
    prompts = ["The Eiffel Tower is in the city of", "When Mary and John went to the store,", "one two"]
    collected = xlnet.collect(prompts, ["layers_output", "attention_queries", "attentions_output"], positions=-1)
    for i, prompt in enumerate(prompts):
        for name in ("layers_output", "attentions_output"):
            with torch.no_grad(), xlnet.trace(prompt):
                alone = torch.stack([getattr(xlnet, name)[k][0, -1] for k in range(4)]).save()
            torch.testing.assert_close(collected[name][:, i], alone, atol=1e-5, rtol=1e-4)
        with torch.no_grad(), xlnet.trace(prompt):
            logits = xlnet.logits[0, -1].save()
        torch.testing.assert_close(
            xlnet.project_on_vocab(collected["layers_output"][3, i]), logits, atol=1e-4, rtol=1e-4
        )


def test_a_generation_with_tokens_of_its_own_is_refused(xlnet):
    """XLNet's generation appends a token whose second stream predicts: the last position is no token of the row."""
    with pytest.raises(ValueError, match="tokens of its own"):
        xlnet.collect(["one two three"], ["layers_output"], max_new_tokens=2)


def test_steering_and_skipping(xlnet):
    tokens, vector = ids(2, 6), torch.randn(64, generator=torch.Generator().manual_seed(0))
    block = xlnet._module.transformer.layer[1]

    def plain(change):
        handle = block.register_forward_hook(change)
        with torch.no_grad():
            logits = xlnet._module(input_ids=tokens).logits
        handle.remove()
        return logits

    def steered(m, args, output):
        stream = output[0].clone()
        stream[-1, 1] += 2 * vector
        return (stream, *output[1:])

    with torch.no_grad(), xlnet.trace(tokens):
        xlnet.steer(1, vector, factor=2, token_positions=-1, batch_index=1)
        logits = xlnet.logits.save()
    torch.testing.assert_close(logits, plain(steered))
    new = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), xlnet.trace(tokens):
        xlnet.skip_layers(1, 1, skip_with=new)
        logits = xlnet.logits.save()
    torch.testing.assert_close(logits, plain(lambda m, a, out: (new.transpose(0, 1), *out[1:])))
    with pytest.raises(Unavailable, match="several invokes"), torch.no_grad(), xlnet.trace() as tracer:
        with tracer.invoke(ids(1, 6)):
            xlnet.skip_layer(1)
        with tracer.invoke(ids(2, 6)):
            xlnet.skip_layer(1)


def test_gradients_equal_autograd_on_the_plain_model(xlnet):
    tokens = ids(2, 6)
    found = xlnet.gradients(tokens, lambda logits: logits[:, -1, 7].sum(), ["layers_output", "attentions_output"])
    module, kept = xlnet._module, {}
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: kept.update({i: out[0]}))
        for i, block in enumerate(module.transformer.layer)
    ]
    module(input_ids=tokens).logits[:, -1, 7].sum()
    score = module(input_ids=tokens).logits[:, -1, 7].sum()
    own = torch.autograd.grad(score, [kept[i] for i in range(4)])
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(
        found["layers_output"], torch.stack([g.transpose(0, 1) for g in own]), atol=1e-5, rtol=1e-4
    )
    assert found["attentions_output"].shape == (4, 2, 6, 64)


def test_what_leaves_attention_waits_for_its_proof():
    model = StandardizedTransformer(tiny_model("xlnet"), tokenizer=tiny_tokenizer(), check_renaming=False)
    with pytest.raises(Unproven, match=r"return \[11, 2, 64\] .* model\.validate"), model.trace(ids(1, 5)):
        model.attentions_output[0]
    unseen = model.supposing(dataclasses.replace(model.facts, look_at_a_run=None))  # as while the weights are absent
    with pytest.raises(Unproven, match=r"leaves its module .* model\.validate"):
        unseen.place("attentions_output", 0)
    assert model.validate().ok
    with torch.no_grad(), model.trace(ids(1, 5)):
        left = model.attentions_output[0].save()
    assert left.shape == (1, 5, 64)
    assert str(model.place("attentions_output", 0)).startswith("transformer.layer.0.rel_attn.source.")


def test_a_norm_at_the_beginning_of_attention_closes_nothing():
    """It bears the name of the norm with which XLNet's attention ends, and normalises what attention is given."""
    module = tiny_model("gpt2")
    for block in module.transformer.h:
        block.attn.layer_norm = nn.LayerNorm(64)
        block.attn.forward = lambda x, *args, m=block.attn, **kwargs: type(m).forward(
            m, m.layer_norm(x), *args, **kwargs
        )
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.anatomy.blocks[0].self_attn.closing is None
    assert model.certificate["input + contributions == output"].status == "passed"
    kept = []
    handle = module.transformer.h[1].attn.register_forward_hook(lambda m, a, out: kept.append(out[0].clone()))
    with torch.no_grad(), model.trace(ids(1, 5)):
        left = model.attentions_output[1].save()
    handle.remove()
    torch.testing.assert_close(left, kept[0])
