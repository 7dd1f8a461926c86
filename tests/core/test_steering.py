"""What a steering does to the stream, at which tokens and rows, against torch hooks; and what it refuses."""

import numpy as np
import pytest
import torch

from nnterp import Condition
from nnterp.errors import InsideTraceError, ShapeError, Unavailable
from nnterp.interventions import activation_patching, logit_lens, patchscope_lens
from nnterp.positions import at, last_of
from nnterp.prompts import Prompt, run_prompts

PROMPTS = ["The capital of France is", "A cat"]
TYPES = ("gpt2", "llama", "gemma2", "bloom", "jamba", "xlnet")


def vector_for(model, seed=1):
    return 3 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(seed))


def streams(model, prompts, layer, **how):
    """What leaves a layer, unsteered and steered."""
    with torch.no_grad(), model.trace(prompts):
        before = model.layers_output[layer].save()
    with torch.no_grad(), model.trace(prompts):
        model.steer(layer, **how)
        after = model.layers_output[layer].save()
    return before, after


def component(x, v):
    return (x * v).sum(-1, keepdim=True) / v.norm()


@pytest.mark.parametrize("model_type", TYPES)
def test_modes(tiny, model_type):
    model = tiny(model_type)
    vector, origin = vector_for(model), vector_for(model, 2)
    unit = vector / vector.norm()
    prompt = PROMPTS[0]
    expected = {
        "add": lambda x: x + 0.5 * vector,
        "project_out": lambda x: x - 0.5 * component(x, vector) * unit,
        "clamp": lambda x: x - component(x, vector) * unit + 0.5 * unit,
        "affine": lambda x: x - component(x, vector) * unit + component(origin, vector) * unit + 0.5 * vector,
    }
    for mode, change in expected.items():
        more = {"origin": origin} if mode == "affine" else {}
        for keep_norm in (False, True):
            before, after = streams(
                model, prompt, 1, steering_vector=vector, factor=0.5, mode=mode, keep_norm=keep_norm, **more
            )
            new = change(before)
            if keep_norm:
                new = new * before.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(after, new, rtol=1e-4, atol=1e-4)
            assert (after - before).abs().max() > 0.01


def test_a_direction_taken_out_everywhere_is_gone(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    with model.steering(vector, mode="project_out"):
        states = model.collect(PROMPTS, "layers_output", positions=-1)["layers_output"]
    assert component(states, vector).abs().max() < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        (0, ([0], [0])),
        (-1, ([-1], [-1])),
        ([0, 1], ([0, 1], [0, 1])),
        (np.array([0, -1]), ([0, -1], [0, -1])),
        (torch.tensor([1]), ([1], [1])),
        (range(2), ([0, 1], [0, 1])),
        (slice(1, None), None),
        (slice(-2, None), ([-2, -1], [-2, -1])),
        (at("a"), None),
        (last_of("a"), None),
    ],
    ids=str,
)
def test_positions_are_each_rows_own_whichever_side_is_padded(tiny, side, positions, columns):
    model = tiny("llama")
    vector = vector_for(model)
    alone = []
    for row, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(prompt).input_ids
        names = [model.tokenizer.decode([token]) for token in ids]
        if columns is not None:
            own = columns[row]
        elif isinstance(positions, slice):
            own = list(range(len(ids)))[positions]
        else:
            begin = "".join(names).index("a")
            starts = [len("".join(names[:i])) for i in range(len(names))]
            own = [i for i, s in enumerate(starts) if s <= begin < s + len(names[i])]
        mask = torch.zeros(1, len(ids), 1)
        mask[0, own] = 1
        handle = model._module.get_submodule(model.layer_paths[1]).register_forward_hook(
            lambda m, a, out, mask=mask: out + mask * vector
        )
        with torch.no_grad():
            alone.append(model._module(input_ids=torch.tensor([ids])).logits[0, -1])
        handle.remove()
    before = model.tokenizer.padding_side
    model.tokenizer.padding_side = side
    try:
        encoding = model.tokenizer(PROMPTS, return_tensors="pt", padding=True)
        with torch.no_grad(), model.trace(encoding):
            model.steer(1, vector, token_positions=positions)
            logits = model.logits.save()
    finally:
        model.tokenizer.padding_side = before
    ends = encoding.attention_mask.cumsum(-1).argmax(-1)
    torch.testing.assert_close(logits[torch.arange(2), ends], torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_row_is_steered_as_it_is_alone(toy):
    vector = 2 * torch.randn(toy.hidden_size, generator=torch.Generator().manual_seed(0))

    def steered(prompts):
        with torch.no_grad(), toy.trace(prompts):
            toy.steer(layers=2, steering_vector=vector, token_positions=0)
            logits = toy.logits[:, -1].save()
        return logits

    torch.testing.assert_close(steered(["France", PROMPTS[0]])[0], steered("France")[0], rtol=1e-4, atol=1e-4)


def test_pairs_vectors_per_row_and_per_layer(tiny):
    model = tiny("gpt2")
    vector = vector_for(model)
    prompt = [PROMPTS[0]] * 2
    before, after = streams(model, prompt, 1, steering_vector=vector, batch_index=[0, 1], token_positions=[2, 0])
    change = torch.zeros_like(before)
    change[0, 2] = change[1, 0] = vector
    torch.testing.assert_close(after, before + change)
    rows = torch.stack([vector, -vector])[:, None]
    before, after = streams(model, prompt, 1, steering_vector=rows)
    torch.testing.assert_close(after, before + rows)
    before, after = streams(model, prompt, 1, steering_vector=rows, token_positions=[0, 3])
    change = torch.zeros_like(before)
    change[:, [0, 3]] = rows.expand(-1, 2, -1)
    torch.testing.assert_close(after, before + change)
    with torch.no_grad(), model.trace(prompt):
        model.steer(None, {2: vector, 0: -vector})
        got = model.logits.save()
    with torch.no_grad(), model.trace(prompt):
        model.steer(0, -vector)
        model.steer(2, vector)
        expected = model.logits.save()
    torch.testing.assert_close(got, expected)


BAD = [
    ({"steering_vector": torch.full((64,), float("nan"))}, ValueError, "not finite"),
    ({"steering_vector": torch.zeros(64), "mode": "clamp"}, ValueError, "no direction"),
    ({"steering_vector": torch.ones(64, dtype=torch.complex64)}, TypeError, "real"),
    ({"steering_vector": torch.ones(64, dtype=torch.bool)}, TypeError, "real"),
    ({"steering_vector": "Paris"}, TypeError, "tensor"),
    ({"steering_vector": torch.ones(63)}, ShapeError, "63"),
    ({"steering_vector": {1: torch.ones(64)}, "layers": [2]}, ValueError, "no vector for layer 2"),
    ({"layers": []}, ValueError, "empty"),
    ({"layers": 9}, IndexError, "9"),
    ({"layers": True}, TypeError, "True"),
    ({"mode": "push"}, ValueError, "push"),
    ({"mode": "affine"}, ValueError, "origin"),
    ({"token_positions": True}, TypeError, "True"),
    ({"token_positions": []}, ValueError, "empty"),
    ({"token_positions": 1.0}, TypeError, "1.0"),
    ({"token_positions": "France"}, TypeError, "at"),
    ({"token_positions": 40}, IndexError, "no position 40"),
    ({"token_positions": slice(40, 50)}, ValueError, "no token"),
    ({"token_positions": at("Rome")}, ValueError, "Rome"),
    ({"factor": float("nan")}, ValueError, "finite"),
    ({"factor": "2"}, ValueError, "finite"),
    ({"batch_index": 5}, IndexError, "5"),
    ({"batch_index": []}, ValueError, "no rows"),
    ({"batch_index": True}, TypeError, "True"),
    ({"batch_index": [0, 0], "token_positions": [0, 1, 2]}, ValueError, "paired"),
]


@pytest.mark.parametrize(("how", "error", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_steerings_are_refused(tiny, how, error, words):
    model = tiny("gpt2")
    arguments = {"layers": 1, "steering_vector": torch.ones(model.hidden_size), **how}
    with pytest.raises(error, match=words), model.trace([PROMPTS[0]] * 2):
        model.steer(**arguments)


def test_lists_and_arrays_are_vectors(tiny):
    model = tiny("gpt2")
    vector = vector_for(model)
    results = []
    for given in (vector, vector.numpy(), vector.tolist(), vector.double()):
        results.append(streams(model, PROMPTS[0], np.int64(1), steering_vector=given)[1])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_a_condition_chooses_rows_alike_in_any_batch(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    prompts = [*PROMPTS, "Rain fell on the town all day", "Yes", "The sun"]
    states = model.collect(prompts, "layers_output", layers=[0], positions=-1)["layers_output"][0]
    scores = states @ vector
    threshold = float(scores.sort().values[2] + 1e-3)
    plain = model.collect(prompts, "layers_output", layers=[2], positions=-1)["layers_output"][0]
    for below in (False, True):
        condition = Condition(0, vector, threshold, below=below)
        with model.steering(vector, 2, when=condition):
            found = model.collect(prompts, "layers_output", layers=[2], positions=-1, batch_size=3)["layers_output"][0]
        chosen = (scores < threshold) if below else (scores > threshold)
        torch.testing.assert_close(found, plain + chosen[:, None] * vector, rtol=1e-4, atol=1e-4)
        assert 0 < int(chosen.sum()) < len(prompts)
    with (
        pytest.raises(ValueError, match="layer 2, after layer 1"),
        model.steering(vector, 1, when=Condition(2, vector, 0)),
    ):
        pass


def test_every_function_runs_steered(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    clean_ids, corrupted_ids = (model.tokenizer(p).input_ids[-6:] for p in (clean, corrupted))

    def metric(logits):
        return logits[:, 5] - logits[:, 7]

    def results():
        return {
            "lens": logit_lens(model, PROMPTS),
            "collect": model.collect(PROMPTS, "layers_output", positions=-1)["layers_output"],
            "patching": activation_patching(model, clean_ids, corrupted_ids, metric)["scores"],
            "patchscope": patchscope_lens(model, PROMPTS[:1]),
            "gradients": model.gradients(PROMPTS, lambda x: x[:, -1, 5].sum(), "layers_output")["layers_output"],
        }

    def by_hook():
        handle = model._module.get_submodule(model.layer_paths[1]).register_forward_hook(lambda m, a, out: out + vector)
        try:
            with torch.no_grad():
                rows = []
                ids = torch.tensor([corrupted_ids])
                donor = {}
                for layer in range(model.num_layers):
                    block = model._module.get_submodule(model.layer_paths[layer])
                    keep = block.register_forward_hook(lambda m, a, out, layer=layer: donor.update({layer: out}))
                    model._module(input_ids=torch.tensor([clean_ids]))
                    keep.remove()
                    row = []
                    for position in range(len(corrupted_ids)):

                        def patch(m, a, out, layer=layer, position=position):
                            new = out.clone()
                            new[:, position] = donor[layer][:, position]
                            return new

                        put = block.register_forward_hook(patch)
                        row.append(metric(model._module(input_ids=ids).logits[:, -1]))
                        put.remove()
                    rows.append(torch.cat(row))
            return torch.stack(rows)
        finally:
            handle.remove()

    expected = by_hook()
    plain = results()
    with model.steering(vector, 1):
        steered = results()
    after = results()
    torch.testing.assert_close(steered["patching"].squeeze(), expected, rtol=1e-3, atol=1e-3)
    for name in ("lens", "collect", "patching", "patchscope", "gradients"):
        assert (steered[name] - plain[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(after[name], plain[name])


def test_nested_steerings_add_and_end_after_an_error(tiny):
    model = tiny("gpt2")
    vector = vector_for(model)
    plain = model.collect(PROMPTS[:1], "layers_output", layers=[1], positions=-1)["layers_output"]
    with pytest.raises(RuntimeError, match="stop"), model.steering(vector, 1), model.steering(vector, 1, 0.5):
        found = model.collect(PROMPTS[:1], "layers_output", layers=[1], positions=-1)["layers_output"]
        raise RuntimeError("stop")
    torch.testing.assert_close(found, plain + 1.5 * vector)
    assert model.standing == ()
    hooks = model._module.get_submodule(model.layer_paths[1])._forward_hooks
    assert all("standing" not in hook.__module__ for hook in hooks.values())
    with pytest.raises(InsideTraceError), model.trace(PROMPTS[0]):
        model.steering(vector, 1)


def test_a_direct_call_that_cannot_be_steered_is_refused(tiny):
    model = tiny("gpt2")
    ids = torch.arange(20, 28)[None]
    with model.steering(vector_for(model), 1, token_positions=-1), pytest.raises(Unavailable, match="token_positions="):
        model._module(input_ids=ids)
    xlnet = tiny("xlnet")
    with xlnet.steering(vector_for(xlnet), 1), pytest.raises(Unavailable, match="layout"):
        xlnet._module(input_ids=ids)


def test_a_checkpoint_of_prompts_knows_the_steering(toy, tmp_path):
    vector = torch.randn(toy.hidden_size, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt.from_strings(PROMPTS[0], {"target": "Paris"}, toy.tokenizer)]
    plain = run_prompts(toy, prompts, checkpoint=tmp_path / "c", progress=False)
    with toy.steering(vector, 4, 3), pytest.raises(ValueError, match="steering"):
        run_prompts(toy, prompts, checkpoint=tmp_path / "c", progress=False)
    with toy.steering(vector, 4, 3):
        steered = run_prompts(toy, prompts, progress=False)
    assert (steered["target"] - plain["target"]).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", ["gemma3n_text", "deepseek_v4", "hy_v4"])
def test_the_readout_by_replay_is_not_steered_once_more(tiny, model_type):
    """Their readout runs the model's own forward with the layers replaced, on which the hooks of a steering stand."""
    model = tiny(model_type)
    assert model.readout.way == "replay"
    vector = vector_for(model)
    with torch.no_grad(), model.trace(torch.arange(10, 16)[None]):
        hidden = model.layers_output[-1].save()
    plain = model.project_on_vocab(hidden)
    with model.steering(vector, -1):
        steered = model.project_on_vocab(hidden)
        lens = logit_lens(model, PROMPTS[:1], layers=[-1])
        with torch.no_grad(), model.trace(PROMPTS[0]):
            states = model.layers_output[-1].save()
    assert torch.equal(steered, plain)
    torch.testing.assert_close(lens[:, 0], model.project_on_vocab(states)[:, -1].softmax(-1), rtol=1e-4, atol=1e-6)
