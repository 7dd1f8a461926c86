"""Everything that a trace can read or write, on a worker without this library, equal to the same trace here."""

import nnsight
import pytest
import torch

from nnterp.errors import Unavailable
from nnterp.values import VALUES

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
PROMPTS = [PROMPT, "A cat", "Once upon a time there was a"]
WITHOUT_EFFECT_HERE = ("router_choices", "mixer_states")  # whole numbers; what is handed to the cache


def layers_with(model, value):
    """The layers that have a value; [None] for one that is not per layer."""
    found = []
    for layer in range(model.num_layers) if value.per_layer else [None]:
        try:
            model.place(value.name, layer)
        except Unavailable:
            continue
        found.append(layer)
    return found


def read(model, name, layer):
    return getattr(model, name) if layer is None else getattr(model, name)[layer]


def write(model, name, layer, tensor):
    if layer is None:
        setattr(model, name, tensor)
    else:
        getattr(model, name)[layer] = tensor


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_same_values_are_there_and_equal(pair):
    here, there = pair.here, pair.there
    for name, value in VALUES.items():
        layers = layers_with(here, value)
        assert layers_with(there, value) == layers, name
        if not layers:
            continue
        with torch.no_grad(), here.trace(PROMPT):
            expected = nnsight.save([read(here, name, layer) for layer in layers])
        with torch.no_grad(), there.trace(PROMPT, remote=True):
            actual = nnsight.save([read(there, name, layer) for layer in layers])
        assert len(actual) == len(layers)
        for a, e in zip(actual, expected, strict=True):
            close(a.detach(), e)


def test_writes_have_the_same_effect(pair):
    for name, value in VALUES.items():
        layers = layers_with(pair.here, value)
        if not layers or name in WITHOUT_EFFECT_HERE:
            continue
        layer = layers[len(layers) // 2]
        found = []
        for model, remote in ((pair.here, False), (pair.there, True)):
            with torch.no_grad(), model.trace(PROMPT, remote=remote):
                write(model, name, layer, 0.5 * read(model, name, layer).flip(-1))
                logits = model.logits.save()
            found.append(logits.detach())
        with torch.no_grad(), pair.here.trace(PROMPT):
            untouched = pair.here.logits.save()
        close(*found)
        assert (found[0] - untouched).abs().max() > 1e-3, name


def test_values_of_one_block_in_forward_order(pair):
    layer = pair.here.num_layers - 2
    names = ("layers_input", "mixers_output", "layers_mid", "mlps_input", "mlps_output", "layers_output")
    found = []
    for model, remote in ((pair.here, False), (pair.there, True)):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            embedded = model.token_embeddings
            states = nnsight.save([embedded, *(getattr(model, name)[layer] for name in names)])
        found.append(states)
    for actual, expected in zip(*found, strict=True):
        close(actual.detach(), expected)


def test_inputs_outputs_and_rows_of_unequal_length(pair):
    found = []
    for model, remote in ((pair.here, False), (pair.there, True)):
        with torch.no_grad(), model.trace(PROMPTS, remote=remote):
            ids = model.input_ids.save()
            size = nnsight.save(tuple(model.input_size))
            mask = model.attention_mask.save()
            state = model.layers_output[1][:, -1].save()
            probs = model.next_token_probs.save()
        found.append((ids, torch.tensor(size), mask, state.detach(), probs.detach()))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_editing_in_place(pair):
    found = []
    for model, remote in ((pair.here, False), (pair.there, True)):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            model.layers_output[1][:, 2] = 0
            logits = model.logits.save()
        found.append(logits.detach())
    close(*found)


def test_interventions(pair):
    vector = torch.randn(pair.here.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for model, remote in ((pair.here, False), (pair.there, True)):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            model.steer([1, 2], vector, factor=2.0, token_positions=[1, 3])
            steered = model.logits.save()
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            model.skip_layers(1, 2)
            skipped = model.logits.save()
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            stream = model.layers_output[0]
            model.skip_layer(1, skip_with=2 * stream)
            replaced = model.logits.save()
        found.append((steered.detach(), skipped.detach(), replaced.detach()))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)
    assert len({float(t.sum()) for t in found[0]}) == 3


def test_reading_out(pair):
    found = []
    for model, remote in ((pair.here, False), (pair.there, True)):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            state = model.layers_output[2]
            early = model.project_on_vocab(state).save()
            closest = nnsight.save(model.get_topk_closest_tokens(state[0, -1], k=3))
        found.append((early.detach(), closest))
    close(found[0][0], found[1][0])
    assert list(found[0][1]) == list(found[1][1])
    assert list(found[0][1].values()) == pytest.approx(list(found[1][1].values()), abs=1e-5)


def test_modules_by_their_standard_names(pair):
    attention = pair.here.attention_layers[0]
    found = []
    for model, remote in ((pair.here, False), (pair.there, True)):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            embedded = model.embed_tokens.output.save()
            first = model.mixers[0].output
            first = nnsight.save(first if isinstance(first, torch.Tensor) else first[0])
            attended = model.attentions[attention].output[0].save() if attention else first
            fed = model.mlps[-1].output
            fed = nnsight.save(fed if isinstance(fed, torch.Tensor) else fed[0])
            normed = model.ln_final.output.save()
        found.append([tensor.detach() for tensor in (embedded, first, attended, fed, normed)])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_what_a_request_weighs(pair, record_property):
    before = len(pair.worker.requests)
    model = pair.there
    with torch.no_grad(), model.trace(PROMPT, remote=True):
        model.layers_output[2][:, -1].save()
    (request,) = pair.worker.requests[before:]
    print(f"{pair.here.model_class}: {request.size} bytes sent")
    record_property("bytes_sent", request.size)
    assert request.size < 27_500  # one that edits is larger: see test_steering
    assert request.bytecode == ()


def test_what_travels_as_bytecode_is_noticed(pairs):
    one, scope = pairs("gpt2"), {}
    exec("def doubled(x):\n    return 2 * x", scope)
    doubled, model = scope["doubled"], one.there
    with one.worker.serving(), torch.no_grad(), model.trace(PROMPT, remote=True):
        doubled(model.layers_output[1]).save()
    assert any("doubled" in name for name in one.worker.requests[-1].bytecode)


def test_what_the_model_edits_in_place_later(pairs):
    """Falcon adds to what its feed-forward returned: the value that was read stays, an edit of it acts, and a gradient
    is that of a plain hook that copies."""
    pair, kept = pairs("falcon", eager=False), {}

    def copy(_, args, out):
        kept["value"] = out.requires_grad_(True)
        return out.clone()

    module = pair.here
    with torch.no_grad(), module.trace(PROMPT):
        ids = module.input_ids.save()
    handle = module._module.get_submodule(module.place("mlps_output", 1).path).register_forward_hook(copy)
    score = module._module(input_ids=ids).logits[0, -1, 5]
    handle.remove()
    (expected,) = torch.autograd.grad(score, kept["value"])
    found = []
    with pair.worker.serving():
        for model, remote in ((pair.here, False), (pair.there, True)):
            with model.trace(PROMPT, remote=remote):
                state = model.mlps_output[1]
                state.requires_grad_(True)
                value = state.save()
                score = model.logits[0, -1, 5]
                with score.backward():
                    gradient = state.grad.save()
            with torch.no_grad(), model.trace(PROMPT, remote=remote):
                model.mlps_output[1][:, 2] = 0
                edited = model.mlps_output[1].save()
                logits = model.logits.save()
            close(value.detach(), kept["value"].detach())
            close(gradient, expected)
            assert not edited[:, 2].any()
            found.append(logits.detach())
            with torch.no_grad(), model.trace(PROMPT, remote=remote):
                written = torch.zeros_like(value).save()
                model.mlps_output[1] = written
            assert not written.any()
    close(*found)
    request = pair.worker.requests[-1]
    assert request.size < 30_000
    assert request.bytecode == ()
