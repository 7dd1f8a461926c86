"""Tuned and Jacobian lenses: their numbers against plain torch, what they are worth, their files, refusals."""

import importlib
import json
import random

import numpy as np
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.inputs import encode, pad
from nnterp.interventions import (
    Lens,
    evaluate_lens,
    fit_jacobian_lens,
    fit_tuned_lens,
    lens_from_hub,
    logit_lens,
    logit_lens_table,
)
from nnterp.interventions._fitted._streams import states_of
from nnterp.interventions._fitted._tuned import tuned_loss
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer

from .callers import default_dtype

TEXTS = [[11, 42, 57, 93, 130, 7], [60, 77, 101, 15], [9, 12, 31, 40, 8], [60, 78, 101, 15, 33, 2, 90]]
MORE = [[(13 * i + 7 * j) % 190 + 5 for j in range(4 + i % 5)] for i in range(24)]
QUIET = {"progress": False}
TYPES = "gpt2 llama gemma2 gemma3_text mistral qwen3 gpt_neox opt falcon mixtral bloom phi olmo2 cohere mamba".split()


def own(output):
    return output[0] if isinstance(output, tuple) else output


def with_own(output, stream):
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def plain_jacobian(model, ids, layer, valid):
    """Mean over sources, sum over targets, of the derivative of the last layer's output by that of `layer`."""
    module = model._module
    first, last = (module.get_submodule(model.layer_paths[i]) for i in (layer, model.num_layers - 1))
    seen = {}
    handle = first.register_forward_hook(lambda _m, _a, out: seen.update(stream=own(out).detach()))
    with torch.no_grad():
        module(input_ids=ids, use_cache=False)
    handle.remove()

    def after(stream):
        found = {}
        handles = [
            first.register_forward_hook(lambda _m, _a, out: with_own(out, stream)),
            last.register_forward_hook(lambda _m, _a, out: found.update(stream=own(out))),
        ]
        try:
            module(input_ids=ids, use_cache=False)
        finally:
            for one in handles:
                one.remove()
        return found["stream"]

    try:
        whole = torch.func.jacrev(after)(seen["stream"])
    except (RuntimeError, NotImplementedError):  # an operation without a batching rule
        whole = torch.autograd.functional.jacobian(after, seen["stream"])
    whole = whole[0, :, :, 0].detach()  # [target, hidden, source, hidden]
    return whole[valid][:, :, valid].sum(0).mean(1)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_jacobian_is_that_of_plain_torch(tiny, model_type):
    model, skip = tiny(model_type), 1
    layers = [0, model.num_layers - 2]
    lens = fit_jacobian_lens(model, TEXTS, layers, skip_first=skip, held_out=0, max_tokens=60, **QUIET)
    assert lens.layers == tuple(sorted(set(layers)))
    for layer in lens.layers:
        each = []
        for ids in TEXTS:
            valid = torch.arange(skip, len(ids) - 1)
            each.append(plain_jacobian(model, torch.tensor([ids]), layer, valid))
        expected = torch.stack(each).mean(0)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(lens.weights[layer], expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_how_much_runs_at_once_changes_nothing(tiny):
    model = tiny("llama")
    found = [
        fit_jacobian_lens(model, TEXTS, 0, skip_first=1, held_out=0, max_tokens=n, **QUIET).weights[0]
        for n in (1, 100, 5000)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-4)


def test_a_lower_rank_is_a_part_of_the_whole(tiny):
    model = tiny("gemma2")
    kwargs = {"skip_first": 1, "held_out": 0, **QUIET}
    whole = fit_jacobian_lens(model, TEXTS, 1, **kwargs).weights[1]
    full = fit_jacobian_lens(model, TEXTS, 1, rank=model.hidden_size, **kwargs).weights[1]
    part = fit_jacobian_lens(model, TEXTS, 1, rank=3, **kwargs).weights[1]
    torch.testing.assert_close(full, whole, atol=1e-4, rtol=1e-3)
    assert torch.linalg.matrix_rank(part, rtol=1e-4) == 3
    basis = torch.linalg.svd(part)[0][:, :3]
    torch.testing.assert_close(basis @ basis.T @ whole, part, atol=1e-3 * float(whole.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere", "olmo2"])
def test_gradients_of_the_tuned_lens_are_plain_torchs(tiny, model_type):
    model = tiny(model_type)
    module, rows = model._module, encode(model, TEXTS)
    batch = pad(model, rows)
    layers = [0, model.num_layers - 2]
    states, final, _ = states_of(model, batch, layers, 1)
    torch.manual_seed(0)
    weights = (0.02 * torch.randn(2, model.hidden_size, model.hidden_size)).requires_grad_(True)
    biases = torch.randn(2, model.hidden_size).requires_grad_(True)
    loss = tuned_loss(model, states, final, weights, biases)

    plain_weights, plain_biases = (x.detach().clone().requires_grad_(True) for x in (weights, biases))
    total, count = 0.0, 0
    for ids in TEXTS:
        streams = {}
        handles = [
            module.get_submodule(model.layer_paths[i]).register_forward_hook(
                lambda _m, _a, out, i=i, streams=streams: streams.update({i: own(out)})
            )
            for i in layers
        ]
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids])).logits[0, 1:-1]
        for handle in handles:
            handle.remove()
        count += len(logits)
        for k, layer in enumerate(layers):
            stream = streams[layer][0, 1:-1]
            read = head(model, stream + stream @ plain_weights[k].T + plain_biases[k]).log_softmax(-1)
            logs = logits.log_softmax(-1)
            total = total + (logs.exp() * (logs - read)).sum()
    total = total / count
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-4)
    for ours, theirs in ((weights.grad, plain_weights.grad), (biases.grad, plain_biases.grad)):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def head(model, stream):
    """The final norm and the head of these architectures, by hand."""
    module, config = model._module, model._module.config
    norm = module.transformer.ln_f if config.model_type == "gpt2" else module.model.norm
    logits = module.get_output_embeddings()(norm(stream))
    if config.model_type == "cohere":
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.fixture(scope="module")
def small():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def lens(small):
    return fit_tuned_lens(small, MORE, epochs=2, lr=3e-3, **QUIET)


def test_logit_lens_reads_through_it(small, lens):
    found = logit_lens(small, TEXTS, lens=lens, positions=[0, -1])
    every = small.collect(TEXTS, "layers_output", positions=[0, -1], progress=False)["layers_output"]
    for layer in range(small.num_layers):
        state = every[layer]
        if layer in lens.weights:
            state = state @ lens.weights[layer].T + lens.biases[layer]
        torch.testing.assert_close(found[:, layer], small.project_on_vocab(state).softmax(-1), atol=1e-5, rtol=1e-4)
    plain = logit_lens(small, TEXTS, positions=[0, -1])
    torch.testing.assert_close(found[:, -1], plain[:, -1])
    assert (found[:, 0] - plain[:, 0]).abs().max() > 1e-3


def test_layers_tables_targets_and_single_states(small, lens):
    whole = logit_lens(small, TEXTS, lens=lens)
    some = logit_lens(small, TEXTS, lens=lens, layers=[2, 0, 2])
    torch.testing.assert_close(some, whole[:, [2, 0, 2]])
    table = logit_lens_table(small, TEXTS, 3, lens=lens, targets=[5] * 4)
    last = torch.tensor([len(ids) - 1 for ids in TEXTS])
    probs = table["target_probs"][torch.arange(4), :, last, 0]
    torch.testing.assert_close(probs, whole[..., 5])
    assert "tuned" in table.about["arguments"]["lens"]
    state = small.collect(TEXTS[:1], "layers_output", [1], -1, progress=False)["layers_output"][0]
    torch.testing.assert_close(lens.to_vocab(small, state, 1).softmax(-1), whole[:1, 1], atol=1e-6, rtol=1e-5)
    with pytest.raises(KeyError, match="no map for layer 1; it has maps for 0"):
        logit_lens(small, TEXTS, lens=lens.select(0), layers=[0, 1])
    with pytest.raises(TypeError, match="fit_tuned_lens"):
        logit_lens(small, TEXTS, lens="tuned")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_tokens_direction_is_that_of_the_head_through_the_map(tiny, model_type):
    model = tiny(model_type)
    lens = fit_jacobian_lens(model, TEXTS, skip_first=1, held_out=0, **QUIET)
    module = model._module
    weight = module.transformer.ln_f.weight if model_type == "gpt2" else module.model.norm.weight
    weight = 1 + weight if model_type == "gemma2" else weight
    row = module.get_output_embeddings().weight[17].detach() * weight.detach()
    if model_type == "gpt2":
        row = row - row.mean()
    found = lens.from_vocab(model, 17)
    for layer in lens.layers:
        expected = lens.weights[layer].T @ row
        if model_type == "gpt2":
            cosine = torch.cosine_similarity(found[layer], expected, 0)
            assert cosine > 0.98
        else:
            assert torch.cosine_similarity(found[layer], expected, 0) > 0.95


def test_steering_along_it_raises_the_token(toy):
    texts = [f"The capital of {name} is" for name in ("Italy", "Spain", "Japan", "Poland")]
    lens = fit_jacobian_lens(toy, texts, [4, 5], skip_first=1, held_out=0, **QUIET)
    vector = lens.from_vocab(toy, " Paris").to_norm(30)
    paris = toy.tokenizer(" Paris").input_ids[0]
    with torch.no_grad(), toy.trace(texts):
        before = toy.next_token_probs[:, paris].save()
    with torch.no_grad(), toy.steering(vector, [4, 5]), toy.trace(texts):
        after = toy.next_token_probs[:, paris].save()
    assert before.max() < 0.05
    assert after.min() > 0.2


@pytest.mark.parametrize("fit", [fit_tuned_lens, fit_jacobian_lens])
def test_a_model_in_half_precision_is_fitted_in_float32(fit):
    whole = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    half = StandardizedTransformer(tiny_model("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    kwargs = {"skip_first": 1, **QUIET, **({"epochs": 2} if fit is fit_tuned_lens else {})}
    ours, theirs = fit(whole, MORE, **kwargs), fit(half, MORE, **kwargs)
    assert theirs.weights[0].dtype == torch.float32
    off = (ours.weights[0] - theirs.weights[0]).norm() / (ours.weights[0] - torch.eye(whole.hidden_size)).norm()
    assert off < 0.3
    assert logit_lens(half, TEXTS, lens=theirs).isfinite().all()


# -- what it is worth ------------------------------------------------------------------------------------------------


def slow_kl(model, ids, layer, maps, skip):
    """KL from HuggingFace's own prediction to the head's reading of a mapped stream, the mean over positions."""
    with torch.no_grad():
        logs = model._module(input_ids=torch.tensor([ids])).logits[0, skip:-1].log_softmax(-1)
    states = model.collect([ids], "layers_output", [layer], slice(None), progress=False)["layers_output"][0, 0, skip:-1]
    if maps is not None:
        states = states @ maps[0].T + maps[1]
    read = head(model, states).log_softmax(-1)
    return (logs.exp() * (logs - read)).sum(-1).mean().detach()


@pytest.mark.parametrize("skip", [0, 2])
def test_the_evaluation_is_a_slow_loop_and_the_report_is_the_evaluation(small, skip):
    held_out = MORE[:6]
    fitted = fit_tuned_lens(small, MORE[6:], epochs=2, held_out=held_out, skip_first=skip, **QUIET)
    found = evaluate_lens(small, fitted, held_out, **QUIET)
    for k, layer in enumerate(fitted.layers):
        maps = fitted.weights[layer], fitted.biases[layer]
        expected = torch.stack([slow_kl(small, ids, layer, maps, skip) for ids in held_out])
        plain = torch.stack([slow_kl(small, ids, layer, None, skip) for ids in held_out])
        torch.testing.assert_close(found["kl"][:, k], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["logit_lens_kl"][:, k], plain, atol=1e-5, rtol=1e-4)
        own, told = fitted.report["layers"][str(layer)], slice(1, None, 2)  # the other half has chosen the maps
        assert own["lens"] == pytest.approx(float(expected[told].mean()), rel=1e-4)
        assert own["lens_sd"] == pytest.approx(float(expected[told].std(unbiased=False)), rel=1e-3)
        assert own["logit_lens"] == pytest.approx(float(plain[told].mean()), rel=1e-4)
        assert fitted.details["history"][0][k] == pytest.approx(float(plain[::2].mean()), rel=1e-4)
        assert f"{found['kl'][:, k].mean():.3f}" in found.summary()


def test_maps_are_kept_where_they_were_best(small):
    wild = fit_tuned_lens(small, MORE, epochs=2, lr=3.0, **QUIET)
    history = torch.tensor(wild.details["history"])
    assert history.shape == (3, len(wild.layers))
    for k, layer in enumerate(wild.layers):
        if history[:, k].argmin() == 0:
            assert torch.equal(wild.weights[layer], torch.eye(small.hidden_size))
    assert (history.argmin(0) == 0).any(), "a learning rate this wild makes some layer worse"
    stopped = fit_tuned_lens(small, MORE, epochs=30, lr=3.0, patience=2, **QUIET)
    assert stopped.details["epochs"] < 30
    assert len(stopped.details["history"]) == stopped.details["epochs"] + 1


def test_where_the_logit_lens_is_better_is_said(small, lens):
    bad = Lens("tuned", {0: -torch.eye(small.hidden_size)}, {}, lens.origin, {"skip_first": 0})
    found = evaluate_lens(small, bad, TEXTS, **QUIET)
    assert found.worse == (0,)
    assert "worse than the logit lens" in found.summary()
    nan = {"layers": {"0": {"lens": float("nan"), "logit_lens": 1.0}, "1": {"lens": 0.5, "logit_lens": 1.0}}}
    assert Lens("tuned", bad.weights, {}, lens.origin, {"report": nan}).worse == (0,)


def test_no_text_is_on_both_sides(small):
    same = [MORE[0]] * 10 + MORE[1:6]
    lens = fit_tuned_lens(small, same, epochs=1, held_out=0.4, **QUIET)
    assert lens.details["prompts"] + lens.report["texts"] < 15
    with pytest.raises(ValueError, match="text 1 is among the texts to fit on"):
        fit_tuned_lens(small, MORE, epochs=1, held_out=[[1, 2, 3], MORE[4]], **QUIET)
    with pytest.raises(ValueError, match="1 different texts leaves none"):
        fit_tuned_lens(small, [MORE[0]] * 5, epochs=1, **QUIET)
    made = fit_jacobian_lens(small, TEXTS, skip_first=1, held_out=0, **QUIET)
    with pytest.warns(UserWarning, match="fitted on 2 of these 3 texts"):
        evaluate_lens(small, made, [*TEXTS[:2], MORE[0]], **QUIET)


# -- going on, and files ---------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def stopped_at(model, number):
    count = [0]

    def hook(*_):
        count[0] += 1
        if count[0] == number:
            raise Stop

    return model._module.register_forward_pre_hook(hook)


FITS = {
    "tuned": lambda m, **k: fit_tuned_lens(m, MORE, epochs=4, batch_size=5, lr=3e-3, **QUIET, **k),
    "jacobian": lambda m, **k: fit_jacobian_lens(m, MORE, skip_first=1, max_tokens=64, **QUIET, **k),
}


@pytest.mark.parametrize("kind", FITS)
def test_a_fit_that_is_cut_short_goes_on_to_the_same_lens(small, kind, tmp_path):
    whole, path = FITS[kind](small), tmp_path / "fit"
    draw, found, partials, most = random.Random(3), None, [], 12 if kind == "tuned" else 4
    while found is None:
        handle = stopped_at(small, draw.randint(2, most) if len(partials) < 10 else 0)
        try:
            found = FITS[kind](small, checkpoint=path)
        except Stop as error:
            partials.append((getattr(error, "partial", None), "".join(getattr(error, "__notes__", []))))
        finally:
            handle.remove()
    assert any(partial is not None for partial, _ in partials)
    assert all(partial is None or (partial.kind == kind and "goes on from" in note) for partial, note in partials)
    for layer in whole.layers:
        assert torch.equal(found.weights[layer], whole.weights[layer])
    assert not list(tmp_path.iterdir())


def test_another_fit_does_not_go_on(small, tmp_path):
    handle = stopped_at(small, 3)
    with pytest.raises(Stop):
        FITS["jacobian"](small, checkpoint=tmp_path / "fit")
    handle.remove()
    assert (tmp_path / "fit.safetensors").exists()
    with pytest.raises(ValueError, match=r"Cannot resume.*skip_first"):
        fit_jacobian_lens(small, MORE, skip_first=2, max_tokens=64, checkpoint=tmp_path / "fit", **QUIET)
    with pytest.raises(ValueError, match=r"Cannot resume"):
        FITS["tuned"](small, checkpoint=tmp_path / "fit")


@pytest.mark.parametrize("kind", FITS)
def test_an_interrupt_in_the_report_loses_nothing(small, kind, monkeypatch):
    module = importlib.import_module(f"nnterp.interventions._fitted._{kind}")

    def interrupted(*_):
        raise Stop

    monkeypatch.setattr(module, "report_of", interrupted)
    with pytest.raises(Stop) as caught:
        FITS[kind](small)
    assert caught.value.partial.kind == kind


def test_batches_of_another_kind_are_another_fit(small, tmp_path):
    handle = stopped_at(small, 3)
    with pytest.raises(Stop):
        FITS["jacobian"](small, checkpoint=tmp_path / "fit")
    handle.remove()
    with pytest.raises(ValueError, match=r"Cannot resume"):
        fit_jacobian_lens(small, MORE, skip_first=1, max_tokens=9, checkpoint=tmp_path / "fit", **QUIET)


def test_numpys_numbers_and_other_defaults(small, tmp_path):
    own = {"skip_first": 1, "held_out": 0, **QUIET}
    expected = fit_jacobian_lens(small, TEXTS, rank=2, **own)
    with default_dtype(torch.bfloat16), torch.device("meta"):
        found = fit_jacobian_lens(small, TEXTS, rank=np.int64(2), **{**own, "skip_first": np.int64(1)})
        fit_tuned_lens(small, MORE, epochs=1, **QUIET)
        evaluate_lens(small, found, MORE, **QUIET)
        assert found.from_vocab(small, 5)[0].dtype == torch.float32
    torch.testing.assert_close(found.weights[0], expected.weights[0])
    found.save(tmp_path / "lens")


def test_what_is_longer_than_the_context_is_cut(small):
    limit = small._module.config.max_position_embeddings
    long = [[(7 * i + k) % 190 + 5 for i in range(limit + 9)] for k in range(3)]
    lens = fit_jacobian_lens(small, long, 0, max_length=6, skip_first=1, held_out=0, **QUIET)
    cut = fit_jacobian_lens(small, [ids[:6] for ids in long], 0, skip_first=1, held_out=0, **QUIET)
    torch.testing.assert_close(lens.weights[0], cut.weights[0])


def test_positions_behind_a_soft_prompt():
    model = StandardizedTransformer(tiny_model("cpmant"), tokenizer=tiny_tokenizer())
    lens = fit_tuned_lens(model, MORE, epochs=1, **QUIET)
    found = evaluate_lens(model, lens, TEXTS, **QUIET)
    for i, ids in enumerate(TEXTS):
        lensed = logit_lens(model, [ids], positions=list(range(len(ids) - 1)), layers=[0, -1])[0].log()
        expected = (lensed[1].exp() * (lensed[1] - lensed[0])).sum(-1).mean()
        torch.testing.assert_close(found["logit_lens_kl"][i, 0], expected, atol=1e-4, rtol=1e-3)


def test_saved_and_loaded(small, lens, tmp_path):
    lens.save(tmp_path / "lens")
    again = Lens.load(tmp_path / "lens", small)
    assert (again.kind, again.layers, again.report) == (lens.kind, lens.layers, lens.report)
    assert all(torch.equal(again.weights[i], lens.weights[i]) for i in lens.layers)
    assert all(torch.equal(again.biases[i], lens.biases[i]) for i in lens.layers)
    assert torch.equal(again.origin.probe, lens.origin.probe)
    assert again.origin.certified is True
    assert again.origin.versions["transformers"]


def test_a_lens_of_another_model_is_refused(small, lens, tmp_path):
    lens.save(tmp_path / "lens")
    other = StandardizedTransformer(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"logits after a fixed row of tokens differ by"):
        Lens.load(tmp_path / "lens", other)
    with pytest.raises(ValueError, match=r"fixed row of tokens"):
        logit_lens(other, TEXTS, lens=lens)
    with pytest.warns(UserWarning, match=r"fixed row of tokens"):
        warned = Lens.load(tmp_path / "lens", other, strict=False)
    assert logit_lens(other, TEXTS, lens=warned).isfinite().all()
    wide = StandardizedTransformer(tiny_model("gpt2"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"(width|layers|it is a GPT2LMHeadModel)"):
        lens.check(wide)
    edited = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    lens.check(edited)
    with torch.no_grad():
        edited._module.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    with pytest.raises(ValueError, match=r"other weights, an edit, or another forward pass"):
        lens.check(edited)
    slightly = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        slightly._module.model.layers[1].mlp.down_proj.weight.mul_(1 + 1e-6)
    with pytest.raises(ValueError, match=r"its weights are others"):
        lens.check(slightly)


def test_a_model_that_is_steered(small, lens):
    """A lens may be read under a steering; the model beneath has to be its own, and no lens is fitted there."""
    vector = torch.linspace(-1, 1, small.hidden_size)
    other = StandardizedTransformer(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    with small.steering(vector, 0, 3):
        steered = logit_lens(small, TEXTS, lens=lens)
        for fit in (fit_tuned_lens, fit_jacobian_lens):
            with pytest.raises(ValueError, match="outside of"):
                fit(small, MORE, skip_first=1, **QUIET)
    assert (steered - logit_lens(small, TEXTS, lens=lens)).abs().max() > 1e-3
    with other.steering(vector, 0, 3), pytest.raises(ValueError, match="fixed row of tokens"):
        logit_lens(other, TEXTS, lens=lens)


def test_a_model_without_weights_is_not_loaded(small, lens, tmp_path):
    folder = str(tiny_checkpoint("llama", tmp_path / "model"))
    lazy = StandardizedTransformer(folder)
    fit_jacobian_lens(small, TEXTS, skip_first=1, held_out=0, **QUIET).to_jacobian_lens(tmp_path / "lens.pt")
    Lens.from_jacobian_lens(tmp_path / "lens.pt", lazy)
    lens.check(lazy, strict=False)
    assert not lazy.dispatched


def test_damaged_and_foreign_files_are_refused(small, lens, tmp_path):
    lens.save(tmp_path / "lens")
    file = tmp_path / "lens.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"lens\.safetensors"):
        Lens.load(file)
    small.collect(TEXTS, "layers_output", progress=False).save(tmp_path / "acts")
    with pytest.raises(ValueError, match="holds no lens"):
        Lens.load(tmp_path / "acts")
    with pytest.raises(FileNotFoundError):
        Lens.load(tmp_path / "nothing")


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


def test_the_files_of_the_tuned_lens_package(small, lens, tmp_path, capsys):
    lens.to_tuned_lens(tmp_path / "there")
    state = torch.load(tmp_path / "there" / "params.pt", weights_only=True)
    states = small.collect(TEXTS[:1], "layers_output", [1], slice(None), progress=False)["layers_output"][0, 0]
    theirs = states + (states @ state["2.weight"].T + state["2.bias"])  # its translator of the stream entering layer 2
    torch.testing.assert_close(theirs, lens.to_last_layer(states, 1), atol=1e-5, rtol=1e-5)
    assert len(state) == 2 * small.num_layers
    again = Lens.from_tuned_lens(tmp_path / "there", small)
    for layer in lens.layers:
        torch.testing.assert_close(again.weights[layer], lens.weights[layer])
        torch.testing.assert_close(again.biases[layer], lens.biases[layer])
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": "else/where"}))
    with pytest.raises(ValueError, match="fitted on else/where"):
        Lens.from_tuned_lens(tmp_path / "there", small)
    with pytest.warns(UserWarning, match="fitted on else/where"):
        Lens.from_tuned_lens(tmp_path / "there", small, strict=False)
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "d_model": 12}))
    with pytest.raises(ValueError, match="width 12"):
        Lens.from_tuned_lens(tmp_path / "there", small)
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    torch.save({"1.weight": Hostile()}, tmp_path / "there" / "params.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Lens.from_tuned_lens(tmp_path / "there", small)
    (tmp_path / "there" / "params.pt").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match="truncated or damaged"):
        Lens.from_tuned_lens(tmp_path / "there", small)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Lens.from_tuned_lens(tmp_path / "nowhere", small)


def test_the_files_of_published_jacobian_lenses(small, lens, tmp_path, capsys):
    made = fit_jacobian_lens(small, TEXTS, skip_first=1, held_out=0, **QUIET)
    made.to_jacobian_lens(tmp_path / "lens.pt")
    state = torch.load(tmp_path / "lens.pt", weights_only=True)
    assert set(state) == {"J", "n_prompts", "source_layers", "d_model"}
    assert (state["n_prompts"], state["d_model"], state["J"][0].dtype) == (4, small.hidden_size, torch.float16)
    again = Lens.from_jacobian_lens(tmp_path / "lens.pt", small)
    torch.testing.assert_close(again.weights[1], made.weights[1], atol=1e-2, rtol=2e-3)
    with pytest.raises(ValueError, match="has biases"):
        lens.to_jacobian_lens(tmp_path / "lens.pt")
    torch.save({"J": Hostile(), "d_model": 4, "n_prompts": 1}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Lens.from_jacobian_lens(tmp_path / "hostile.pt", small)
    assert "code ran" not in capsys.readouterr().out
    torch.save({"J": {0: torch.eye(4)}, "d_model": 4, "n_prompts": 1}, tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="width 4"):
        Lens.from_jacobian_lens(tmp_path / "narrow.pt", small)
    torch.save({"J": {0: torch.eye(4)}}, tmp_path / "poor.pt")
    with pytest.raises(ValueError, match="needs J, d_model and n_prompts"):
        Lens.from_jacobian_lens(tmp_path / "poor.pt", small)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Folders of the hub's cache, offline: `published("models--owner--lenses")` is where a snapshot's files go."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def made(name):
        (tmp_path / name / "refs").mkdir(parents=True)
        (tmp_path / name / "refs" / "main").write_text(COMMIT)
        (tmp_path / name / "snapshots" / COMMIT / "lens" / "tiny").mkdir(parents=True)
        return tmp_path / name / "snapshots" / COMMIT / "lens"

    return made


def test_lenses_of_the_hub(small, lens, published, capsys):
    lens.to_tuned_lens(published("spaces--owner--lenses") / "tiny")
    for revision in (None, "main", COMMIT):
        again = lens_from_hub("owner/lenses", "lens/tiny", small, revision=revision, repo_type="space")
        assert all(torch.allclose(again.weights[i], lens.weights[i], atol=1e-6) for i in lens.layers)
        assert again.details["hub"]["commit"] == COMMIT
    made = fit_jacobian_lens(small, TEXTS, skip_first=1, held_out=0, **QUIET)
    folder = published("models--owner--lenses")
    made.to_jacobian_lens(folder / "own.pt")
    again = lens_from_hub("owner/lenses", "lens/own.pt", small)
    torch.testing.assert_close(again.weights[1], made.weights[1], atol=1e-2, rtol=2e-3)
    assert again.details["hub"] == {
        "repo": "owner/lenses",
        "path": "lens/own.pt",
        "repo_type": "model",
        "commit": COMMIT,
    }
    torch.save({"J": Hostile(), "d_model": 4, "n_prompts": 1}, folder / "hostile.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        lens_from_hub("owner/lenses", "lens/hostile.pt", small)
    assert "code ran" not in capsys.readouterr().out
    for name, revision in (("lens/own.pt", "other"), ("lens/none.pt", None), ("lens/tiny", None)):
        with pytest.raises(FileNotFoundError, match=r"of the model owner/lenses at revision"):
            lens_from_hub("owner/lenses", name, small, revision=revision)
    with pytest.raises(ValueError, match="repo is owner/name"):
        lens_from_hub("not a repository", "lens/own.pt", small)
    with pytest.raises(ValueError, match="repo_type is"):
        lens_from_hub("owner/lenses", "lens/own.pt", small, repo_type="bucket")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": [[1, 2, 3]]}, "fewer than 18 tokens"),
        ({"layers": -1, "skip_first": 0}, "before the last"),
        ({"held_out": 1.5, "skip_first": 0}, "from 0 to below 1"),
        ({"texts": [[1, 2, 3]], "skip_first": 0, "held_out": 0.5}, "leaves none to fit on"),
        ({"rank": 0, "skip_first": 0}, "rank"),
        ({"max_tokens": 0, "skip_first": 0}, "max_tokens"),
    ],
)
def test_bad_arguments_of_the_jacobian_lens(small, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        fit_jacobian_lens(small, **{"texts": TEXTS, **change}, **QUIET)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr is a number, and positive"),
        ({"lr": float("nan")}, "lr is a number"),
        ({"weight_decay": -1}, "weight_decay is a number, and not negative"),
        ({"held_out": 0}, "no text to choose maps by"),
        ({"held_out": None}, "held_out=None"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_bad_arguments_of_the_tuned_lens(small, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        fit_tuned_lens(small, MORE, **change, **QUIET)


def test_layers_of_a_lens(small, lens):
    last = small.num_layers - 1
    state = torch.randn(2, small.hidden_size)
    assert torch.equal(lens.to_last_layer(state, last), state)
    assert torch.equal(lens.to_last_layer(state, -2), lens.to_last_layer(state, last - 1))
    assert lens.from_vocab(small, 5, 0).layers == (0,)
    assert lens.select(-2).layers == (last - 1,)
    with pytest.raises(IndexError):
        lens.to_last_layer(state, 99)
    with pytest.raises(TypeError, match="as fit_tuned_lens"):
        evaluate_lens(small, "tuned", TEXTS)


def test_the_weights_and_their_gradients_stay(small):
    before = {name: p.clone() for name, p in small._module.named_parameters()}
    wants = {name: p.requires_grad for name, p in small._module.named_parameters()}
    fit_jacobian_lens(small, TEXTS, skip_first=1, **QUIET, held_out=0)
    fit_tuned_lens(small, MORE[:6], epochs=1, **QUIET)
    for name, p in small._module.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad == wants[name]


def test_several_streams_are_refused(tiny):
    with pytest.raises(Exception, match="several streams"):
        fit_tuned_lens(tiny("gemma3n_text"), MORE, **QUIET)
