"""What a model's own code edits in place after it was read: reads, writes and gradients equal those of plain hooks.

Falcon adds what its attention returns to what its feed-forward returned. CTRL, BLT and GIT scale the embeddings, or add
to them. The reference is the plain HuggingFace module with torch hooks that copy.
"""

from functools import cache

import nnsight
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import CertificateError, Unavailable
from nnterp.table import VALUES
from nnterp.testing import model_types, multimodal_model_types, tiny_model, tiny_tokenizer
from nnterp.traced import EditedLater, SumEditedLater
from nnterp.values import reads, when

from .values_reference import ids

pytestmark = pytest.mark.filterwarnings("ignore")

FALCONS = {
    "parallel, several queries a key": {},
    "parallel": {"multi_query": False, "num_kv_heads": 4},
    "two norms": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    "one norm": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    "one after the other": {"parallel_attn": False, "multi_query": False, "num_kv_heads": 4, "alibi": True},
}
EDITING = {"falcon": "mlps_output", "blt": "token_embeddings", "ctrl": "token_embeddings", "git": "token_embeddings"}
REFUSED = ("reformer", "xlm")
LAYER = 1


@cache
def falcon(kind):
    return StandardizedTransformer(tiny_model("falcon", **FALCONS[kind]), tokenizer=tiny_tokenizer())


@pytest.fixture(params=FALCONS)
def model(request):
    return falcon(request.param)


def score(logits):
    return logits[:, -1, 7].sum() - logits[:, -1, 11].sum()


def plain(model, edit=None, grad=False, layers=(LAYER,), run=None):
    """(copies of what the feed-forwards return, edited; logits; gradient) of the plain module with hooks that copy."""
    module, seen, handles = model._module, [], []

    def hook(_, args, out):
        out = out.clone() if edit is None else edit(out)
        seen.append(out)
        return out.clone()

    for layer in layers:
        handles.append(module.get_submodule(f"transformer.h.{layer}.mlp").register_forward_hook(hook))
    try:
        with torch.set_grad_enabled(grad):
            logits = module(input_ids=ids()).logits if run is None else run(module)
            return seen, logits, torch.autograd.grad(score(logits), seen) if grad else ()
    finally:
        for handle in handles:
            handle.remove()


def zeroed(out):
    out = out.clone()
    out[:, -1] = 0
    return out


def test_what_is_read_stays_as_it_was(model):
    layers = range(model.num_layers)
    seen, logits, _ = plain(model, layers=layers)
    with torch.no_grad(), model.trace(ids()):
        kept, sums = [].save(), [].save()
        for layer in layers:
            kept.append(model.mlps_output[layer])
            sums.append(model.mlp_contributions[layer])
        traced = model.logits.save()
    assert torch.equal(traced, logits)
    for mine, summed, theirs in zip(kept, sums, seen, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(summed, theirs)
    collected = model.collect(ids(), "mlps_output")["mlps_output"]
    assert torch.allclose(collected, torch.stack(seen), atol=1e-5)


def test_gradients_with_respect_to_what_was_read(model):
    seen, _, (gradient,) = plain(model, grad=True)
    with model.trace(ids()):
        value = model.mlps_output[LAYER].save()
        traced = model.logits.save()
    assert torch.equal(value, seen[0])
    torch.testing.assert_close(torch.autograd.grad(score(traced), value, retain_graph=True)[0], gradient)
    value.grad = None  # torch fills it in, too
    score(traced).backward()
    torch.testing.assert_close(value.grad, gradient)
    with model.trace(ids()):
        value = model.mlps_output[LAYER]
        out = score(model.logits)
        with out.backward():
            inside = value.grad.save()
    torch.testing.assert_close(inside, gradient)
    model._module.zero_grad()


def test_an_edit_in_place_takes_effect(model):
    (value,), logits, (gradient,) = plain(model, zeroed, grad=True)
    with model.trace(ids()):
        model.mlps_output[LAYER][:, -1] = 0
        read = model.mlps_output[LAYER].save()
        traced = model.logits.save()
    assert torch.equal(traced, logits)
    assert torch.equal(read, value)
    torch.testing.assert_close(torch.autograd.grad(score(traced), read)[0], gradient)
    with torch.no_grad(), model.trace(ids()):
        one, same = model.mlps_output[LAYER], model.mlp_contributions[LAYER]
        one[:, -1] = 0
        assert same is one
        traced = model.logits.save()
    assert torch.equal(traced, logits)
    with torch.no_grad(), model.trace(ids()):  # the last statement of a block
        model.mlps_output[LAYER][:, -1] = 0
        tokens = nnsight.save(ids())
    assert tokens.shape == ids().shape


def test_a_write_replaces_it_and_keeps_what_was_written(model):
    new = torch.randn(2, 12, model.hidden_size, generator=torch.Generator().manual_seed(3))
    _, logits, _ = plain(model, lambda out: new.clone())
    given = new.clone()
    with torch.no_grad(), model.trace(ids()):
        model.mlps_output[LAYER] = given
        traced = model.logits.save()
    assert torch.equal(traced, logits)
    assert torch.equal(given, new)
    _, doubled, _ = plain(model, lambda out: out * 2)
    with torch.no_grad(), model.trace(ids()):
        model.mlps_output[LAYER] *= 2
        traced = model.logits.save()
    assert torch.equal(traced, doubled)
    _, logits, _ = plain(model, lambda out: zeroed(new))
    with torch.no_grad(), model.trace(ids()):
        given = new.clone()
        model.mlps_output[LAYER] = given
        given[:, -1] = 0  # what was written is the model's tensor from then on, as on other models
        traced = model.logits.save()
    assert torch.equal(traced, logits)


def test_invokes_keep_to_their_rows(model):
    def last_row(out):
        return torch.cat([out[:1], zeroed(out[1:])])

    (value,), logits, _ = plain(model, last_row)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(ids()[:1]):
            first = model.mlps_output[LAYER].save()
            above = model.logits.save()
        with tracer.invoke(ids()[1:]):
            model.mlps_output[LAYER][:, -1] = 0
            second = model.mlps_output[LAYER].save()
            below = model.logits.save()
    assert torch.equal(torch.cat([first, second]), value)
    assert torch.equal(torch.cat([above, below]), logits)


@pytest.mark.parametrize("edit", [None, zeroed])
def test_every_step_of_a_generation(edit):
    model, options = falcon("two norms"), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    seen, tokens, _ = plain(model, edit, run=lambda module: module.generate(input_ids=ids(), **options))
    with torch.no_grad(), model.generate(ids(), **options) as tracer:
        kept = [].save()
        for _ in tracer.iter[:3]:
            value = model.mlps_output[LAYER]
            if edit is not None:
                value[:, -1] = 0
            kept.append(value)
        made = tracer.result.save()
    assert torch.equal(made, tokens)
    assert len(kept) == len(seen) == 3
    for mine, theirs in zip(kept, seen, strict=True):
        assert torch.equal(mine, theirs)


def places_of(model):
    """Places of all values, in the order of the forward pass."""
    found = set()
    for name, value in VALUES.items():
        have = model.support().layers.get(name, ()) if value.per_layer else (None,)
        for layer in have:
            try:
                places = reads(model, model.place(name, layer))[0]
                [when(model, place) for place in places]
            except (Unavailable, KeyError, TypeError):  # it is not there, only with an image, or not in a run of a text
                continue
            found.update(place for place in places if model.facts.repeated.get(getattr(place, "path", None), 1) == 1)
    return sorted(found, key=lambda place: when(model, place))


@pytest.mark.parametrize("model_type", [t for t in [*model_types(), *multimodal_model_types()] if t not in REFUSED])
def test_no_value_changes_after_it_was_read(model_type, tiny):
    """Each value of each model type: the tensor after the run is what it was when it was read."""
    model = tiny(model_type)
    places = places_of(model)
    with torch.no_grad(), model.trace(ids()):
        kept = [].save()
        for place in places:
            tensor = place.read(model, str(place))
            kept.append((tensor, tensor.clone()))
    assert len(places) > 10
    changed = [str(p) for p, (live, then) in zip(places, kept, strict=True) if not live.equal(then)]
    assert changed == []
    handed = [place for place in places if isinstance(place, EditedLater)]
    expected = {"mlps_output": model.num_layers, "token_embeddings": 1, None: 0}
    assert len(handed) == expected[EDITING.get(model_type)]


@pytest.mark.parametrize("model_type", ["falcon", "ctrl"])
def test_what_is_read_stays_as_it_was_without_a_proof(model_type):
    model = StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer(), check_renaming=False)
    name = EDITING[model_type]
    with torch.no_grad(), model.trace(ids()):
        value = (model.mlps_output[LAYER] if name == "mlps_output" else model.token_embeddings).save()
        then = nnsight.save(value.clone())
        traced = model.logits.save()
    assert torch.equal(value, then)
    assert torch.equal(traced, model._module(input_ids=ids()).logits)


def test_a_proof_in_inference_mode_finds_what_is_edited_later():
    with torch.inference_mode():
        model = StandardizedTransformer(tiny_model("falcon"), tokenizer=tiny_tokenizer(), keep_proofs=False)
        rwkv = StandardizedTransformer(tiny_model("rwkv"), tokenizer=tiny_tokenizer(), keep_proofs=False)
    assert model.facts.edited_later == falcon("parallel, several queries a key").facts.edited_later != frozenset()
    assert rwkv.certificate.ok  # it edits its weights, which no code outside of inference mode may


def test_multiples_of_what_is_edited_later():
    """Granite adds a multiple of what its feed-forward returns. Here, what it returned is doubled after that."""
    module, kept = tiny_model("granite"), []
    layer = module.model.layers[LAYER]
    layer.mlp.register_forward_hook(lambda _, args, out: kept.append(out))

    def double(*_):
        kept.pop().mul_(2)

    layer.register_forward_hook(double)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert isinstance(model.place("mlp_contributions", LAYER), SumEditedLater)
    factor = module.config.residual_multiplier
    with torch.no_grad():
        logits = module(input_ids=ids()).logits
    with torch.no_grad(), model.trace(ids()):
        added = model.mlp_contributions[LAYER].save()
        traced = model.logits.save()
    with torch.no_grad(), model.trace(ids()):
        value = model.mlps_output[LAYER].save()
        then = nnsight.save(value.clone())
        left = model.layers_output[LAYER].save()
    assert torch.equal(traced, logits)
    assert torch.equal(value, then)
    torch.testing.assert_close(added, factor * value)
    with torch.no_grad(), model.trace(ids()):
        model.mlp_contributions[LAYER] = 3 * added
        moved = model.layers_output[LAYER].save()
    torch.testing.assert_close(moved - left, 2 * added, rtol=1e-4, atol=1e-5)


def test_what_a_module_is_given():
    """The input of a feed-forward, doubled by its caller after the feed-forward ran: it is refused."""
    module = tiny_model("llama")

    def double(_, args, out):
        args[0].mul_(2)

    module.model.layers[LAYER].mlp.register_forward_hook(double)
    with pytest.raises(CertificateError, match=r"edits model\.layers\.1\.mlp\.input in place later"):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer())


def test_a_model_that_tells_a_copy_is_not_proven():
    """Its feed-forward keeps what it returned, and its layer reads that after the edit."""
    module = tiny_model("falcon")
    layer = module.transformer.h[LAYER]
    inner = layer.mlp.forward

    def forward(x):
        layer.kept = inner(x)
        return layer.kept

    layer.mlp.forward = forward
    layer.register_forward_hook(lambda _, args, out: (out[0] + layer.kept, *out[1:]))
    with pytest.raises(CertificateError):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer()).validate()
