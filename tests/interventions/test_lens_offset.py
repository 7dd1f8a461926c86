"""A Jacobian lens with an offset: the mean stream is mapped to the mean stream, and nothing else is changed."""

import pytest
import torch

from nnterp.interventions import Lens, fit_jacobian_lens, logit_lens

TEXTS = [[11, 42, 57, 93, 130, 7], [60, 77, 101, 15], [9, 12, 31, 40, 8], [60, 78, 101, 15, 33, 2, 90]]
QUIET = {"skip_first": 1, "held_out": 0, "progress": False}


def mean_streams(model, layers):
    """Mean over texts of the mean over positions 1 to the last but one, text by text, by hooks: layer → `[hidden]`."""
    sums = dict.fromkeys(layers, 0)
    for ids in TEXTS:
        handles = [
            model._module.get_submodule(model.layer_paths[layer]).register_forward_hook(
                lambda _m, _a, out, layer=layer: sums.update(
                    {layer: sums[layer] + (out[0] if isinstance(out, tuple) else out)[0, 1:-1].mean(0)}
                )
            )
            for layer in layers
        ]
        with torch.no_grad():
            model._module(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
    return {layer: total / len(TEXTS) for layer, total in sums.items()}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("gpt2", {"max_tokens": 20}), ("gemma2", {"rank": 3}), ("llama", {"to_layer": 2})],
)
def test_the_mean_is_mapped_to_the_mean(tiny, model_type, options):
    model = tiny(model_type)
    plain = fit_jacobian_lens(model, TEXTS, **QUIET, **options)
    lens = fit_jacobian_lens(model, TEXTS, offset=True, **QUIET, **options)
    target = options.get("to_layer", model.num_layers - 1)
    assert (plain.biases, tuple(lens.biases), lens.maps_to) == ({}, lens.layers, target)
    means = mean_streams(model, [*lens.layers, target])
    for layer in lens.layers:
        torch.testing.assert_close(lens.weights[layer], plain.weights[layer], atol=1e-5, rtol=1e-4)
        expected = means[target] - plain.weights[layer] @ means[layer]
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(lens.biases[layer], expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(lens.apply(means[layer], layer), means[target], atol=1e-4, rtol=1e-3)


class Stop(BaseException):
    pass


def test_a_fit_that_is_killed_goes_on_to_the_same_offset(tiny, tmp_path):
    model, options = tiny("llama"), {"offset": True, "max_tokens": 8, **QUIET}
    whole, passes = fit_jacobian_lens(model, TEXTS, **options), []

    def stop(*_):
        passes.append(1)
        if len(passes) == 6:
            raise Stop

    handle = model._module.register_forward_pre_hook(stop)
    with pytest.raises(Stop) as caught:
        fit_jacobian_lens(model, TEXTS, checkpoint=tmp_path / "fit", **options)
    handle.remove()
    partial = caught.value.partial
    assert 0 < partial.details["prompts"] < len(TEXTS)
    assert tuple(partial.biases) == whole.layers
    with pytest.raises(ValueError, match="Cannot resume"):
        fit_jacobian_lens(model, TEXTS, checkpoint=tmp_path / "fit", **{**options, "offset": False})
    again = fit_jacobian_lens(model, TEXTS, checkpoint=tmp_path / "fit", **options)
    for layer in whole.layers:
        assert torch.equal(again.weights[layer], whole.weights[layer])
        assert torch.equal(again.biases[layer], whole.biases[layer])


def test_files_and_readings(tiny, tmp_path):
    model = tiny("llama")
    lens = fit_jacobian_lens(model, TEXTS, offset=True, **QUIET)
    lens.save(tmp_path / "lens")
    again = Lens.load(tmp_path / "lens", model)
    assert all(torch.equal(again.biases[layer], lens.biases[layer]) for layer in lens.layers)
    plain = Lens("jacobian", lens.weights, {}, lens.origin, lens.details)
    torch.testing.assert_close(lens.from_vocab(model, 5)[0], plain.from_vocab(model, 5)[0])
    assert (logit_lens(model, TEXTS, lens=lens) - logit_lens(model, TEXTS, lens=plain)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="has biases, which the format of Jacobian lenses does not hold"):
        lens.to_jacobian_lens(tmp_path / "lens.pt")
    with pytest.raises(TypeError, match="offset is True or False"):
        fit_jacobian_lens(model, TEXTS, offset=1, **QUIET)
