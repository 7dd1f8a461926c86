"""Steering vectors against slow loops of torch hooks, numpy and scikit-learn; what they refuse; how they are stored."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from nnterp import StandardizedTransformer
from nnterp.interventions import Result, SteeringVector, steer, steering_vectors
from nnterp.positions import last_of
from nnterp.testing import tiny_model, tiny_tokenizer

POSITIVE = ["I love the city.", "What a wonderful day", "I am happy about the weather", "The tea is good"]
NEGATIVE = ["I hate the city.", "What a terrible day", "I am sad about the weather, and tired", "The tea is bad"]
TYPES = ("gpt2", "llama", "gemma2", "jamba", "mamba2", "bloom")


@torch.no_grad()
def states(model, texts, layer, choose=lambda x: x[-1]):
    """`[texts, hidden]` in float64, one text at a time, by a hook on the HuggingFace layer."""
    found = []

    def keep(_, __, output):
        found.append(choose((output if isinstance(output, torch.Tensor) else output[0])[0].double()))

    handle = model._module.get_submodule(model.layer_paths[layer]).register_forward_hook(keep)
    for text in texts:
        model._module(model.tokenizer(text, return_tensors="pt").input_ids, use_cache=False)
    handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("kind", TYPES)
def test_mean_difference(tiny, kind):
    model = tiny(kind)
    found = steering_vectors(model, POSITIVE, NEGATIVE[:3], batch_size=2)
    assert found.layers == tuple(range(model.num_layers))
    assert (found.method, found.hidden_size, found.num_layers) == ("mean", model.hidden_size, model.num_layers)
    for layer, direction in found.directions.items():
        expected = states(model, POSITIVE, layer).mean(0) - states(model, NEGATIVE[:3], layer).mean(0)
        assert direction.dtype == torch.float32
        torch.testing.assert_close(direction.double(), expected, rtol=1e-4, atol=1e-4)
        assert found.norms[layer] == pytest.approx(expected.norm().item(), rel=1e-4)


@pytest.mark.parametrize("centered", [True, False])
def test_principal_component(tiny, centered):
    model = tiny("llama")
    pairs = POSITIVE[:3], NEGATIVE[:3]  # an odd number: most pairs agree on the sign
    found = steering_vectors(model, *pairs, "pca" if centered else "pca_center", layers=[0, 2])
    assert found.layers == (0, 2)
    for layer, direction in found.directions.items():
        high, low = (states(model, texts, layer).numpy() for texts in pairs)
        # pca_diff and pca_center as in repeng: PCA of the differences; PCA of pairs around their centres
        middle = (high + low) / 2
        train = high - low if centered else np.concatenate([high - middle, low - middle])
        expected = PCA(n_components=1).fit(train).components_[0]
        if (high @ expected > low @ expected).mean() < (high @ expected < low @ expected).mean():
            expected = -expected
        assert abs(direction.norm().item() - 1) < 1e-5
        assert float(direction.double().numpy() @ expected) > 0.999


@pytest.mark.parametrize("method", ["mean", "pca", "pca_center", "probe"])
def test_the_sign_points_to_the_positive(tiny, method):
    model = tiny("llama")
    there = steering_vectors(model, POSITIVE[:3], NEGATIVE[:3], method, layers=1)
    back = steering_vectors(model, NEGATIVE[:3], POSITIVE[:3], method, layers=1)
    high, low = (states(model, texts, 1) @ there[1].double() for texts in (POSITIVE[:3], NEGATIVE[:3]))
    assert (high > low).sum() >= 2
    assert there.similarity(back)[1] < -0.999


def test_classifier(tiny):
    model = tiny("gpt2")
    found = steering_vectors(model, POSITIVE, NEGATIVE, "probe", layers=1)
    together = torch.cat([states(model, POSITIVE, 1), states(model, NEGATIVE, 1)]).numpy()
    scaler = StandardScaler().fit(together)
    fitted = LogisticRegression(max_iter=1000).fit(scaler.transform(together), [1] * 4 + [0] * 4)
    expected = fitted.coef_[0] / scaler.scale_
    assert float(found[1].double().numpy() @ expected) / np.linalg.norm(expected) > 0.999


def test_every_way_to_give_examples(tiny):
    model = tiny("llama")
    expected = steering_vectors(model, POSITIVE, NEGATIVE)
    texts, labels = [*NEGATIVE, *POSITIVE], [False] * 4 + [True] * 4
    others = [
        steering_vectors(model, list(zip(POSITIVE, NEGATIVE, strict=True))),
        steering_vectors(model, (texts, labels)),
        steering_vectors(model, texts, labels=np.array(labels)),
        steering_vectors(model, texts, labels=torch.tensor([-1] * 4 + [1] * 4)),
        steering_vectors(model, [model.tokenizer(t).input_ids for t in POSITIVE], NEGATIVE, batch_size=1),
    ]
    for other in others:
        assert other.prompts == expected.prompts
        assert min(expected.similarity(other).values()) > 1 - 1e-6
    assert steering_vectors(model, POSITIVE[:2], NEGATIVE).prompts != expected.prompts


def test_positions(tiny):
    model = tiny("llama")
    everywhere = steering_vectors(model, POSITIVE, NEGATIVE, layers=1, positions=None)
    expected = [states(model, texts, 1, lambda x: x.mean(0)).mean(0) for texts in (POSITIVE, NEGATIVE)]
    torch.testing.assert_close(everywhere[1].double(), expected[0] - expected[1], rtol=1e-4, atol=1e-5)
    tail = steering_vectors(model, POSITIVE, NEGATIVE, layers=1, positions=slice(-2, None))
    expected = [states(model, texts, 1, lambda x: x[-2:].mean(0)).mean(0) for texts in (POSITIVE, NEGATIVE)]
    torch.testing.assert_close(tail[1].double(), expected[0] - expected[1], rtol=1e-4, atol=1e-5)
    word = steering_vectors(model, ["the cat sat"], ["the dog sat"], layers=1, positions=last_of("sat"))
    last = steering_vectors(model, ["the cat sat"], ["the dog sat"], layers=1)
    torch.testing.assert_close(word[1], last[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    module = tiny_model("llama").to(dtype)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    found = steering_vectors(model, POSITIVE, NEGATIVE)
    for layer, direction in found.directions.items():
        expected = states(model, POSITIVE, layer).mean(0) - states(model, NEGATIVE, layer).mean(0)
        # padding moves a half-precision state by a rounding, and nothing but that
        assert (direction.double() - expected).norm() < 0.05 * expected.norm()
    with torch.no_grad(), model.steering(found, factor=2), model.trace(POSITIVE[0]):
        logits = model.logits.save()
    assert logits.dtype == dtype
    assert found.logits(model, 2)["promoted"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((POSITIVE, NEGATIVE[:3]), {"method": "pca"}, "4 positive and 3 negative"),
        ((POSITIVE, NEGATIVE), {"method": "svd"}, "not one of mean, pca"),
        ((POSITIVE[:1], NEGATIVE[:1]), {"method": "pca"}, "at least 2 pairs"),
        ((POSITIVE, POSITIVE), {}, "gives? no direction|give no direction"),
        ((POSITIVE,), {}, "no negative prompts"),
        ((POSITIVE, NEGATIVE), {"labels": [1] * 4}, "not both"),
        ((POSITIVE,), {"labels": [1, 0]}, "2 labels for 4 texts"),
        ((POSITIVE,), {"labels": [1, 1, 1, 1]}, "two classes"),
        ((POSITIVE,), {"labels": [0, 1, 2, 0]}, "two classes"),
        ((POSITIVE,), {"labels": [1, 1, 0, 0], "method": "pca"}, "pairs"),
        ((POSITIVE, NEGATIVE), {"norm": -1.0}, "positive"),
        ((POSITIVE, []), {}, "No prompts"),
    ],
)
def test_what_gives_no_direction_is_refused(tiny, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        steering_vectors(tiny("llama"), *arguments, **options)


def test_labels_are_no_texts(tiny):
    with pytest.raises(TypeError, match="True or False"):
        steering_vectors(tiny("llama"), POSITIVE, labels=["good", "bad", "good", "bad"])


# -- the vector ------------------------------------------------------------------------------------------------------


def made(seed=0, layers=(1, 3), width=8, **known):
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(width, generator=generator) for layer in layers}, **known)


def test_arithmetic():
    a, b = made(0, model="m", method="mean"), made(1, layers=(3, 2), model="m", method="mean")
    both = a + 2 * b - b / 4
    assert both.layers == (1, 2, 3)
    torch.testing.assert_close(both[1], a[1])
    torch.testing.assert_close(both[2], 1.75 * b[2])
    torch.testing.assert_close(both[3], a[3] + 1.75 * b[3])
    assert (both.model, both.method) == ("m", "mean")
    assert -a == a * -1
    assert sum([a, b]) == a + b
    assert a * np.float32(2) == a + a == a * torch.tensor(2.0)
    torch.testing.assert_close((a - a)[1], torch.zeros(8))
    assert (a - made(1, model="m", method="pca")).method == "mean - pca"
    for wrong in ("a * b", "a * 'x'", "a + 1", "1 + a", "a / b"):
        with pytest.raises(TypeError):
            eval(wrong, {"a": a, "b": b})
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            a * wrong
    with pytest.raises(ZeroDivisionError):
        a / 0


def test_it_cannot_be_changed():
    source = torch.ones(4)
    vector = SteeringVector({0: source})
    source += 1
    assert vector[0].tolist() == [1, 1, 1, 1]
    for name in ("directions", "model", "other"):
        with pytest.raises(AttributeError, match="cannot be changed"):
            setattr(vector, name, None)
    with pytest.raises(TypeError):
        vector.directions[1] = source
    vector.to_dict()[0].zero_()
    assert vector[0].any()


def test_similarity():
    a, b = made(0), made(1)
    expected = {i: torch.nn.functional.cosine_similarity(a[i], b[i], dim=0).item() for i in (1, 3)}
    assert a.similarity(b) == pytest.approx(expected, abs=1e-6)
    assert a.similarity(-3 * a) == pytest.approx({1: -1, 3: -1})
    with pytest.raises(ValueError, match="share none"):
        a.similarity(made(layers=(0,)))
    with pytest.raises(ValueError, match="zero at layer 1"):
        a.similarity(a - a)
    with pytest.raises(ValueError, match=r"width 8.*width 4"):
        a.similarity(made(width=4))


def test_random_control_and_norms():
    vector = made(3)
    control = vector.random(7)
    assert control == vector.random(7) != vector.random(8)
    assert control.norms == pytest.approx(vector.norms)
    assert abs(made(3, width=4096).similarity(made(3, width=4096).random())[1]) < 0.1
    assert vector.to_norm(2.5).norms == pytest.approx({1: 2.5, 3: 2.5})
    assert vector.select(3).layers == (3,)
    assert made(num_layers=4).select([-1]).layers == (3,)
    with pytest.raises(KeyError, match="no direction for layer 2; there are: 1, 3"):
        vector.select(2)


@pytest.mark.parametrize(
    ("directions", "error"),
    [
        ({}, ValueError),
        ({0: torch.full((3,), torch.nan)}, ValueError),
        ({0: torch.full((3,), 1e300, dtype=torch.float64)}, ValueError),
        ({0: torch.ones(3), 1: torch.ones(4)}, ValueError),
        ({0: torch.ones(1, 3)}, ValueError),
        ({0: torch.ones(3, dtype=torch.bool)}, TypeError),
        ({0: torch.ones(3, dtype=torch.complex64)}, TypeError),
        ({0: "abc"}, TypeError),
        ({"0": torch.ones(3)}, TypeError),
        ({True: torch.ones(3)}, TypeError),
        ({-1: torch.ones(3)}, IndexError),
        (torch.ones(3), TypeError),
    ],
)
def test_what_is_no_direction_is_refused(directions, error):
    with pytest.raises(error):
        SteeringVector(directions)


def test_saved_and_loaded(tmp_path):
    vector = made(0, model="some/model", revision="r", num_layers=5, prompts="abc", details={"losses": [1.0]})
    vector.save(tmp_path / "new" / "tone")
    again = SteeringVector.load(tmp_path / "new" / "tone.safetensors")
    assert again == vector
    assert again.details == {"losses": [1.0]}
    assert copy.deepcopy(vector) == copy.copy(vector) == pickle.loads(pickle.dumps(vector)) == vector
    assert hash(again) == hash(vector)
    assert again != vector * 2
    file = tmp_path / "new" / "tone.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        SteeringVector.load(file)
    Result({"x": torch.zeros(1)}, {"x": ("a",)}, {"a": (0,)}).save(tmp_path / "result")
    with pytest.raises(ValueError, match="holds no steering vector"):
        SteeringVector.load(tmp_path / "result")
    with pytest.raises(FileExistsError):
        vector.save(tmp_path / "result")


def test_plain_dicts(tiny):
    model = tiny("llama")
    width = model.hidden_size
    vector = SteeringVector.from_dict({-1: np.ones(width), 0: [0.5] * width}, model)
    assert vector.layers == (0, model.num_layers - 1)
    assert {layer: d.tolist() for layer, d in vector.to_dict().items()} == {
        0: [0.5] * width,
        model.num_layers - 1: [1.0] * width,
    }
    with pytest.raises(IndexError, match=f"no layer {model.num_layers}"):
        SteeringVector.from_dict({model.num_layers: torch.ones(width)}, model)
    with pytest.raises(ValueError, match=rf"width 3.*width {width}"):
        SteeringVector.from_dict({0: torch.ones(3)}, model)


def test_another_model_is_refused(tiny):
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    vector = steering_vectors(llama, POSITIVE, NEGATIVE)
    vector.check(llama)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*(GPT2LMHeadModel|width)"):
        vector.check(gpt2)
    wide = StandardizedTransformer(tiny_model("llama", hidden_size=96), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"width 64.*width 96|width \d+.*width 96"):
        vector.check(wide)
    with pytest.raises(ValueError, match="the/other"):
        (vector + SteeringVector(vector.directions, model="the/other"))
    named = SteeringVector(vector.directions, model="hub/LlamaForCausalLM", num_layers=llama.num_layers)
    named.check(llama)  # the last part of the name is the model's
    with pytest.raises(ValueError, match=r"the/other.*LlamaForCausalLM.*for_model"):
        SteeringVector(vector.directions, model="the/other").check(llama)
    SteeringVector(vector.directions, model="the/other").for_model(llama).check(llama)
    with pytest.raises(ValueError, match="layer 40"):
        SteeringVector({40: vector[0]}).check(llama)
    with pytest.warns(UserWarning, match="revision v2"):
        SteeringVector(vector.directions, model="LlamaForCausalLM", revision="v2").check(llama)
    with pytest.raises(ValueError, match="type gpt2"):
        SteeringVector(vector.directions, model_type="gpt2").check(llama)


def test_another_models_vector_does_not_steer(tiny):
    model = tiny("llama")
    vector = SteeringVector({1: torch.ones(model.hidden_size)}, model="the/other")
    with pytest.raises(ValueError, match=r"the/other.*LlamaForCausalLM"):
        model.steering(vector)
    with pytest.raises(ValueError, match=r"the/other"), model.trace(POSITIVE[0]):
        steer(model, 1, vector)
    with model.steering(vector.for_model(model)):
        assert len(model.standing) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "granite"])
def test_what_it_promotes(tiny, kind):
    model = tiny(kind)
    vector = steering_vectors(model, POSITIVE, NEGATIVE)
    found = vector.logits(model, 4)
    for i, layer in enumerate(vector.layers):
        v = vector[layer]
        with torch.no_grad():
            logits = (model.project_on_vocab(v) - model.project_on_vocab(-v)) / 2
        order = logits.argsort(descending=True)
        assert found["promoted_ids"][i].tolist() == order[:4].tolist()
        assert found["demoted_ids"][i].tolist() == order.flip(0)[:4].tolist()
        torch.testing.assert_close(found["promoted"][i], logits[order[:4]], rtol=1e-4, atol=1e-5)
    assert "promoted_token" in found.to_dataframe().columns
    with pytest.raises(ValueError, match="k=0"):
        vector.logits(model, 0)


def test_steering_with_it_adds_its_directions(tiny):
    model = tiny("llama")
    vector = steering_vectors(model, POSITIVE, NEGATIVE, layers=[0, 2])

    def add(layer):
        def hook(_, __, output):
            stream = output if isinstance(output, torch.Tensor) else output[0]
            new = stream + 1.5 * vector[layer]
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        return model._module.get_submodule(model.layer_paths[layer]).register_forward_hook(hook)

    handles = [add(layer) for layer in (0, 2)]
    with torch.no_grad():
        expected = model._module(model.tokenizer(POSITIVE[0], return_tensors="pt").input_ids).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), model.trace(POSITIVE[0]):
        model.steer(None, vector, 1.5)
        inside = model.logits.save()
    with torch.no_grad(), model.steering(vector, factor=1.5), model.trace(POSITIVE[0]):
        around = model.logits.save()
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(around, expected)


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_gguf_as_repeng_writes_it(tmp_path):
    """Written with the package gguf alone, as repeng does."""
    gguf = pytest.importorskip("gguf")
    rows = {layer: np.random.default_rng(layer).normal(size=6).astype(np.float32) for layer in (3, 1, 2)}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(rows))
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vector = SteeringVector.from_gguf(tmp_path / "theirs.gguf")
    assert vector.layers == (1, 2, 3)
    assert vector.model_type == "llama"
    for layer, row in rows.items():
        assert vector[layer].tolist() == row.tolist()


def test_gguf_as_repeng_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    vector = made(model_type="llama", layers=(1, 2, 5))
    vector.to_gguf(tmp_path / "ours.gguf")
    vector.to_gguf(tmp_path / "ours.gguf")  # over its own kind
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    texts = {
        name: bytes(reader.get_field(name).parts[-1]).decode()
        for name in ("general.architecture", "controlvector.model_hint")
    }
    assert texts == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 3
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        f"direction.{layer}": vector[layer].tolist() for layer in vector.layers
    }
    assert SteeringVector.from_gguf(tmp_path / "ours.gguf").to_dict().keys() == {1, 2, 5}
    with pytest.warns(UserWarning, match="layer 0"):
        made(model_type="llama", layers=(0, 1)).to_gguf(tmp_path / "zero.gguf")
    with pytest.raises(ValueError, match="for_model"):
        made().to_gguf(tmp_path / "unknown.gguf")
    (tmp_path / "text.gguf").write_text("no vector")
    with pytest.raises(FileExistsError):
        vector.to_gguf(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="no GGUF file"):
        SteeringVector.from_gguf(tmp_path / "text.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.gguf", "text.gguf", "zero.gguf"]


def test_without_gguf_and_sklearn(tiny, monkeypatch, tmp_path):
    import sys

    for name in ("gguf", "sklearn", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"nnterp-interventions\[gguf\]"):
        made(model_type="llama").to_gguf(tmp_path / "x.gguf")
    with pytest.raises(ModuleNotFoundError, match=r"nnterp-interventions\[probe\]"):
        steering_vectors(tiny("llama"), POSITIVE, NEGATIVE, "probe")
