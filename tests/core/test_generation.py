"""Edits in a generation equal HuggingFace's own `generate` with torch hooks on its layers, token by token."""

import contextlib
import warnings

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.positions import at, last_of
from nnterp.testing import tiny_model, tiny_tokenizer

TYPES = (
    *("gpt2", "llama", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "olmo2", "bloom"),
    *("jamba", "falcon_h1", "mamba2", "rwkv", "phi3", "zamba2"),
)
PROMPTS = ["The capital of France is", "A cat"]
NEW = 6
STEPS = [
    (None, lambda step: True),
    ("prompt", lambda step: step == 0),
    ("generated", lambda step: step > 0),
    (2, lambda step: step == 2),
    (slice(1, 4), lambda step: 1 <= step < 4),
    (slice(None, None, 2), lambda step: step % 2 == 0),
    ([0, 3], lambda step: step in (0, 3)),
]


@contextlib.contextmanager
def hooked(model, layer, change):
    """`change(step, stream)` in place of what leaves a layer, by hooks on the HuggingFace module alone."""
    module, step = model._module, [-1]

    def count(*_):
        step[0] += 1

    def edit(_, __, output):
        stream = output if isinstance(output, torch.Tensor) else output[0]
        new = change(step[0], stream)
        return new if isinstance(output, torch.Tensor) else type(output)((new, *output[1:]))

    handles = [
        module.register_forward_pre_hook(count),
        module.get_submodule(model.layer_paths[layer]).register_forward_hook(edit),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def settings(model, **more):
    return {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": model.tokenizer.pad_token_id, **more}


def reference(model, prompts, layer, change, **more):
    encoding = model.tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad(), hooked(model, layer, change):
        torch.manual_seed(5)
        return model._module.generate(**encoding, **settings(model, **more))


def vector_for(model, scale=4.0):
    return scale * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(2))


def steered(model, prompts, layer, vector, settings_, **how):
    with torch.no_grad(), model.generate(prompts, **settings_) as tracer:
        torch.manual_seed(5)
        model.steer(layer, vector, **how)
        out = tracer.result.save()
    return out


@pytest.fixture(params=TYPES)
def model(request, tiny):
    return tiny(request.param)


def prompts_for(model):
    return PROMPTS[:1] if not model.padding_is_exact else PROMPTS


@pytest.mark.parametrize(("steps", "chosen"), STEPS, ids=lambda value: str(value) if not callable(value) else "")
def test_steering_at_chosen_steps(model, steps, chosen):
    prompts, vector = prompts_for(model), vector_for(model)
    expected = reference(model, prompts, 1, lambda step, x: x + vector if chosen(step) else x)
    assert torch.equal(steered(model, prompts, 1, vector, settings(model), steps=steps), expected)


def test_the_edit_matters_and_every_step_counts(model):
    prompts, vector = prompts_for(model)[:1], vector_for(model)
    logits = []
    for steps in ("prompt", None):
        kept = settings(model, return_dict_in_generate=True, output_logits=True, min_new_tokens=NEW)
        logits.append(torch.stack(steered(model, prompts, 1, vector, kept, steps=steps).logits))
    assert (logits[0][0] - logits[1][0]).abs().max() < 1e-5
    assert (logits[0][1:] - logits[1][1:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "positions", [0, [0, 1], -1, slice(1, None), slice(-2, None), at("c"), last_of("a"), [at("c"), -1]]
)
def test_positions_count_over_each_rows_own_tokens(tiny, positions, cache):
    model = tiny("llama")
    vector = vector_for(model)
    encoding = model.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    width = encoding.input_ids.shape[1]

    def change(step, stream):
        new, total = stream.clone(), width + step
        for row, mask in enumerate(encoding.attention_mask):
            own = [*mask.nonzero().flatten().tolist(), *range(width, total)]
            for entry in positions if isinstance(positions, list) else [positions]:
                if isinstance(entry, slice):
                    columns = own[entry]
                elif isinstance(entry, int):
                    columns = [own[entry]]
                else:  # by the tokens' own spelling: a byte-level tokenizer spells each letter
                    ids = encoding.input_ids[row][mask.bool()].tolist()
                    names = [model.tokenizer.decode([token]) for token in ids]
                    text = "".join(names)
                    begin = text.index(entry.text)
                    places = [sum(len(n) for n in names[:i]) for i in range(len(names))]
                    found = [
                        i for i, p in enumerate(places) if p < begin + len(entry.text) and p + len(names[i]) > begin
                    ]
                    columns = [own[i] for i in (found if entry.which == "at" else found[-1:])]
                for column in columns:
                    place = column - (total - stream.shape[1])
                    if place >= 0:
                        new[row, place] = stream[row, place] + vector
        return new

    more = {"use_cache": cache}
    expected = reference(model, PROMPTS, 1, change, **more)
    got = steered(model, PROMPTS, 1, vector, settings(model, **more), token_positions=positions)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "more",
    [
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [{}, {"batch_index": 1}, {"token_positions": 0, "steps": "prompt"}], ids=str)
def test_beams_sampling_and_several_sequences(tiny, more, how):
    model = tiny("gpt2")
    vector = vector_for(model)
    first = model.tokenizer(PROMPTS, return_tensors="pt", padding=True).attention_mask.argmax(-1)

    def change(step, stream):
        new = stream.clone()
        rows = range(stream.shape[0] // len(PROMPTS), stream.shape[0]) if "batch_index" in how else range(len(stream))
        for row in rows:
            if how.get("steps") is None:
                new[row] += vector
            elif step == 0:
                new[row, first[row // (len(stream) // len(PROMPTS))]] += vector
        return new

    expected = reference(model, PROMPTS, 1, change, **more)
    assert torch.equal(steered(model, PROMPTS, 1, vector, settings(model, **more), **how), expected)


def test_rows_that_end_early(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    free = reference(model, PROMPTS, 1, lambda step, x: x + vector)
    width = free.shape[1] - NEW
    end = int(free[0, width + 1])
    expected = reference(model, PROMPTS, 1, lambda step, x: x + vector, eos_token_id=end)
    got = steered(model, PROMPTS, 1, vector, settings(model, eos_token_id=end))
    assert torch.equal(got, expected)
    assert (expected[0, width + 2 :] == model.tokenizer.pad_token_id).all()


def test_every_way_to_say_every_step(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    expected = steered(model, PROMPTS, 1, vector, settings(model))
    found = {}
    with torch.no_grad(), model.generate(PROMPTS, **settings(model)) as tracer:
        for _ in tracer.iter[:NEW]:
            model.steer(1, vector)
        found["bounded loop"] = tracer.result.save()
    for loop in (lambda tracer: model.iter[:NEW], lambda tracer: model.layers[0].iter[:NEW]):  # deprecated spellings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad(), model.generate(PROMPTS, **settings(model)) as tracer:
                for _ in loop(tracer):
                    model.steer(1, vector)
                found[f"loop {len(found)}"] = tracer.result.save()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), model.generate(PROMPTS, **settings(model)) as tracer:
            with tracer.iter[:NEW]:
                model.steer(1, vector)
            found["with block"] = tracer.result.save()
    with torch.no_grad(), model.generate(PROMPTS, **settings(model)) as tracer:

        def edit(step):
            model.layers_output[1] = model.layers_output[1] + vector

        model.each_step(edit)
        found["each_step"] = tracer.result.save()
    with torch.no_grad(), model.generate(PROMPTS, **settings(model)) as tracer:
        model.steer(1, 0.25 * vector)
        model.steer([1], vector, factor=0.75)
        found["two steerings"] = tracer.result.save()
    with model.edit() as (_, edited):
        edited.steer(1, vector)
    with torch.no_grad(), edited.generate(PROMPTS, **settings(model)) as tracer:
        found["nnsight's edit"] = tracer.result.save()
    with torch.no_grad(), model.steering(vector, 1):
        found["steering, called"] = model.generate(PROMPTS, **settings(model))
        with model.generate(PROMPTS, **settings(model)) as tracer:
            found["steering, traced"] = tracer.result.save()
        encoding = model.tokenizer(PROMPTS, return_tensors="pt", padding=True)
        found["steering, HuggingFace's own"] = model._module.generate(**encoding, **settings(model))
    for way, got in found.items():
        assert torch.equal(got, expected), way


def test_what_a_block_reads_is_steered_in_every_step(tiny):
    model = tiny("gpt2")
    vector = vector_for(model)
    with torch.no_grad(), model.generate(PROMPTS[0], **settings(model, min_new_tokens=NEW)) as tracer:
        plain, after = [], []
        plain.save()
        after.save()
        model.each_step(lambda step: plain.append(model.layers_output[1]))
        model.steer(1, vector)
        model.each_step(lambda step: after.append(model.layers_output[1]))
        written = tracer.result.save()
    assert [tuple(x.shape[:2]) for x in after] == [(1, plain[0].shape[1])] + [(1, 1)] * (NEW - 1)
    for before, new in zip(plain, after, strict=True):
        torch.testing.assert_close(new, before + vector)
    assert written.shape[1] == plain[0].shape[1] + NEW


def test_invokes_are_steered_apart(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    expected = reference(model, PROMPTS, 1, lambda step, x: x + vector * torch.tensor([1.0, -1.0])[:, None, None])
    with torch.no_grad(), model.generate(**settings(model)) as tracer:
        with tracer.invoke(PROMPTS[0]):
            model.steer(1, vector, token_positions=slice(0, None))
        with tracer.invoke(PROMPTS[1]):
            model.steer(1, vector, factor=-1)
        with tracer.invoke():
            out = tracer.result.save()
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="num_beams=2"), model.generate(**settings(model, num_beams=2)) as tracer:
        with tracer.invoke(PROMPTS[0]):
            model.steer(1, vector)
        with tracer.invoke(PROMPTS[1]):
            model.logits.save()


@pytest.mark.parametrize("steps", [None, "generated", slice(0, 2)])
@pytest.mark.parametrize("layers", [(0, 0), (1, 2)])
def test_skipping_layers_in_a_generation(model, layers, steps):
    first, last = layers
    chosen = next(test for given, test in [*STEPS, (slice(0, 2), lambda step: step < 2)] if given == steps)
    if model.num_layers <= last:
        pytest.skip(f"has {model.num_layers} layers")
    entering, module = {}, model._module

    def keep(_, args, kwargs):
        entering["stream"] = (args[0] if args else kwargs["hidden_states"]).clone()

    handle = module.get_submodule(model.layer_paths[first]).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        prompts = prompts_for(model)
        expected = reference(model, prompts, last, lambda step, x: entering["stream"] if chosen(step) else x)
    finally:
        handle.remove()
    with torch.no_grad(), model.generate(prompts, **settings(model)) as tracer:
        model.skip_layers(first, last, steps=steps)
        out = tracer.result.save()
    assert torch.equal(out, expected)


def test_bad_steps_say_what_to_give(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    for steps, error in [
        (-1, ValueError),
        ("sometimes", TypeError),
        (True, TypeError),
        ([], ValueError),
        (1.5, TypeError),
    ]:
        with pytest.raises(error, match="steps="), model.generate(PROMPTS, **settings(model)):
            model.steer(1, vector, steps=steps)
    with pytest.raises(ValueError, match="one forward pass"), model.trace(PROMPTS):
        model.steer(1, vector, steps="generated")
    with pytest.raises(IndexError, match="With a cache, step 1"), model.generate(PROMPTS, **settings(model)):
        model.steer(1, vector, token_positions=0, steps="generated")
    with pytest.raises(IndexError, match="no position 99"), model.generate(PROMPTS, **settings(model)):
        model.steer(1, vector, token_positions=99)


def test_an_edit_that_reads_out_of_order_is_an_error_in_any_step(tiny):
    model = tiny("llama")

    def late(step):
        if step == 2:
            _ = model.layers_output[1]
            _ = model.layers_output[0]

    with pytest.raises(Exception, match="forward order"), model.generate(PROMPTS, **settings(model)):
        model.each_step(late)


def test_weights_loaded_inside_a_steering_are_proven_unsteered_and_then_steered():
    import nnterp

    model = StandardizedTransformer(nnterp.toy_checkpoint(), allow_dispatch=False)
    vector = vector_for(model, 1.0)
    with model.steering(vector, 3):
        model.dispatch()
        assert model.certificate.ok
        traced = model.collect(["Paris"], "layers_output", layers=[3])["layers_output"]
        inside = model._module(**model.tokenizer("Paris", return_tensors="pt")).logits
    outside = model._module(**model.tokenizer("Paris", return_tensors="pt")).logits
    plain = model.collect(["Paris"], "layers_output", layers=[3])["layers_output"]
    torch.testing.assert_close(traced - plain, vector.expand_as(plain), atol=1e-4, rtol=1e-4)
    assert (inside - outside).abs().max() > 1e-2


@pytest.mark.parametrize("first", [1, 2])
def test_patterns_of_later_steps_are_those_of_their_steps(first):
    """What is read is inside an operation, into which nnsight first looks in a later step."""
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    ids, options = torch.tensor([[5, 9, 12, 40]]), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model._module.generate(ids, **options, output_attentions=True, return_dict_in_generate=True).attentions
    with torch.no_grad(), model.generate(ids, **options) as tracer:
        patterns = [].save()
        for _ in tracer.iter[first:4]:
            patterns.append(model.attention_probabilities[1].clone())
    assert len(patterns) == 4 - first
    for pattern, step in zip(patterns, expected[first:], strict=True):
        torch.testing.assert_close(pattern, step[1])
