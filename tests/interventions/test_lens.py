"""The logit lens against the model's own code after its last layer, one prompt and one layer at a time."""

import pytest
import torch

from nnterp.errors import InsideTraceError
from nnterp.interventions import LensResult, Result, logit_lens, logit_lens_table

from .reference import ARCHITECTURES, logits_with, probs_with, states

PROMPTS = ["The capital of France is", "Hello", "When Mary and John went to the store, John gave a drink to"]


def slow_lens(model, prompt, layer, position=-1, sign=1, own=None):
    """The last layer made to return what `layer` returned; `own` are the prompt's states, if they are known."""
    state = sign * (states(model, prompt) if own is None else own)[layer][None]
    return logits_with(model, prompt, [("layers_output", model.num_layers - 1, lambda x: state)])[position].softmax(-1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_the_model_cut_short(tiny, model_type):
    model = tiny(model_type)
    found = logit_lens(model, PROMPTS)
    assert found.shape == (3, model.num_layers, model.vocab_size)
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    for i, prompt in enumerate(PROMPTS):
        own = states(model, prompt)
        for layer in range(model.num_layers):
            torch.testing.assert_close(found[i, layer], slow_lens(model, prompt, layer, own=own), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found[i, -1], probs_with(model, prompt), atol=1e-4, rtol=1e-3)


def test_one_prompt_is_a_batch_of_one(tiny):
    model = tiny("llama")
    assert torch.equal(logit_lens(model, PROMPTS[0]), logit_lens(model, PROMPTS[:1]))


# The final norm, with and without a bias; softcaps, and scales before and after the head.
NORMS = {
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "bloom": "transformer.ln_f",
    "llama": "model.norm",
    "gemma2": "model.norm",
    "granite": "model.norm",
    "cohere": "model.norm",
    "minicpm3": "model.norm",
}


@pytest.mark.parametrize("model_type", NORMS)
def test_inverse_gives_the_head_the_negated_output_of_the_norm(tiny, model_type):
    model = tiny(model_type)
    probs, inverse = logit_lens(model, PROMPTS, return_inv_logits=True)
    assert torch.equal(probs, logit_lens(model, PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        for layer in range(model.num_layers):
            hook = model._module.get_submodule(NORMS[model_type]).register_forward_hook(lambda *a: -a[-1])
            try:
                expected = slow_lens(model, prompt, layer)
            finally:
                hook.remove()
            torch.testing.assert_close(inverse[i, layer], expected, atol=1e-5, rtol=1e-3)
    assert (probs - inverse).abs().max() > 1e-3


def test_inverse_is_not_the_lens_of_the_negated_state_where_the_norm_has_a_bias(tiny):
    model = tiny("gpt2")
    _, inverse = logit_lens(model, PROMPTS, return_inv_logits=True)
    assert (inverse[0, 1] - slow_lens(model, PROMPTS[0], 1, sign=-1)).abs().max() > 1e-3


def test_inverse_is_reduced_as_the_lens_is(tiny):
    model = tiny("gpt2")
    probs, inverse = logit_lens(model, PROMPTS, return_inv_logits=True, positions=[0, -1])
    targets = [[[5, 9], 7], [3, [7, 8]], [1, 2]]
    found = logit_lens(model, PROMPTS, return_inv_logits=True, positions=[0, -1], targets=targets)
    assert isinstance(found, tuple)
    for own, whole in zip(found, (probs, inverse), strict=True):
        assert own.shape == (3, model.num_layers, 2, 2)
        torch.testing.assert_close(own[0, ..., 0], whole[0, ..., [5, 9]].sum(-1))
        torch.testing.assert_close(own[1, ..., 0], whole[1, ..., 3])
    results = logit_lens(model, PROMPTS, return_inv_logits=True, targets=targets, top_k=3, ranks=True, entropy=True)
    for result, whole in zip(results, (probs[:, :, 1], inverse[:, :, 1]), strict=True):
        assert isinstance(result, LensResult)
        torch.testing.assert_close(result["top_probs"], whole.topk(3).values)
        torch.testing.assert_close(result["entropy"], torch.special.entr(whole).sum(-1), atol=1e-4, rtol=1e-4)
        ranks = (whole[2] > whole[2, :, 1:2]).sum(-1)
        assert torch.equal(result["target_ranks"][2, :, 0], ranks)
    assert results[1].about["arguments"]["inverse"] is True


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_do_not_matter(tiny, batch_size):
    model = tiny("llama")
    torch.testing.assert_close(
        logit_lens(model, PROMPTS, batch_size=batch_size), logit_lens(model, PROMPTS), atol=1e-5, rtol=1e-4
    )
    back = logit_lens(model, PROMPTS[::-1], batch_size=batch_size).flip(0)
    torch.testing.assert_close(back, logit_lens(model, PROMPTS), atol=1e-5, rtol=1e-4)


def test_padding_side_does_not_matter(tiny):
    model = tiny("llama")
    left = logit_lens(model, PROMPTS)
    model.tokenizer.padding_side = "right"
    try:
        torch.testing.assert_close(logit_lens(model, PROMPTS), left, atol=1e-5, rtol=1e-4)
    finally:
        model.tokenizer.padding_side = "left"


def test_positions_and_layers(tiny):
    model = tiny("llama")
    found = logit_lens(model, PROMPTS[::2], positions=[1, -2], layers=[-1, 0, 2])
    assert found.shape == (2, 3, 2, model.vocab_size)
    for i, prompt in enumerate(PROMPTS[::2]):
        for k, layer in enumerate((model.num_layers - 1, 0, 2)):
            for j, position in enumerate((1, -2)):
                torch.testing.assert_close(
                    found[i, k, j], slow_lens(model, prompt, layer, position), atol=1e-5, rtol=1e-4
                )


def test_gaps_of_shorter_prompts_are_nan(tiny):
    model = tiny("llama")
    found = logit_lens(model, PROMPTS[:2], positions=slice(None), batch_size=1)
    lengths = [len(model.tokenizer(p).input_ids) for p in PROMPTS[:2]]
    for i, length in enumerate(lengths):
        assert not found[i, :, :length].isnan().any()
        assert found[i, :, length:].isnan().all()
    torch.testing.assert_close(found[1, 1, 0], slow_lens(model, PROMPTS[1], 1, 0), atol=1e-5, rtol=1e-4)


def test_reductions_are_those_of_the_whole_vocabulary(tiny):
    model = tiny("gemma2")
    probs = logit_lens(model, PROMPTS)
    ids = [[5, 9], [30], [44, 45, 46]]
    found = logit_lens(model, PROMPTS, targets=ids, top_k=4, ranks=True, entropy=True, batch_size=2)
    assert isinstance(found, LensResult)
    best, places = probs.topk(4, dim=-1)
    torch.testing.assert_close(found["top_probs"], best, atol=1e-6, rtol=1e-4)
    assert torch.equal(found["top_ids"], places)
    torch.testing.assert_close(found["entropy"], -(probs * probs.log()).sum(-1), atol=1e-4, rtol=1e-4)
    for i, own in enumerate(ids):
        for k, token in enumerate(own):
            torch.testing.assert_close(found["target_probs"][i, :, k], probs[i, :, token], atol=1e-6, rtol=1e-4)
            assert torch.equal(found["target_ranks"][i, :, k], (probs[i] > probs[i, :, token : token + 1]).sum(-1))
        assert found["target_probs"][i, :, len(own) :].isnan().all()
        assert (found["target_ranks"][i, :, len(own) :] == -1).all()


def test_table(tiny, tmp_path):
    model = tiny("llama")
    found = logit_lens_table(model, PROMPTS[:2], 3, targets=7)
    lengths = [len(model.tokenizer(p).input_ids) for p in PROMPTS[:2]]
    assert found["top_ids"].shape == (2, model.num_layers, max(lengths), 3)
    assert found.tokens[0] == tuple(model.tokenizer.decode([i]) for i in model.tokenizer(PROMPTS[0]).input_ids)
    assert found.tokens[1][lengths[1] :] == (None,) * (lengths[0] - lengths[1])
    frame = found.to_dataframe()
    assert len(frame) == sum(lengths) * model.num_layers * 3
    row = frame[(frame.prompt == PROMPTS[0]) & (frame.layer == 1) & (frame.position == 2) & (frame.top == 0)].iloc[0]
    assert row.top_probs == pytest.approx(found["top_probs"][0, 1, 2, 0].item())
    assert row.top_token == found.vocabulary[found["top_ids"][0, 1, 2, 0].item()]
    assert row.entropy == pytest.approx(found["entropy"][0, 1, 2].item())
    best = found.top(1)[0]
    assert best["top_probs"] == pytest.approx(found["top_probs"].nan_to_num().max().item())

    found.save(tmp_path / "deep" / "lens")
    again = Result.load(tmp_path / "deep" / "lens")
    assert isinstance(again, LensResult)
    assert all(torch.equal(again[n].nan_to_num(-9), found[n].nan_to_num(-9)) for n in found.tensors)
    assert (again.axes, again.labels, again.tokens, again.vocabulary, again.about) == (
        found.axes,
        found.labels,
        found.tokens,
        found.vocabulary,
        found.about,
    )
    assert again.about["arguments"]["top_k"] == 3
    assert set(again.about["versions"]) >= {"nnterp-interventions", "transformers", "torch"}


def test_plot_without_display_says_what_to_install(tiny, monkeypatch):
    found = logit_lens_table(tiny("llama"), PROMPTS[:1])
    monkeypatch.setattr("nnterp.plugins.load", lambda group, name: None)
    monkeypatch.setattr("nnterp.plugins.names", lambda group: ())
    with pytest.raises(ModuleNotFoundError, match="pip install nnterp-display"):
        found.plot()


def test_nothing_after_the_last_layer_asked_for_runs(tiny):
    model = tiny("llama")
    ran = []
    handles = [
        b.register_forward_pre_hook(lambda *a, i=i: ran.append(i)) for i, b in enumerate(model._module.model.layers)
    ]
    handles.append(model._module.lm_head.register_forward_hook(lambda m, a, out: ran.append(tuple(out.shape[:-1]))))
    try:
        logit_lens(model, PROMPTS, layers=[1, 0])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, (6,)], "two layers, and one readout of two states of three prompts"


def test_memory_running_out_halves_the_batch(tiny, monkeypatch):
    model = tiny("llama")
    expected = logit_lens(model, PROMPTS)
    sizes = []

    def short_of_memory(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model._module.register_forward_pre_hook(short_of_memory, with_kwargs=True)
    try:
        torch.testing.assert_close(logit_lens(model, PROMPTS), expected, atol=1e-5, rtol=1e-4)
    finally:
        handle.remove()
    assert sizes == [3, 1, 1, 1]


def test_bad_input(tiny):
    model = tiny("llama")
    with pytest.raises(IndexError, match=r"layers\[9\]"):
        logit_lens(model, PROMPTS, layers=9)
    with pytest.raises(IndexError, match="prompt 1 has 2 tokens"):
        logit_lens(model, PROMPTS, positions=3)
    with pytest.raises(ValueError, match="targets has 2 entries for 3 prompts"):
        logit_lens(model, PROMPTS, targets=[1, 2])
    with pytest.raises(ValueError, match="no targets"):
        logit_lens(model, PROMPTS, ranks=True)
    with pytest.raises(ValueError, match="top_k"):
        logit_lens(model, PROMPTS, top_k=0)
    with pytest.raises(ValueError, match="batch_size"):
        logit_lens(model, PROMPTS, batch_size=0)
    with pytest.raises(ValueError, match="No prompts"):
        logit_lens(model, [])
    with pytest.raises(ValueError, match="tokens"):
        logit_lens(model, PROMPTS, targets="certainly not a single token")
    with pytest.raises(InsideTraceError), model.trace("Hi"):
        logit_lens(model, "Hello")
