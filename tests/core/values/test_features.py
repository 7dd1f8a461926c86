"""Dictionaries attached to a model: what their features are in every kind of run, and what is refused."""

import re

import nnsight
import pytest
import torch

from nnterp import Dictionary, SparseFeatures, StandardizedTransformer, attach, collect_features, detach
from nnterp.errors import InsideTraceError, OutsideTraceError, ShapeError, Unavailable
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer
from nnterp.traced import Activation, JumpRelu, Sum, TopK, UnitVariance

A, B = [11, 42, 57, 93, 130], [60, 77, 101]


@pytest.fixture(scope="module")
def plain():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture
def model(plain):
    yield plain
    detach(plain)


def dictionary(width=64, features=40, seed=0, activation=None, **more):
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(features, width, generator=g) for _ in range(2))
    bias, offset = 0.1 * torch.randn(features, generator=g), torch.randn(width, generator=g)
    return Dictionary(encoder / width**0.5, bias, decoder / 3, offset, activation or Activation(), **more)


def stream(model, prompt, name="layers_output", layer=1):
    with torch.no_grad(), model.trace(prompt):
        found = getattr(model, name)[layer].clone().save()
    return found


def logits_of(model, prompt):
    with torch.no_grad():
        return model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]


def hooked(model, prompt, layer, edit, **generation):
    """Logits of one prompt, or what is generated, with a torch hook on what leaves a layer."""

    def hook(module, args, output):
        return edit(output) if isinstance(output, torch.Tensor) else (edit(output[0]), *output[1:])

    handle = model._module.get_submodule(model.layer_paths[layer]).register_forward_hook(hook)
    try:
        if generation:
            return model._module.generate(torch.tensor([prompt]), do_sample=False, **generation)
        return logits_of(model, prompt)
    finally:
        handle.remove()


def raised(d, index, value):
    """A torch hook's edit: one feature set to a value."""
    return lambda x: (
        x + (value - torch.relu(x @ d.encoder[index] + d.encoder_bias[index]))[..., None] * d.decoder[index]
    )


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- in every kind of run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [Activation(), JumpRelu(torch.full((40,), 0.4)), TopK(5)], ids=str)
@pytest.mark.parametrize("scaling", [None, UnitVariance()], ids=str)
def test_splice_is_bit_equal(model, activation, scaling):
    attach(model, dictionary(activation=activation, scaling=scaling), "layers_output[1]")
    attach(model, dictionary(seed=1, activation=activation, scaling=scaling), "layers_output[2]")
    with torch.no_grad(), model.trace(A):
        untouched = model.logits.save()
    with torch.no_grad(), model.trace(A):
        for layer in (1, 2):
            model.features[layer] = model.features[layer] * 1
        spliced = model.logits.save()
    assert torch.equal(spliced, untouched)


def test_a_scaled_dictionary_scales_the_change_back(model):
    d = dictionary(scaling=UnitVariance())
    attach(model, d, "layers_output[1]")

    def edit(x):
        return x + (d.decode(torch.where(torch.arange(40) == 3, 2.0, d.encode(x)), x) - d.decode(d.encode(x), x))

    with torch.no_grad(), model.trace(A):
        features = model.features[1]
        features[..., 3] = 2
        model.features[1] = features
        found = model.logits.save()
    same(found[0], hooked(model, A, 1, edit))
    with pytest.raises(Unavailable, match="scales what it decodes"):
        model.gradients([A], lambda logits: logits[0, -1, 3], "features")


def test_each_step_of_a_generation(model):
    d = dictionary()
    attach(model, d, "layers_output[1]")
    expected = hooked(model, A, 1, raised(d, 3, 30.0), max_new_tokens=4, min_new_tokens=4)
    with torch.no_grad(), model.generate(A, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        seen = [].save()
        for _ in tracer.iter[:4]:
            features = model.features[1]
            seen.append(features.shape[1])
            features[..., 3] = 30.0
            model.features[1] = features
        found = tracer.result.save()
    assert seen == [5, 1, 1, 1]
    assert torch.equal(found, expected)
    untouched = model._module.generate(torch.tensor([A]), do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert not torch.equal(found, untouched)

    def clamp(step):
        features = model.features[1]
        features[..., 3] = 30.0
        model.features[1] = features

    with torch.no_grad(), model.generate(A, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        model.each_step(clamp)
        found = tracer.result.save()
    assert torch.equal(found, expected)


def test_a_transcoder_in_a_generation_and_in_invokes(model):
    d = dictionary()
    attach(model, d, "mlps_input[1]", "mlps_output[1]")
    module = model._module.get_submodule(model.module_path("mlp", 1))

    def change(module, args, output):
        return output + (9.0 - torch.relu(args[0] @ d.encoder[3] + d.encoder_bias[3]))[..., None] * d.decoder[3]

    handle = module.register_forward_hook(change)
    generated = model._module.generate(torch.tensor([A]), do_sample=False, max_new_tokens=4, min_new_tokens=4)
    logits = logits_of(model, B)
    handle.remove()
    with torch.no_grad(), model.generate(A, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:4]:
            features = model.features[1]
            features[..., 3] = 9.0
            model.features[1] = features
            model.mlp_neurons[1].save()  # between what is read and what is written
        found = tracer.result.save()
    assert torch.equal(found, generated)

    def clamp(step):
        features = model.features[1]
        features[..., 3] = 9.0
        model.features[1] = features

    with torch.no_grad(), model.generate(A, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        model.each_step(clamp)
        found = tracer.result.save()
    assert torch.equal(found, generated)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(A):
            untouched = model.logits.save()
        with tracer.invoke(B):
            features = model.features[1]
            features[..., 3] = 9.0
            model.features[1] = features
            written = model.mlps_output[1].save()
            edited = model.logits.save()
    same(untouched[0], logits_of(model, A))
    same(edited[0, -3:], logits)
    assert written.shape[0] == 1


def test_rows_of_a_padded_batch_and_several_invokes(model):
    d = dictionary()
    attach(model, d, "layers_output[1]")
    expected = [hooked(model, prompt, 1, raised(d, 3, 5.0)) for prompt in (A, B)]
    with torch.no_grad(), model.trace([A, B]):
        features = model.features[1]
        features[..., 3] = 5.0
        model.features[1] = features
        logits = model.logits.save()
    same(logits[0], expected[0])
    same(logits[1, -3:], expected[1])
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(A):
            first = model.logits.save()
        with tracer.invoke(B):
            features = model.features[1]
            features[..., 3] = 5.0
            model.features[1] = features
            again = model.features[1].clone().save()
            second = model.logits.save()
    same(first[0], logits_of(model, A))
    same(second[0, -3:], expected[1])
    assert (again[0, -3:, 3] == 5).all()


def test_two_dictionaries_of_one_value_act_one_after_the_other(model):
    a, b = dictionary(), dictionary(features=24, seed=1)
    assert attach(model, a, "layers_output[1]") == (1, 0)
    assert attach(model, b, "layers_output[1]") == (1, 1)
    with torch.no_grad(), model.trace(A):
        one = model.features[1, 0]
        one[..., 3] = 5.0
        model.features[1, 0] = one
        two = model.features[1, 1]
        two[..., 7] = 4.0
        model.features[1, 1] = two
        logits = model.logits.save()
    same(logits[0], hooked(model, A, 1, lambda x: raised(b, 7, 4.0)(raised(a, 3, 5.0)(x))))


def test_features_written_stay_written_beside_those_of_the_same_place_under_another_name(model):
    a, b = dictionary(), dictionary(features=24, seed=1)
    attach(model, a, "mlps_output[1]")
    attach(model, b, "mlp_contributions[1]")
    x = stream(model, A, "mlps_output")
    before = torch.relu(x @ a.encoder.T + a.encoder_bias)
    with torch.no_grad(), model.trace(A):
        one = model.features[1, 0]
        one[..., 3] = 5.0
        model.features[1, 0] = one
        model.features[1, 1].save()
        again = model.features[1, 0].save()
        model.features[1, 0] = again * 0 + one
        written = model.mlps_output[1].save()
    assert (again[..., 3] == 5).all()
    same(again[..., 4:], before[..., 4:])
    same(written, x + (5 - before[..., 3])[..., None] * a.decoder[3])


def test_negative_features_are_among_the_collected(model):
    d = dictionary(activation=TopK(30, signed=True))
    attach(model, d, "layers_output[1]")
    x = stream(model, A)
    pre = x @ d.encoder.T + d.encoder_bias
    dense = torch.zeros_like(pre).scatter(-1, *pre.topk(30)[::-1])
    assert (dense < 0).any()
    indices, activations = collect_features(model, [A], k=30)[1]
    same(torch.zeros_like(dense).scatter(-1, indices, activations), dense)


def test_an_edit_of_the_value_is_seen_by_its_features(model):
    d = dictionary()
    attach(model, d, "layers_output[1]")
    x = stream(model, A)
    with torch.no_grad(), model.trace(A):
        features = model.features[1]
        features[..., 3] = 5.0
        model.features[1] = features
        model.layers_output[1][:] = x.flip(1)
        flipped = model.features[1].save()
    same(flipped, torch.relu(x.flip(1) @ d.encoder.T + d.encoder_bias))


def test_a_value_that_is_multiplied_before_it_is_added():
    """Granite multiplies what its feed-forward returns: the change is divided by the factor."""
    model = StandardizedTransformer(tiny_model("granite"), tokenizer=tiny_tokenizer())
    assert isinstance(model.place("mlp_contributions", 1), Sum)
    x, d = stream(model, A, "mlp_contributions"), dictionary(model.hidden_size)
    attach(model, d, "mlp_contributions[1]")
    features = torch.relu(x @ d.encoder.T + d.encoder_bias)
    with torch.no_grad(), model.trace(A):
        found = model.features[1]
        kept = found.clone().save()
        model.features[1] = found
        spliced = model.logits.save()
    same(kept, features)
    assert torch.equal(spliced[0], logits_of(model, A))
    with torch.no_grad(), model.trace(A):
        found = model.features[1]
        found[..., 3] = 5.0
        model.features[1] = found
        found[..., 7] = 4.0
        model.features[1] = found
        edited = model.logits.save()
    change = (5 - features[..., 3])[..., None] * d.decoder[3] + (4 - features[..., 7])[..., None] * d.decoder[7]
    same(edited[0], hooked(model, A, 1, lambda y: y + change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = StandardizedTransformer(tiny_model("llama").to(dtype), tokenizer=tiny_tokenizer())
    d = dictionary()
    attach(model, d, "layers_output[1]")
    with torch.no_grad(), model.trace(A):
        untouched = model.logits.save()
    with torch.no_grad(), model.trace(A):
        features = model.features[1].save()
        model.features[1] = features
        spliced = model.logits.save()
    assert features.dtype == torch.float32
    assert torch.equal(spliced, untouched)
    with torch.no_grad(), model.trace(A):
        model.features[1] = features * 2
        written = model.layers_output[1].save()
    x = stream(model, A)
    expected = (x.float() + features @ d.decoder).to(dtype)
    torch.testing.assert_close(written, expected, rtol=1e-2, atol=1e-2)
    assert written.dtype == dtype


def test_heads_are_flattened(model):
    z = stream(model, A, "attention_head_outputs")
    width = z.shape[-1] * z.shape[-2]
    d = dictionary(width)
    attach(model, d, "blocks.1.attn.hook_z")
    with torch.no_grad(), model.trace(A):
        features = model.features[1].save()
        changed = features.clone()
        changed[..., 3] += 2
        model.features["blocks.1.attn.hook_z"] = changed
        written = model.attention_head_outputs[1].clone().save()
    same(features, torch.relu(z.flatten(2) @ d.encoder.T + d.encoder_bias))
    same(written, z + 2 * d.decoder[3].view(z.shape[2:]))


def test_shapes_without_a_run(model):
    attach(model, dictionary(), "layers_output[1]")
    with model.scan(A):
        shape = model.features[1].shape
        shape = nnsight.save(tuple(shape))
    assert shape == (1, 5, 40)


def test_gradients_in_a_trace_of_features_that_are_written(model):
    d = dictionary()
    attach(model, d, "layers_output[1]")
    found = model.gradients([A], lambda logits: logits[0, -1, 3], "features")["features", 1]
    with model.trace(A):
        features = model.features[1].detach().requires_grad_(True)
        model.features[1] = features
        score = model.logits[0, -1, 3]
        slope = torch.autograd.grad(score, features)[0].save()
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-6)
    assert slope.abs().max() > 0


# -- collected ---------------------------------------------------------------------------------------------------------


def test_collected_dense_and_sparse(model, tmp_path):
    d, e = dictionary(), dictionary(features=24, seed=1)
    attach(model, d, "layers_output[1]")
    attach(model, e, "mlps_input[2]", "mlps_output[2]")
    whole = model.collect([A, B, A], "features", batch_size=2)
    x, y = stream(model, A), stream(model, B)
    same(whole["features", 1][0], torch.relu(x @ d.encoder.T + d.encoder_bias)[0])
    same(whole["features[1]"][1, :3], torch.relu(y @ d.encoder.T + d.encoder_bias)[0])
    assert whole["features", 2].shape == (3, 5, 24)
    found = collect_features(model, [A, B, A], k=4, batch_size=2)
    for layer in (1, 2):
        indices, activations = found[layer]
        assert indices.shape == activations.shape == (3, 5, 4)
        expected = whole["features", layer].topk(4, dim=-1)
        same(activations, expected.values)
        active = found.mask[..., None] & (activations > 0)
        assert torch.equal(indices[active], expected.indices[active])
        assert active.any()
    feature = int(found[1][0][0, 0, 0])
    assert found.of(1, feature)[0, 0] == found[1][1][0, 0, 0]
    found.save(tmp_path / "found")
    again = SparseFeatures.load(tmp_path / "found")
    assert torch.equal(again[2][0], found[2][0])
    last, _ = collect_features(model, [A, B], k=100, layers=[2], positions=-1)[2]
    assert last.shape == (2, 24)


def test_several_dictionaries_of_a_layer_are_collected_by_number(model, tmp_path):
    d, e = dictionary(), dictionary(features=24, seed=1)
    attach(model, d, "layers_output[1]")
    attach(model, e, "mlps_input[1]", "mlps_output[1]")
    x, y = stream(model, A), stream(model, A, "mlps_input")
    of_stream, of_mlp = torch.relu(x @ d.encoder.T + d.encoder_bias), torch.relu(y @ e.encoder.T + e.encoder_bias)
    found = model.collect([A], ["features[1, 0]", "layers_output[1]", "features[-3, 1]"])
    same(found["features[1, 0]"], of_stream)
    same(found["features", (1, 1)], of_mlp)
    same(found["layers_output", 1], x)
    found.save(tmp_path / "found")
    same(type(found).load(tmp_path / "found")["features[1, 1]"], of_mlp)
    with pytest.raises(KeyError, match=r"features\[1, 0\], features\[1, 1\]"):
        found["features", 1]
    sparse = collect_features(model, [A], k=3, at=[(1, 1), (1, 0)])
    same(sparse[1, 0][1], of_stream.topk(3).values)
    same(sparse[1, 1][1], of_mlp.topk(3).values)
    same(collect_features(model, [A], k=3, at=(1, 1))[1, 1][1], of_mlp.topk(3).values)
    slopes = model.gradients([A], lambda logits: logits[0, -1, 3], ["features[1, 0]", "features[1, 1]"])
    same(
        slopes["features[1, 1]"],
        model.gradients([A], lambda x: x[0, -1, 3], "mlps_output[1]")["mlps_output", 1] @ e.decoder.T,
    )
    with pytest.raises(ValueError, match="not both"):
        collect_features(model, [A], layers=[1], at=(1, 1))
    with pytest.raises(IndexError, match=r"numbers \[0, 1\]"):
        model.collect([A], "features[1, 2]")


# -- shown and refused -------------------------------------------------------------------------------------------------


def test_without_a_dictionary(model):
    assert model.support()["features"] == ()
    with pytest.raises(Unavailable, match=r"nnterp.attach\(model, dictionary"), model.trace(A):
        model.features[1].save()
    with pytest.raises(Unavailable, match=r"attach"):
        model.collect([A], "features")


def test_support_and_explain(model, capsys):
    attach(model, dictionary(), "layers_output[1]")
    attach(model, dictionary(seed=1), "layers_output[1]")
    attach(model, dictionary(seed=2), "mlps_input[2]", "mlps_output[2]")
    assert model.support()["features"] == (1, 2)
    model.explain("features[2]")
    model.explain("features", (1, 1))
    shown = capsys.readouterr().out
    assert "mlps_input[2] (model.layers.2.mlp.input), encoded, written at mlps_output[2]" in shown
    assert "features[1, 1]" in shown
    with pytest.raises(ValueError, match=r"features\[1, 0\] \(layers_output\[1\], 40 features\), features\[1, 1\]"):
        model.collect([A], "features[1]")
    with pytest.raises(IndexError, match=r"numbers \[0, 1\]"), model.trace(A):
        model.features[1, 2].save()
    with pytest.raises(ValueError, match="several"):
        detach(model, "layers_output[1]")
    detach(model, (1, 0))
    assert model.place("features", 1).index == (1, 1)
    detach(model, "mlps_output[2]")
    assert model.support()["features"] == (1,)
    assert attach(model, dictionary(), "layers_output[1]") == (1, 0)


def test_what_cannot_be_attached(model):
    d = dictionary()
    layers = model.num_layers
    for error, words, arguments in [
        (TypeError, "Dictionary", {"dictionary": object(), "at": "layers_output[1]"}),
        (ValueError, "does not say which value", {"dictionary": d}),
        (ValueError, "no value called", {"dictionary": d, "at": "layers_outputs[1]"}),
        (ValueError, "names no layer", {"dictionary": d, "at": "layers_output"}),
        (ValueError, "names no layer", {"dictionary": d, "at": "ln_final_output"}),
        (IndexError, f"{layers} layers", {"dictionary": d, "at": f"layers_output[{layers}]"}),
        (ValueError, "no activations", {"dictionary": d, "at": "attention_keys[1]"}),
        (ValueError, "no activations", {"dictionary": d, "at": "features[1]"}),
        (Unavailable, "router", {"dictionary": d, "at": "router_logits[1]"}),
        (ShapeError, "width 65", {"dictionary": dictionary(65), "at": "layers_output[1]"}),
        (ShapeError, "width 64", {"dictionary": d, "at": "attention_head_outputs[1]"}),
        (ValueError, "comes before", {"dictionary": d, "at": "mlps_output[1]", "writes": "mlps_input[1]"}),
    ]:
        with pytest.raises(error, match=words):
            attach(model, **arguments)
    attach(model, d, "layers_output[-1]")
    with pytest.raises(ValueError, match=rf"already, as model.features\[{layers - 1}, 0\]"):
        attach(model, d, f"blocks.{layers - 1}.hook_resid_post")
    with pytest.raises(InsideTraceError, match="attach"), model.trace(A):
        attach(model, d, "layers_output[0]")
    with pytest.raises(Unavailable, match=r"layers_output\[3\]|No dictionary"):
        detach(model, 0)


def test_reads_and_writes_that_are_refused(model):
    d = dictionary()
    attach(model, d, "layers_output[1]")
    attach(model, dictionary(50), "mlp_neurons[2]")
    with pytest.raises(OutsideTraceError):
        model.features[1]
    with pytest.raises(ShapeError, match=r"features\[1\] has shape \[1, 5, 40\]"), torch.no_grad(), model.trace(A):
        model.features[1] = model.features[1][..., :-1]
    with pytest.raises(ShapeError, match="width 50"), torch.no_grad(), model.trace(A):
        model.features[2].save()
    with pytest.raises(IndexError), torch.no_grad(), model.trace(A):
        model.features[1][..., 40].save()


def test_an_edit_of_features_that_have_no_name_is_refused_with_lines_that_work(model):
    d = dictionary()
    attach(model, d, "layers_output[1]")
    refused = "features = model.features[1]\n.*{}\n.*model.features[1] = features"
    with pytest.raises(ValueError, match=_pattern(refused.format("features[:, :, 7] = 0"))), model.trace(A):
        model.features[1][:, :, 7] = 0
    with pytest.raises(ValueError, match=_pattern(refused.format("features[0][-1, :3] *= 2"))), model.trace(A):
        model.features[1][0][-1, :3] *= 2
    with pytest.raises(ValueError, match="would change nothing"), model.trace(A):
        for _ in range(2):
            model.layers_output[0][0, 0, 0], model.features[1, 0][0] = 1, 2
    with pytest.raises(ValueError, match="would change nothing"), model.trace() as tracer:  # noqa: SIM117 (nnsight runs no invoke there)
        with tracer.invoke(A):
            model.features["layers_output[1]"].mul_(0)
    with torch.no_grad(), model.trace(A):
        edited = model.features[1]
        edited[:, :, 7] = 0
        edited[0, -1].mul_(2)
        model.features[1] = edited
        model.features[1] *= 1
        model.layers_output[2][:, 0] = 0
        found = model.logits.save()
    assert not torch.equal(found[0], logits_of(model, A))


def _pattern(text):
    return re.escape(text).replace(r"\.\*", " *")


def test_a_model_without_weights(tmp_path):
    model = StandardizedTransformer(str(tiny_checkpoint("llama", tmp_path)), dispatch=False)
    d = dictionary()
    assert attach(model, d, "layers_output[1]") == (1, 0)
    with pytest.raises(ShapeError, match="width 65"):
        attach(model, dictionary(65), "layers_output[1]")
    with torch.no_grad(), model.trace(A):
        features = model.features[1].save()
    same(features, torch.relu(stream(model, A) @ d.encoder.T + d.encoder_bias))
