"""Patchscopes through a lens: the state is mapped into the basis of a later layer before it is written there."""

import pytest
import torch

from nnterp.interventions import (
    Lens,
    TargetPrompt,
    evaluate_lens,
    fit_jacobian_lens,
    fit_tuned_lens,
    logit_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
)

from .reference import ids_of, logits_with, overwrite, probs_with, states

SOURCES = ["The capital of England is", "Hi", "When Mary and John went"]
INNER = TargetPrompt("Hello there, who are you and what is it", 1)
LAST = TargetPrompt("The capital of France is", -1)
TEXTS = [[(13 * i + 7 * j) % 190 + 5 for j in range(5 + i % 3)] for i in range(8)]
QUIET = {"skip_first": 1, "progress": False}


def plain_jacobian(model, ids, source, target):
    """Mean over source positions, sum over target positions, by one backward pass for each number."""
    module = model._module
    seen = {}
    paths = [model.layer_paths[i] for i in (source, target)]
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda _m, _a, out, i=i: seen.update({i: out[0] if isinstance(out, tuple) else out})
        )
        for i, path in zip((source, target), paths, strict=True)
    ]
    with torch.enable_grad():
        module(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    valid = slice(1, len(ids) - 1)
    rows = []
    for unit in range(model.hidden_size):
        whole = seen[target][0, valid, unit].sum()
        rows.append(torch.autograd.grad(whole, seen[source], retain_graph=True)[0][0, valid].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_jacobian_to_an_earlier_layer_is_plain_torchs(tiny, model_type):
    model = tiny(model_type)
    target = model.num_layers - 2
    lens = fit_jacobian_lens(model, TEXTS, to_layer=target, **QUIET)
    assert (lens.maps_to, lens.layers, lens.report) == (target, tuple(range(target)), {})
    assert f"mapped to layer {target}" in repr(lens)
    expected = torch.stack([plain_jacobian(model, ids, 0, target) for ids in TEXTS]).mean(0)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(lens.weights[0], expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    whole = fit_jacobian_lens(model, TEXTS, 0, held_out=0, **QUIET)
    assert (whole.weights[0] - lens.weights[0]).norm() > 0.05 * lens.weights[0].norm()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_equals_one_forward_per_source_and_layer(tiny, model_type):
    model = tiny(model_type)
    target = model.num_layers - 2
    lens = fit_jacobian_lens(model, TEXTS, to_layer=target, **QUIET)
    found = patchscope_lens(model, SOURCES, [LAST, INNER, INNER], lens=lens)
    assert found.shape == (3, target, model.vocab_size)
    for i, (source, where) in enumerate(zip(SOURCES, (LAST, INNER, INNER), strict=True)):
        for layer in range(target):
            state = lens.weights[layer] @ states(model, source)[layer][-1]
            edits = [("layers_output", target, overwrite(where.index_to_patch, state))]
            expected = probs_with(model, where.prompt, edits)
            torch.testing.assert_close(found[i, layer], expected, atol=1e-4, rtol=1e-3)
    plain = patchscope_lens(model, SOURCES, [LAST, INNER, INNER], layers=list(range(target)))
    assert (found - plain).abs().max() > 1e-3
    own = patchscope_lens(model, SOURCES, INNER, layers=target, lens=lens)
    torch.testing.assert_close(own, patchscope_lens(model, SOURCES, INNER, layers=target), atol=1e-6, rtol=1e-4)
    latents = torch.stack([torch.stack([states(model, s)[layer][-1] for s in SOURCES]) for layer in range(target)])
    given = patchscope_lens(model, None, [LAST, INNER, INNER], latents=latents, layers=list(lens.layers), lens=lens)
    torch.testing.assert_close(given, found, atol=1e-5, rtol=1e-3)
    table = patchscope_table(model, SOURCES, [LAST, INNER, INNER], top_k=2, lens=lens)
    torch.testing.assert_close(table["top_probs"], found.topk(2).values, atol=1e-5, rtol=1e-3)
    assert table.about["arguments"]["maps_to"] == str(target) or table.about["arguments"]["maps_to"] == target


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_generating_equals_a_greedy_loop_with_one_hook(tiny, model_type):
    model = tiny(model_type)
    target, width = model.num_layers - 2, model.hidden_size
    fitted = fit_jacobian_lens(model, TEXTS[:1], to_layer=target, rank=1, **QUIET)
    torch.manual_seed(0)
    maps = {layer: torch.randn(width, width) for layer in range(target)}
    biases = {layer: torch.randn(width) for layer in range(target)}
    lens = Lens("jacobian", maps, biases, fitted.origin, fitted.details)  # unlike the identity, so that it shows
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "batch_size": 2}
    for where in (INNER, LAST):
        found = patchscope_generate(model, SOURCES, where, lens=lens, **options)
        assert tuple(found) == lens.layers == tuple(range(target))
        end = model._module.generation_config.eos_token_id
        for layer in lens.layers:
            for source, row in zip(SOURCES, found[layer], strict=True):
                state = maps[layer] @ states(model, source)[layer][-1] + biases[layer]
                ids = ids_of(model, where.prompt)[0].tolist()
                edits = [("layers_output", target, overwrite(where.index_to_patch % len(ids), state))]
                for _ in range(3):
                    logits = logits_with(model, ids, edits)[-1]
                    logits[end] = -torch.inf
                    ids.append(int(logits.argmax()))
                assert row.tolist() == ids
    plain = patchscope_generate(model, SOURCES, LAST, layers=list(lens.layers), **options)
    assert any(not torch.equal(plain[layer], found[layer]) for layer in lens.layers)


def test_generating_through_a_lens_to_the_last_layer(tiny, tmp_path):
    model = tiny("llama")
    lens = fit_tuned_lens(model, TEXTS, epochs=1, lr=1e-2, held_out=0.3, **QUIET)
    read = logit_lens(model, SOURCES, lens=lens, layers=lens.layers).argmax(-1)
    found = patchscope_generate(model, SOURCES, LAST, 1, lens=lens, do_sample=False)
    assert torch.equal(torch.stack([rows[:, -1] for rows in found.values()], 1), read)
    with pytest.raises(ValueError, match="no token reads another"):
        patchscope_generate(model, SOURCES, INNER, 1, lens=lens)
    with pytest.raises(KeyError, match="no map for layer 1; it has maps for 0"):
        patchscope_generate(model, SOURCES, LAST, 1, layers=[0, 1], lens=lens.select(0))
    with pytest.raises(TypeError, match="lens is a Lens"):
        patchscope_generate(model, SOURCES, LAST, 1, lens=str(tmp_path))
    with pytest.raises(ValueError, match="The lens was fitted on"):
        patchscope_generate(tiny("gpt2"), SOURCES, LAST, 1, lens=lens)


def test_into_the_last_layer_it_is_the_logit_lens(tiny):
    model = tiny("llama")
    lens = fit_tuned_lens(model, TEXTS, epochs=1, lr=1e-2, held_out=0.3, **QUIET)
    found = patchscope_lens(model, SOURCES, LAST, lens=lens)
    read = logit_lens(model, SOURCES, lens=lens, layers=lens.layers)
    torch.testing.assert_close(found, read, atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="no token reads another, and target prompt 0 is patched at token 1"):
        patchscope_lens(model, SOURCES, INNER, lens=lens)


def test_where_only_the_last_layer_can_be_read(tiny, tmp_path):
    model = tiny("llama")
    lens = fit_jacobian_lens(model, TEXTS, to_layer=1, **QUIET)
    state = torch.zeros(model.hidden_size)
    for wrong in (
        lambda: logit_lens(model, SOURCES, lens=lens),
        lambda: evaluate_lens(model, lens, TEXTS),
        lambda: lens.to_vocab(model, state, 0),
        lambda: lens.from_vocab(model, 5),
        lambda: lens.to_last_layer(state, 0),
        lambda: lens.to_jacobian_lens(tmp_path / "lens.pt"),
        lambda: lens.to_tuned_lens(tmp_path / "lens"),
    ):
        with pytest.raises(ValueError, match=r"leads to the stream after layer 1: write it into a prompt"):
            wrong()
    assert not list(tmp_path.iterdir())
    lens.save(tmp_path / "lens")
    again = type(lens).load(tmp_path / "lens", model)
    assert again.maps_to == 1
    with pytest.raises(ValueError, match=r"before layer 1, from 0 to 0, not at \[1\]"):
        fit_jacobian_lens(model, TEXTS, [1], to_layer=1, **QUIET)
    with pytest.raises(ValueError, match="before layer 0"):
        fit_jacobian_lens(model, TEXTS, to_layer=0, **QUIET)
    with pytest.raises(KeyError, match="no map for layer 2"):
        patchscope_lens(model, SOURCES, INNER, layers=[0, 2], lens=lens)
    with pytest.raises(TypeError, match="lens is a Lens"):
        patchscope_lens(model, SOURCES, INNER, lens="tuned")


def test_a_lens_of_another_model_is_not_patched_in(tiny):
    lens = fit_jacobian_lens(tiny("llama"), TEXTS, to_layer=1, **QUIET)
    with pytest.raises(ValueError, match="The lens was fitted on"):
        patchscope_lens(tiny("gpt2"), SOURCES, INNER, lens=lens)


def test_the_maps_are_placed_once_a_call(tiny, monkeypatch):
    import importlib

    model = tiny("llama")
    lens = fit_tuned_lens(model, TEXTS, epochs=1, held_out=0.3, **QUIET)
    module = importlib.import_module("nnterp.interventions._lens")
    asked, real = [], module.device_of
    monkeypatch.setattr(module, "device_of", lambda *args: asked.append(1) or real(*args))
    logit_lens(model, TEXTS, lens=lens, batch_size=1, progress=False)
    assert len(asked) == len(lens.layers)
    monkeypatch.setattr(module, "device_of", lambda *_: torch.device("meta"))
    moved = module._placed(model, list(lens.layers), lens.maps_for(lens.layers))
    assert {tensor.device.type for pair in moved for tensor in pair} == {"meta"}
