"""Encoder-decoder models: values of the encoder, of the decoder and of attention between them, against plain runs."""

import copy
import dataclasses
import functools

import nnsight
import pytest
import torch

from nnterp import EncoderDecoderPrompt, StandardizedTransformer
from nnterp.certificate import certify
from nnterp.errors import PaddingError, Unavailable
from nnterp.inputs import as_given, encode, pad
from nnterp.interventions import (
    Component,
    TargetPrompt,
    ablate,
    activation_patching,
    logit_lens,
    optimize_vector,
    patchscope_generate,
    patchscope_lens,
)
from nnterp.prompts import Prompt, next_token_probs, run_prompts
from nnterp.testing import encoder_decoder_types, tiny_encoder_decoder, tiny_model, tiny_tokenizer

TYPES = ("t5", "bart", "whisper")
LISTED = sorted(encoder_decoder_types())
TEXTS = ("The capital of France is Paris", "The capital of Japan is Tokyo")


@functools.cache
def model_of(model_type):
    module = tiny_encoder_decoder(model_type, attn_implementation="eager")
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer())


def prompt(model, which=0, decoder=(5, 20, 30, 41)):
    if model.anatomy.model_class.startswith("Whisper"):
        shape = model._module.config.num_mel_bins, 2 * model._module.config.max_source_positions
        heard = torch.randn(shape, generator=torch.Generator().manual_seed(which))
        return EncoderDecoderPrompt(heard, list(decoder))
    return EncoderDecoderPrompt(TEXTS[which], list(decoder))


def plain_inputs(model, one):
    own = {"decoder_input_ids": torch.tensor([list(one.decoder)])}
    if isinstance(one.encoder, torch.Tensor):
        return {"input_features": one.encoder[None], **own}
    return {"input_ids": torch.tensor([model.tokenizer(one.encoder)["input_ids"]]), **own}


@torch.no_grad()
def plain(model, one):
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    return model._module(**plain_inputs(model, one), **options)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_values_are_huggingfaces(model_type):
    model = model_of(model_type)
    one = prompt(model)
    expected = plain(model, one)
    with torch.no_grad(), model.trace(one):
        heard, attended, stream = [], [], []
        for i in range(model.num_encoder_layers):
            heard.append(model.encoder_layers_output[i])
        for i in range(model.num_layers):
            attended.append(model.cross_attention_probabilities[i])
            stream.append(model.layers_output[i])
        nnsight.save(heard)
        nnsight.save(attended)
        nnsight.save(stream)
        logits = model.logits.save()
    close(logits, expected.logits)
    for made, state in zip(heard[:-1], expected.encoder_hidden_states[1:-1], strict=True):
        close(made, state)
    for made, state in zip(stream[:-1], expected.decoder_hidden_states[1:-1], strict=True):
        close(made, state)
    for made, state in zip(attended, expected.cross_attentions, strict=True):
        close(made, state)
    close(model.project_on_vocab(stream[-1]), expected.logits)


@pytest.mark.parametrize("model_type", TYPES)
def test_collect_and_lens(model_type):
    model = model_of(model_type)
    prompts = [prompt(model, 0), prompt(model, 1, (5, 20, 30)), prompt(model, 1, (9, 44, 30, 41, 60))]
    found = model.collect(prompts, "encoder_layers_output", positions=-1)["encoder_layers_output"]
    attended = model.collect(prompts, "cross_attention_probabilities[1]", positions=-1)
    lens = logit_lens(model, prompts)
    for i, one in enumerate(prompts):
        expected = plain(model, one)
        close(found[1, i], expected.encoder_hidden_states[2][0, -1])
        row = expected.cross_attentions[1][0, :, -1]
        close(attended["cross_attention_probabilities", 1][i][:, : row.shape[-1]], row)
        close(lens[i, -1], expected.logits[0, -1].softmax(-1))
    with pytest.raises(ValueError, match="two calls"):
        model.collect(prompts, ["encoder_layers_output", "layers_output"])


@torch.no_grad()
def patched(model, one, path, layer, position, new):
    """The plain model's logits with one position of what a layer returns replaced."""

    def replace(module, args, output):
        first = output if isinstance(output, torch.Tensor) else output[0]
        first = first.clone()
        first[0, position] = new
        return first if isinstance(output, torch.Tensor) else (first, *output[1:])

    handle = model._module.get_submodule(path).register_forward_hook(replace)
    try:
        return model._module(**plain_inputs(model, one), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("value", ["encoder_layers_output", "layers_output"])
def test_patching_equals_plain_hooks(model_type, value):
    model = model_of(model_type)
    clean, corrupted = prompt(model, 0), prompt(model, 1)
    encoder = value.startswith("encoder")
    if encoder and not isinstance(clean.encoder, torch.Tensor):
        length = len(model.tokenizer(TEXTS[1])["input_ids"])
        clean = EncoderDecoderPrompt(model.tokenizer(TEXTS[0])["input_ids"][:length], clean.decoder)
        clean = EncoderDecoderPrompt([*clean.encoder, *[9] * (length - len(clean.encoder))], clean.decoder)
    blocks = (model.anatomy.encoder if encoder else model.anatomy).blocks
    scores = activation_patching(
        model,
        clean=clean,
        corrupted=corrupted,
        metric=lambda logits: logits[:, 7],
        values=value,
        layers=[1],
        positions=[2],
    )["scores"]
    inputs = {"input_ids": torch.tensor([clean.encoder])} if isinstance(clean.encoder, list) else {}
    with torch.no_grad():
        run = model._module(
            **{**plain_inputs(model, corrupted), **plain_only(model, clean), **inputs}, output_hidden_states=True
        )
    states = run.encoder_hidden_states if encoder else run.decoder_hidden_states
    expected = patched(model, corrupted, blocks[1].path, 1, 2, states[2][0, 2])
    close(scores.flatten()[0], expected[7])
    unpatched = plain(model, corrupted).logits[0, -1, 7]
    assert (scores.flatten()[0] - unpatched).abs() > 1e-4


def plain_only(model, one):
    return {} if isinstance(one.encoder, list) else plain_inputs(model, one)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("value", ["encoder_mlps_output", "cross_attentions_output", "encoder_attention_head_outputs"])
def test_writing_has_an_effect_on_what_follows_alone(model_type, value):
    model = model_of(model_type)
    one = prompt(model)
    with torch.no_grad(), model.trace(one):
        before = model.encoder_layers_output[0].save()
        getattr(model, value)[2] = getattr(model, value)[2] * 0
        logits = model.logits.save()
    close(before, plain(model, one).encoder_hidden_states[1])
    assert (logits - plain(model, one).logits).abs().max() > 1e-3


def test_padded_prompts_are_told_apart():
    model = model_of("t5")
    assert model.facts.padding == "exact"
    both = [prompt(model, 0), EncoderDecoderPrompt("The capital", [5])]
    together = model.collect(both, "layers_output", positions=-1, batch_size=2)["layers_output"]
    for i, one in enumerate(both):
        close(together[:, i], model.collect(one, "layers_output", positions=-1)["layers_output"][:, 0])


def test_a_text_is_for_the_encoder():
    model = model_of("t5")
    model._module.generation_config.decoder_start_token_id = start = 0
    with torch.no_grad(), model.trace(TEXTS[0]):
        logits = model.logits.save()
    close(logits, plain(model, EncoderDecoderPrompt(TEXTS[0], [start])).logits)
    row = model.collect(EncoderDecoderPrompt(TEXTS[0], "Paris"), "layers_output").rows[0]
    assert row.ids == (start, *model.tokenizer("Paris")["input_ids"])
    with pytest.raises(ValueError, match="two inputs"), model.trace(torch.tensor([[5, 6]])):
        pass


def test_a_model_without_an_encoder_says_so():
    model = StandardizedTransformer(tiny_model("llama", num_layers=2), tokenizer=tiny_tokenizer())
    with pytest.raises(Unavailable, match="no encoder"):
        model.place("encoder_layers_output", 0)
    with pytest.raises(Unavailable, match="no encoder"):
        model.collect("The", "cross_attention_probabilities")
    assert model.support()["encoder_layers_output"] == ()


def mutated(model, change):
    """The verdict on a model whose encoder's or cross-attention's names are wrong."""
    wrong = object.__new__(type(model))
    wrong.__dict__.update(model.__dict__, facts=dataclasses.replace(model.facts, anatomy=change(model.facts.anatomy)))
    return certify(wrong)[0]


def with_encoder(anatomy, blocks):
    return dataclasses.replace(anatomy, encoder=dataclasses.replace(anatomy.encoder, blocks=tuple(blocks)))


def swapped(anatomy):
    first, second, *rest = anatomy.encoder.blocks
    return with_encoder(anatomy, [dataclasses.replace(second, index=0), dataclasses.replace(first, index=1), *rest])


def shortened(anatomy):
    return with_encoder(anatomy, anatomy.encoder.blocks[:-1])


def own_for_cross(anatomy):
    blocks = [dataclasses.replace(block, cross_attn=block.self_attn) for block in anatomy.blocks]
    return dataclasses.replace(anatomy, blocks=tuple(blocks))


def decoders_for_encoder(anatomy):
    return with_encoder(anatomy, anatomy.blocks)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
@pytest.mark.parametrize("change", [swapped, shortened, own_for_cross, decoders_for_encoder])
def test_wrong_names_are_caught(model_type, change):
    model = model_of(model_type)
    assert mutated(model, copy.copy).ok
    assert not mutated(model, change).ok


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in LISTED if t not in TYPES])
def test_every_type_is_proven(model_type):
    module = tiny_encoder_decoder(model_type, attn_implementation="eager")
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.certificate.ok
    assert model.support()["encoder_layers_output"] == tuple(range(model.num_encoder_layers))


def test_batches_of_different_lengths_are_refused_where_padding_is_not_exact():
    model = model_of("t5")
    inexact = dataclasses.replace(model.facts, padding="inexact")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
    with (
        pytest.raises(PaddingError),
        model.supposing(inexact).trace(
            {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.tensor([[5], [5]])}
        ),
    ):
        pass


@pytest.mark.parametrize("model_type", ["t5", "whisper"])
def test_prompts_with_equal_decoder_texts_are_told_apart(model_type):
    model = model_of(model_type)
    both = [prompt(model, 0), prompt(model, 1)]
    expected = torch.stack([plain(model, one).logits[0, -1].softmax(-1) for one in both])
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    close(next_token_probs(model, both), expected)
    asked = [Prompt(one, {"a": [7], "b": [9]}) for one in both]
    for function in (next_token_probs, lens_of_last_layer):
        results = run_prompts(model, asked, get_probs_func=function, batch_size=1)
        found = torch.stack([results[name].flatten() for name in ("a", "b")], dim=-1)
        close(found.float(), expected[:, [7, 9]])


def lens_of_last_layer(model, prompts, remote=False):
    return logit_lens(model, prompts, remote=remote)[:, -1:]


@pytest.mark.parametrize("model_type", ["t5", "whisper"])
def test_rows_are_given_on_as_they_are(model_type):
    model = model_of(model_type)
    rows = encode(model, [prompt(model, 0), prompt(model, 1)])
    assert rows[0].ids == rows[1].ids
    assert rows[0].identity != rows[1].identity
    again = encode(model, [as_given(model, row) for row in rows])
    assert [row.identity for row in again] == [row.identity for row in rows]


def test_a_row_without_an_encoders_input_is_refused():
    model = model_of("t5")
    (row,) = encode(model, prompt(model))
    bare = dataclasses.replace(row, encoder=None)
    with pytest.raises(ValueError, match="all need one"):
        pad(model, [row, bare])
    with pytest.raises(ValueError, match="ids of one"), model.trace(pad(model, [bare]).encoding):
        pass


def test_a_patchscope_keeps_target_prompts_with_equal_decoder_texts_apart():
    model = model_of("t5")
    model._module.generation_config.decoder_start_token_id = start = 0
    latents = torch.randn(1, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    targets = [TargetPrompt(text, 0) for text in TEXTS]
    found = patchscope_lens(model, target_patch_prompts=targets, latents=latents, layers=[1])
    for i, text in enumerate(TEXTS):
        one = EncoderDecoderPrompt(text, [start])
        logits = patched(model, one, model.anatomy.blocks[1].path, 1, 0, latents[0, i])
        close(found[i].flatten(), logits.softmax(-1))


def test_generating_under_a_patch_equals_a_hook_on_the_first_step(monkeypatch):
    model = model_of("t5")
    model._module.generation_config.decoder_start_token_id = start = 0
    target, first = EncoderDecoderPrompt(TEXTS[1], [start]), []
    written = patchscope_generate(
        model, [prompt(model)], TargetPrompt(TEXTS[1], -1), max_length=4, layers=[1], do_sample=False
    )[1]
    latent = plain(model, prompt(model)).decoder_hidden_states[2][0, -1]

    def patch(_, args, output):
        if first:
            return None
        stream = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        first.append(stream)
        stream[0, 0] = latent
        return stream if isinstance(output, torch.Tensor) else (stream, *output[1:])

    handle = model._module.get_submodule(model.anatomy.blocks[1].path).register_forward_hook(patch)
    hooked = model._module.generate(**plain_inputs(model, target), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert written.tolist() == hooked.tolist()
    assert (
        written.tolist()
        != model._module.generate(**plain_inputs(model, target), max_new_tokens=4, do_sample=False).tolist()
    )
    monkeypatch.setattr(model._module.config, "decoder_start_token_id", 7, raising=False)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        patchscope_generate(model, [prompt(model)], TargetPrompt(TEXTS[1], -1), layers=[1])


def test_patching_heads_of_the_decoder_equals_plain_hooks():
    model = model_of("t5")
    clean, corrupted = prompt(model, 0), prompt(model, 0, (5, 20, 33, 41))
    heads = activation_patching(
        model, clean, corrupted, lambda logits: logits[:, 7], "attention_head_outputs", [1], heads="all"
    )["scores"].flatten(0, 1)
    module = model._module.get_submodule(model.anatomy.blocks[1].self_attn.exit).o
    kept = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    plain(model, clean)
    handle.remove()
    width = module.in_features // model.num_heads
    for head in (0, model.num_heads - 1):
        own = slice(head * width, (head + 1) * width)

        def patch(_, args, own=own):
            x = args[0].clone()
            x[..., own] = kept[0][..., own]
            return (x,)

        handle = module.register_forward_pre_hook(patch)
        hooked = plain(model, corrupted).logits[0, -1, 7]
        handle.remove()
        assert (hooked - plain(model, corrupted).logits[0, -1, 7]).abs() > 1e-4
        close(heads[0, head], hooked)


def test_what_would_read_the_decoders_ids_as_the_encoders_is_refused():
    model = model_of("bart")
    with pytest.raises(Unavailable, match="reads two inputs"):
        optimize_vector(model, [prompt(model)], [7], layer=1, steps=1)
    with pytest.raises(TypeError, match="listens"):
        model_of("whisper").collect(EncoderDecoderPrompt([5, 9], [5, 6]), "layers_output")


def test_collecting_over_a_generation_is_refused():
    model = model_of("t5")
    with pytest.raises(Unavailable, match="reads two inputs"):
        model.collect(prompt(model), "layers_output", max_new_tokens=2)


def test_a_drift_is_that_of_both_inputs():
    model = model_of("t5")
    module = copy.deepcopy(model._module)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("encoder.block.1"):
                weight.mul_(1.5)
    other = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    one = EncoderDecoderPrompt(TEXTS[0], [5, 20])
    drift = model.validate(against=other, prompts=[one]).drift
    lines = {(line.value, line.layer): line for line in drift.lines}
    assert lines["encoder_layers_output", 0].worst == 0
    mine, its = (plain(which, one).encoder_hidden_states[2][0] for which in (model, other))
    errors = (mine - its).norm(dim=-1) / its.norm(dim=-1)
    close(torch.tensor(lines["encoder_layers_output", 1].worst), errors.max())


def test_components_at_the_encoders_positions_are_refused():
    model = model_of("t5")
    for value in ("encoder_mlps_output", "cross_attention_keys"):
        with pytest.raises(Unavailable, match="positions of the encoder's input"):
            ablate(model, [prompt(model)], what=Component(value, 1), metric=lambda logits: logits[:, 7])


def test_ablating_cross_attention_equals_a_plain_hook():
    model = model_of("t5")
    one = prompt(model)
    found = ablate(
        model, [one], what=Component("cross_attentions_output", 1), how="zero", metric=lambda logits: logits[:, 7]
    )["scores"]
    module = model._module.get_submodule(model.anatomy.blocks[1].cross_attn.exit)
    handle = module.register_forward_hook(lambda _, args, out: (torch.zeros_like(out[0]), *out[1:]))
    try:
        hooked = plain(model, one).logits[0, -1, 7]
    finally:
        handle.remove()
    assert (hooked - plain(model, one).logits[0, -1, 7]).abs() > 1e-4
    close(found.flatten()[0], hooked)
