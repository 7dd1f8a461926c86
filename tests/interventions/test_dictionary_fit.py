"""The fit of a dictionary and the report of its features, against plain hooks and slow loops; features of the toy."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

import nnterp
from nnterp.interventions import (
    DictionaryMismatch,
    FeatureReport,
    Result,
    SteeringVector,
    dictionary_fit,
    feature_report,
)
from nnterp.record import replace

PLEASANT = [
    "I am happy. The weather today is",
    "What a wonderful day. The film was",
    "We are happy. I think the cake is",
]
UNPLEASANT = ["I am sad. The weather today is", "What a terrible day. The film was", "We are sad. I think the cake is"]
TEXTS = [
    "The capital of France is Paris. The main language of Japan is Japanese.",
    "When Anna and Tom went to the park, Tom gave a ball to Anna.",
    "king king\n1135 1135\nhello hello\nriver river",
    "The Eiffel Tower is in the city of Paris.",
    *PLEASANT,
    *UNPLEASANT,
]
QUIET = {"progress": False}


def own(output):
    return output[0] if isinstance(output, tuple) else output


def at_layer(model, layer, part):
    module = model._module.model.layers[layer]
    return module if part == "layer" else module.mlp


def plain_run(model, ids, layer, part, change=None):
    """Input, output and logits of one row, by hooks; `change(output)` replaces the output."""
    seen = {}

    def hook(module, args, output):
        seen["x"], seen["y"] = args[0].detach().clone(), own(output).detach().clone()
        if change is None:
            return output
        new = change(seen["x"], own(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = at_layer(model, layer, part).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model._module(input_ids=torch.tensor([ids])).logits
    finally:
        handle.remove()
    return seen["x"][0], seen["y"][0], logits[0]


def nats(logits, ids, skip):
    pieces = [-logits[p].log_softmax(-1)[ids[p + 1]] for p in range(skip, len(ids) - 1)]
    return [float(piece) for piece in pieces]


@pytest.mark.parametrize(("name", "part", "skip"), [("residual_4", "layer", 0), ("transcoder_4", "mlp", 1)])
def test_fit_equals_a_slow_loop(toy, name, part, skip):
    dictionary = nnterp.toy_dictionary(name)
    ids = [toy.tokenizer(text).input_ids for text in TEXTS]
    kept, reconstructed, counts, losses = [], [], [], {}

    def encoded(x, y):
        return x if part == "mlp" else y

    for row in ids:
        x, y, logits = plain_run(toy, row, 4, part)
        features = dictionary.encode(encoded(x, y)[skip:])
        kept.append(y[skip:])
        reconstructed.append(dictionary.decode(features))
        counts.append(features)
        losses.setdefault("clean", []).extend(nats(logits, row, skip))
    y, made, features = torch.cat(kept), torch.cat(reconstructed), torch.cat(counts)
    for kind in ("spliced", "zero", "mean"):
        for row in ids:

            def change(x, output, kind=kind):
                new = output.clone()
                if kind == "spliced":
                    new[0, skip:] = dictionary.decode(dictionary.encode(encoded(x, output)[0, skip:]))
                else:
                    new[0, skip:] = 0 if kind == "zero" else y.mean(0)
                return new

            losses.setdefault(kind, []).extend(nats(plain_run(toy, row, 4, part, change)[2], row, skip))
    fit = dictionary_fit(toy, dictionary, TEXTS, skip_first=skip, batch_size=4, **QUIET)
    variance = 1 - float((y - made).square().sum() / (y - y.mean(0)).square().sum())
    assert fit.explained_variance == pytest.approx(variance, abs=1e-5)
    assert fit.cosine == pytest.approx(float(torch.cosine_similarity(y, made, dim=-1).mean()), abs=1e-5)
    assert fit.l0 == pytest.approx(float((features > 0).sum(-1).float().mean()), rel=1e-5)
    assert fit.dead == int((features == 0).all(0).sum())
    torch.testing.assert_close(fit["density"], (features > 0).float().mean(0))
    torch.testing.assert_close(fit["mean_activation"], features.sum(0) / (features > 0).sum(0), equal_nan=True)
    for kind, found in losses.items():
        assert fit.losses[kind] == pytest.approx(sum(found) / len(found), abs=2e-5), kind
    clean, spliced, zero = (sum(losses[k]) / len(losses[k]) for k in ("clean", "spliced", "zero"))
    assert fit.loss_recovered == pytest.approx((zero - spliced) / (zero - clean), abs=1e-3)


def test_a_fit_is_saved_and_printed(toy, tmp_path):
    fit = dictionary_fit(toy, nnterp.toy_dictionary("residual_4"), TEXTS, **QUIET)
    fit.save(tmp_path / "fit")
    assert Result.load(tmp_path / "fit").losses == fit.losses
    assert "explained variance 0.9" in repr(fit)
    assert "layers_output[4]" in repr(fit)


def test_a_dictionary_that_does_not_belong_is_warned_of(toy):
    dictionary = nnterp.toy_dictionary("residual_4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DictionaryMismatch)
        dictionary_fit(toy, dictionary, TEXTS, **QUIET)
    with pytest.warns(DictionaryMismatch, match=r"does not seem to belong to layers_output\[0\] of"):
        dictionary_fit(toy, dictionary, TEXTS, at="layers_output[0]", **QUIET)
    swapped = replace(dictionary, decoder=dictionary.decoder.flip(0))
    with pytest.warns(DictionaryMismatch, match="of their variance"):
        dictionary_fit(toy, swapped, TEXTS, **QUIET)


@pytest.fixture
def beginning(toy):
    """The toy's tokenizer with a beginning-of-sequence token, which it does not add itself."""
    toy.tokenizer.bos_token = "<|endoftext|>"
    yield toy.tokenizer.bos_token_id
    toy.tokenizer.bos_token = None


def test_beginnings_that_differ_are_warned_of(toy, beginning):
    dictionary = nnterp.toy_dictionary("residual_4")
    with pytest.warns(DictionaryMismatch, match="with a beginning-of-sequence token, and 1 of 1 texts are without"):
        feature_report(toy, replace(dictionary, prepend_bos=True), TEXTS[:1], [0], **QUIET)
    row = [beginning, *toy.tokenizer(TEXTS[0]).input_ids]
    with pytest.warns(DictionaryMismatch, match="without a beginning-of-sequence token, and 1 of 1 texts are with"):
        feature_report(toy, dictionary, [row], [0], **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DictionaryMismatch)
        found = feature_report(toy, replace(dictionary, prepend_bos=True), [row], [0], **QUIET)
    assert found.about["arguments"]["skip_first"] == 1


def test_bad_input(toy, tiny):
    dictionary = nnterp.toy_dictionary("residual_4")
    with pytest.raises(ValueError, match="has width 128"):
        dictionary_fit(tiny("llama"), dictionary, [[5, 6, 7, 8]], at="layers_output[0]", **QUIET)
    with pytest.raises(ValueError, match=r"attention_scores|width"):
        dictionary_fit(toy, dictionary, TEXTS, at="mlp_neurons[4]", **QUIET)
    with pytest.raises(ValueError, match="does not say which value it encodes: give at="):
        dictionary_fit(toy, replace(dictionary, reads=None, writes=None), TEXTS, **QUIET)
    with pytest.raises(IndexError):
        dictionary_fit(toy, dictionary, TEXTS, at="layers_output[8]", **QUIET)
    with pytest.raises(ValueError, match="name one, such as"):
        dictionary_fit(toy, dictionary, TEXTS, at="layers_output", **QUIET)
    with pytest.raises(TypeError, match="A Dictionary is asked for"):
        dictionary_fit(toy, {"W_enc": 1}, TEXTS, **QUIET)
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        dictionary_fit(toy, dictionary, ["The"], **QUIET)
    backwards = replace(nnterp.toy_dictionary("transcoder_4"), writes="mlps_output[3]")
    with pytest.raises(ValueError, match="is computed after"):
        dictionary_fit(toy, backwards, TEXTS, **QUIET)
    with pytest.raises(IndexError):
        feature_report(toy, dictionary, TEXTS, [768], **QUIET)


def test_heads_outputs_are_encoded_side_by_side(toy):
    """An autoencoder of all heads' outputs reads them as one vector, as those that are published do."""
    identity = torch.eye(128)
    plain = nnterp.Dictionary(
        torch.cat([identity, -identity]), torch.zeros(256), torch.cat([identity, -identity]), torch.zeros(128),
        nnterp.traced.Activation(), reads="attention_head_outputs[2]", writes="attention_head_outputs[2]",
    )  # fmt: skip
    fit = dictionary_fit(toy, plain, TEXTS[:2], **QUIET)
    assert fit.explained_variance == pytest.approx(1, abs=1e-5)
    assert fit.losses["spliced"] == pytest.approx(fit.losses["clean"], abs=1e-5)
    assert fit.losses["zero"] != pytest.approx(fit.losses["clean"], abs=1e-3)


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    toy = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
    return feature_report(toy, nnterp.toy_dictionary("residual_4"), TEXTS, top=3, context=(3, 2), batch_size=3, **QUIET)


def test_report_equals_a_slow_loop(toy, report):
    dictionary = nnterp.toy_dictionary("residual_4")
    ids = [toy.tokenizer(text).input_ids for text in TEXTS]
    rows = [dictionary.encode(plain_run(toy, row, 4, "layer")[1]) for row in ids]
    everything = torch.cat(rows)
    torch.testing.assert_close(report["density"], (everything > 0).float().mean(0))
    several = [i for i in range(768) if sum(bool((row[:, i] > 0).any()) for row in rows) > 3][:5]
    assert several
    for feature in (*several, int((everything == 0).all(0).nonzero()[0])):
        peaks = sorted(
            ((float(row[:, feature].max()), -i, int(row[:, feature].argmax())) for i, row in enumerate(rows)),
            reverse=True,
        )
        expected = [(peak, -i, at) for peak, i, at in peaks if peak > 0][:3]
        found = report.contexts(feature)
        assert [(c["text"], c["position"]) for c in found] == [(i, at) for _, i, at in expected]
        for context, (peak, i, at) in zip(found, expected, strict=True):
            assert context["peak"] == pytest.approx(peak, rel=1e-4)
            low, high = max(at - 3, 0), min(at + 3, len(ids[i]))
            assert context["tokens"] == [toy.tokenizer.decode([t]) for t in ids[i][low:high]]
            assert context["activations"] == pytest.approx(rows[i][low:high, feature].tolist(), rel=1e-4, abs=1e-4)


def test_promoted_tokens_are_those_of_a_steering_vector(toy, report):
    dictionary = nnterp.toy_dictionary("residual_4")
    vector = SteeringVector({4: dictionary.decoder[399]}, method="given", model=str(toy.repo_id))
    expected = vector.logits(toy, k=10)
    assert torch.equal(report["promoted_ids"][399], expected["promoted_ids"][0])
    torch.testing.assert_close(report["suppressed"][399], expected["demoted"][0], rtol=1e-4, atol=1e-4)


def test_report_is_a_table_and_is_saved(report, tmp_path):
    table = report.table()
    assert list(table.feature) == list(range(768))
    assert table.density.iloc[399] == pytest.approx(float(report["density"][399]))
    report.save(tmp_path / "report")
    again = FeatureReport.load(tmp_path / "report")
    assert isinstance(again, FeatureReport)
    assert again.contexts(399) == report.contexts(399)
    with pytest.raises(ValueError, match="holds no feature 768"):
        report.contexts(768)


def test_memory_does_not_grow_with_the_number_of_texts(toy):
    """What the report holds has the same shape after ten texts and after forty."""
    dictionary = nnterp.toy_dictionary("residual_4")
    few, many = (feature_report(toy, dictionary, TEXTS * n, [399], top=4, **QUIET) for n in (1, 4))
    assert {n: t.shape for n, t in few.tensors.items()} == {n: t.shape for n, t in many.tensors.items()}
    torch.testing.assert_close(few["density"], many["density"])
    assert many["texts"][0].tolist() == sorted(many["texts"][0].tolist())  # equal peaks in the order of the texts


# -- what features of the toy stand for ------------------------------------------------------------------------------


def last_features(toy, texts):
    dictionary = nnterp.toy_dictionary("residual_4")
    ids = [toy.tokenizer(text).input_ids for text in texts]
    return torch.stack([dictionary.encode(plain_run(toy, row, 4, "layer")[1][-1]) for row in ids])


def tone_words():
    good = ["wonderful", "lovely", "great", "perfect", "delicious", "charming"]
    return good, ["terrible", "horrible", "awful", "ugly", "gloomy", "nasty"]


def mass(logits, toy, words):
    ids = [toy.tokenizer(" " + word).input_ids for word in words]
    return float(logits.softmax(-1)[[i[0] for i in ids if len(i) == 1]].sum())


def test_a_feature_stands_for_each_tone_and_steers_it(toy):
    """Found on some texts, it tells others apart, and adding its direction turns the words that follow."""
    pleasant, unpleasant = last_features(toy, PLEASANT), last_features(toy, UNPLEASANT)
    good = int((pleasant.min(0).values - unpleasant.max(0).values).argmax())
    bad = int((unpleasant.min(0).values - pleasant.max(0).values).argmax())
    others = ["I feel glad. This soup tastes", "I love the garden. The weather in Rome is"]
    sad = ["I feel angry. This soup tastes", "I hate the garden. The weather in Rome is"]
    assert (last_features(toy, others)[:, good] > 0).all()
    assert (last_features(toy, others)[:, bad] == 0).all()
    assert (last_features(toy, sad)[:, bad] > 0).all()
    assert (last_features(toy, sad)[:, good] == 0).all()
    facts = last_features(toy, ["The capital of France is", "king king\n1135", "Anna and Tom were at the"])
    assert (facts[:, [good, bad]] == 0).all()
    decoder = nnterp.toy_dictionary("residual_4").decoder
    size = float(pleasant[:, good].mean())
    change = size * (decoder[good] - decoder[bad])
    for text in sad:
        row = toy.tokenizer(text).input_ids
        words = tone_words()
        before = plain_run(toy, row, 4, "layer")[2][-1]

        def add(x, output):
            new = output.clone()
            new[0, -1] += 2 * change
            return new

        after = plain_run(toy, row, 4, "layer", add)[2][-1]
        with toy.trace(text):
            toy.layers_output[4][:, -1] += 2 * change
            steered = toy.logits[0, -1].save()
        torch.testing.assert_close(steered.detach(), after, rtol=1e-4, atol=1e-4)
        assert mass(before, toy, words[1]) > mass(before, toy, words[0]) * 5
        assert mass(after, toy, words[0]) > mass(after, toy, words[1]) * 5


@pytest.mark.parametrize("name", ["residual_4", *(f"transcoder_{i}" for i in range(8))])
def test_the_dictionaries_that_come_with_the_toy_explain_held_out_text(toy, name):
    import importlib
    import itertools
    import sys
    from pathlib import Path

    folder = str(Path(__file__).parents[2] / "tools" / "toy")
    sys.path.insert(0, folder)
    try:
        documents = list(itertools.islice(importlib.import_module("corpus").documents(77), 12))
    finally:
        sys.path.remove(folder)
    texts = [text for text in documents if len(toy.tokenizer(text).input_ids) > 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DictionaryMismatch)
        fit = dictionary_fit(toy, nnterp.toy_dictionary(name), texts, **QUIET)
    sparse = name == "transcoder_0"  # fewer active features, which stand for tokens
    assert fit.explained_variance > (0.78 if sparse else 0.88)
    assert (1 if sparse else 4) < fit.l0 < (5 if sparse else 20)
    assert fit.losses["spliced"] - fit.losses["clean"] < (0.2 if sparse else 0.1)
    assert math.isfinite(fit.loss_recovered)


def test_the_dictionaries_are_small_and_name_their_place():
    from pathlib import Path

    folder = Path(nnterp.toy_checkpoint()).with_name("_toy_dictionaries")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2.5 * 2**20
    for i in range(8):
        found = nnterp.toy_dictionary(f"transcoder_{i}")
        assert (found.reads, found.writes) == (f"mlps_input[{i}]", f"mlps_output[{i}]")
    assert "/work" not in json.dumps([p.read_text() for p in folder.rglob("cfg.json")])
    with pytest.raises(ValueError, match="it has residual_4, transcoder_0"):
        nnterp.toy_dictionary("residual_5")
