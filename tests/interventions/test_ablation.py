"""Ablation and path patching against plain torch hooks, one forward pass per component."""

import pytest
import torch

from nnterp.errors import InsideTraceError, Unavailable
from nnterp.interventions import (
    Component,
    ablate,
    components,
    logit_difference,
    path_patching,
    target_probability,
)

from .reference import logits_with, overwrite, states

PROMPTS = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15], [33, 70, 91, 140, 12]]
CLEAN, CORRUPTED = [11, 42, 57, 93, 130, 200], [11, 42, 99, 93, 130, 201]
METRIC = logit_difference(5, 9)


def score(logits):
    return (logits[-1, 5] - logits[-1, 9]).item()


def put_all(new):
    def function(tensor):
        tensor = tensor.clone()
        tensor[0] = new
        return tensor

    return function


def test_mean_resample_tensor_and_together(tiny):
    model = tiny("llama")
    case = [Component("attentions_output", 1), Component("mlps_output", -1, positions=[0, -1])]
    all_states = {name: [states(model, p, name) for p in PROMPTS] for name in ("attentions_output", "mlps_output")}
    layers = {"attentions_output": 1, "mlps_output": 3}
    mean = {name: torch.cat([run[layer] for run in all_states[name]]).mean(0) for name, layer in layers.items()}
    found = ablate(model, PROMPTS, [case, case[0]], "mean", METRIC, batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        attention = ("attentions_output", 1, put_all(mean["attentions_output"]))
        mlp = ("mlps_output", 3, overwrite([0, -1], mean["mlps_output"]))
        expected = score(logits_with(model, prompt, [attention, mlp]))
        assert found["scores"][i, 0].item() == pytest.approx(expected, abs=2e-4)
        assert found["scores"][i, 1].item() == pytest.approx(score(logits_with(model, prompt, [attention])), abs=2e-4)

    found = ablate(model, PROMPTS[1], case[0], "resample", METRIC, reference=[CLEAN])
    given = states(model, CLEAN, "attentions_output")[1][-4:]
    expected = score(logits_with(model, PROMPTS[1], [("attentions_output", 1, put_all(given))]))
    assert found["scores"][0, 0].item() == pytest.approx(expected, abs=2e-4)

    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    found = ablate(model, PROMPTS[1], case[0], vector, METRIC)
    expected = score(logits_with(model, PROMPTS[1], [("attentions_output", 1, put_all(vector))]))
    assert found["scores"][0, 0].item() == pytest.approx(expected, abs=2e-4)


def out_projection(model, layer):
    attention = model.attentions[layer]._module
    return attention.o_proj if hasattr(attention, "o_proj") else attention.c_proj


def set_head(model, head, new):
    """A pre-hook on W_O that puts `new` (`[seq, head_dim]` or a number) where one head's output is."""

    def before(_, args):
        z = args[0].clone()
        width = z.shape[-1] // model.num_heads
        z[0, :, head * width : (head + 1) * width] = new
        return (z,)

    return before


def head_states(model, prompt, layer):
    kept = []
    handle = out_projection(model, layer).register_forward_pre_hook(lambda m, args: kept.append(args[0][0].clone()))
    logits_with(model, prompt)
    handle.remove()
    return kept[0].unflatten(-1, (model.num_heads, -1))


def slow_path(model, into, source, layer, head, receive):
    """Two forward passes with plain hooks: what arrives at the receiver, and the run that is given it."""
    given = head_states(model, source, layer)[:, head]
    held_mixer, held_mlp = states(model, into, "mixers_output"), states(model, into, "mlps_output")
    edits = [("mlps_output", other, put_all(held_mlp[other])) for other in range(layer, model.num_layers)]
    edits += [("mixers_output", other, put_all(held_mixer[other])) for other in range(layer + 1, model.num_layers)]
    name, at = receive
    kept = []
    handle = out_projection(model, layer).register_forward_pre_hook(set_head(model, head, given))
    listen = (name, at, lambda x: kept.append(x[0].clone()))
    logits_with(model, into, [*edits, listen])
    handle.remove()
    return score(logits_with(model, into, [(name, at, put_all(kept[0]))]))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_paths_from_heads(tiny, model_type, direction):
    model = tiny(model_type)
    senders = components(model, "attention_head_outputs", [0, 1], "all")
    into, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    for receivers, receive in (
        ("logits", ("layers_output", model.num_layers - 1)),
        (Component("mlps_input", 2), ("mlps_input", 2)),
        (Component("attentions_input", 3), ("attentions_input", 3)),
    ):
        found = path_patching(model, CLEAN, CORRUPTED, senders, receivers, METRIC, direction=direction, batch_size=3)
        for k, sender in enumerate(senders):
            expected = slow_path(model, into, source, sender.layer, sender.heads, receive)
            assert found["scores"][0, k].item() == pytest.approx(expected, abs=2e-4), (receivers, sender)
    assert found["clean"][0].item() == pytest.approx(score(logits_with(model, CLEAN)), abs=1e-4)
    assert found["corrupted"][0].item() == pytest.approx(score(logits_with(model, CORRUPTED)), abs=1e-4)


def test_paths_into_single_heads(tiny):
    """All query heads together are what the queries' projection gets; a head alone is less than that."""
    model = tiny("llama")
    sender = Component("attention_head_outputs", 0, 1)
    every = path_patching(model, CLEAN, CORRUPTED, sender, Component("attention_queries", 2), METRIC)
    listed = tuple(range(model.num_heads))
    same = path_patching(model, CLEAN, CORRUPTED, sender, Component("attention_queries", 2, listed), METRIC)
    torch.testing.assert_close(every["scores"], same["scores"], atol=1e-5, rtol=1e-4)
    kept = []
    given = head_states(model, CLEAN, 0)[:, 1]
    held_mixer, held_mlp = states(model, CORRUPTED, "mixers_output"), states(model, CORRUPTED, "mlps_output")
    edits = [("mlps_output", other, put_all(held_mlp[other])) for other in range(2)]
    edits += [("mixers_output", 1, put_all(held_mixer[1]))]
    project = model._module.model.layers[2].self_attn.q_proj
    handles = [
        out_projection(model, 0).register_forward_pre_hook(set_head(model, 1, given)),
        project.register_forward_hook(lambda m, a, out: kept.append(out.clone())),
    ]
    logits_with(model, CORRUPTED, edits)
    for handle in handles:
        handle.remove()
    handle = project.register_forward_hook(lambda m, a, out: kept[0])
    expected = score(logits_with(model, CORRUPTED))
    handle.remove()
    assert every["scores"].item() == pytest.approx(expected, abs=2e-4)


def test_bad_input(tiny):
    model = tiny("llama")
    mlp = Component("mlps_output", 1)
    with pytest.raises(ValueError, match="how is"):
        ablate(model, PROMPTS, mlp, "nothing")
    with pytest.raises(ValueError, match="what is empty"):
        ablate(model, PROMPTS, [])
    with pytest.raises(TypeError, match="Component"):
        ablate(model, PROMPTS, ["mlps_output"])
    with pytest.raises(ValueError, match="no other prompt is as long"):
        ablate(model, PROMPTS, mlp, "resample")
    with pytest.raises(IndexError, match=r"layers\[7\]"):
        ablate(model, PROMPTS, Component("mlps_output", 7))
    with pytest.raises(IndexError, match="heads=8"):
        ablate(model, PROMPTS, Component("attention_head_outputs", 1, 8))
    with pytest.raises(IndexError, match="prompt 1 has 4 tokens"):
        ablate(model, PROMPTS, Component("mlps_output", 1, positions=4))
    with pytest.raises(Unavailable):
        ablate(tiny("mamba"), PROMPTS, Component("attentions_output", 1))
    with pytest.raises(ValueError, match="equally many tokens"):
        path_patching(model, CLEAN, PROMPTS[1], mlp, "logits", METRIC)
    with pytest.raises(ValueError, match="comes before"):
        path_patching(model, CLEAN, CORRUPTED, mlp, Component("mlps_input", 1), METRIC)
    with pytest.raises(ValueError, match="no part that writes"):
        path_patching(model, CLEAN, CORRUPTED, Component("layers_output", 1), "logits", METRIC)
    with pytest.raises(ValueError, match="receivers are"):
        path_patching(model, CLEAN, CORRUPTED, mlp, "queries", METRIC)
    with pytest.raises(InsideTraceError), model.trace("Hi"):
        ablate(model, PROMPTS, mlp)
    with pytest.raises(ValueError, match="entries for 1 prompts"):
        path_patching(model, CLEAN, CORRUPTED, mlp, "logits", target_probability([1, 2]))


def test_paths_past_modules_between_layers_are_refused(tiny):
    """BLT adds to the stream between its layers: what is held would not be all that stands between."""
    prompts = [[20, 21, 22, 23], [20, 25, 22, 23]]
    with pytest.raises(Unavailable, match=r"between its layers \(model\.local_decoder\.cross_attn_layers\.1\)"):
        path_patching(
            tiny("blt"), prompts[:1], prompts[1:], Component("mlps_output", 0), "logits", lambda x: x[:, -1].sum(-1)
        )
