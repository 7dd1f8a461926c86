"""Patchscopes against one plain forward pass with a torch hook per source and layer."""

import pytest
import torch

from nnterp.errors import InsideTraceError, ShapeError
from nnterp.interventions import (
    PatchscopeResult,
    TargetPrompt,
    TargetPromptBatch,
    it_repeat_prompt,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
    repeat_prompt,
    steer,
)

from .reference import ARCHITECTURES, ids_of, logits_with, overwrite, probs_with, states

SOURCES = ["The capital of England is", "Hi", "When Mary and John went"]
TARGET = TargetPrompt("The capital of France is", -1)


def slow(model, source, target, index, layer):
    state = states(model, source)[layer][-1]
    return probs_with(model, target, [("layers_output", layer, overwrite(index, state))])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_one_forward_per_source_and_layer(tiny, model_type):
    model = tiny(model_type)
    targets = [TARGET, TargetPrompt("Hello there, who are you and what is it", 1), repeat_prompt()]
    found = patchscope_lens(model, SOURCES, targets)
    assert found.shape == (3, model.num_layers, model.vocab_size)
    assert found.dtype == torch.float32
    for i, (source, target) in enumerate(zip(SOURCES, targets, strict=True)):
        for layer in range(model.num_layers):
            expected = slow(model, source, target.prompt, target.index_to_patch, layer)
            torch.testing.assert_close(found[i, layer], expected, atol=1e-4, rtol=1e-3)


def test_the_published_spelling(tiny):
    model = tiny("gpt2")
    found = patchscope_lens(model, source_prompts=SOURCES[:1], target_patch_prompts=TARGET, layer_to_patch=2)
    assert found.shape == (1, 1, model.vocab_size)
    torch.testing.assert_close(found[0, 0], slow(model, SOURCES[0], TARGET.prompt, -1, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, patchscope_lens(model, SOURCES[0], TARGET, layers=2), atol=1e-6, rtol=1e-4)


def test_own_state_changes_nothing(tiny):
    model = tiny("gemma2")
    found = patchscope_lens(model, TARGET.prompt, TARGET)
    for layer in range(model.num_layers):
        torch.testing.assert_close(found[0, layer], probs_with(model, TARGET.prompt), atol=1e-5, rtol=1e-4)


def test_latents(tiny):
    model = tiny("llama")
    latents = torch.randn(2, 3, model.hidden_size, generator=torch.Generator().manual_seed(0))
    found = patchscope_lens(model, target_patch_prompts=TARGET, layers=[1, 3], latents=latents)
    for k, layer in enumerate((1, 3)):
        for source in range(3):
            expected = probs_with(model, TARGET.prompt, [("layers_output", layer, overwrite(-1, latents[k, source]))])
            torch.testing.assert_close(found[source, k], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_and_order_do_not_matter(tiny, batch_size):
    model = tiny("llama")
    whole = patchscope_lens(model, SOURCES, TARGET)
    torch.testing.assert_close(
        patchscope_lens(model, SOURCES, TARGET, batch_size=batch_size), whole, atol=1e-5, rtol=1e-4
    )
    turned = patchscope_lens(model, SOURCES[::-1], TARGET, layers=[3, 2, 1, 0], batch_size=batch_size)
    torch.testing.assert_close(turned.flip(0, 1), whole, atol=1e-5, rtol=1e-4)


def test_table(tiny, tmp_path):
    model = tiny("llama")
    probs = patchscope_lens(model, SOURCES, TARGET)
    found = patchscope_table(model, SOURCES, TARGET, top_k=3)
    best, ids = probs.topk(3, dim=-1)
    torch.testing.assert_close(found["top_probs"], best, atol=1e-6, rtol=1e-4)
    assert torch.equal(found["top_ids"], ids)
    frame = found.to_dataframe()
    assert list(frame.columns) == ["prompt", "layer", "top", "top_probs", "top_ids", "top_token"]
    found.save(tmp_path / "scope")
    assert isinstance(PatchscopeResult.load(tmp_path / "scope"), PatchscopeResult)


def test_generate(tiny):
    model = tiny("llama")
    found = patchscope_generate(model, SOURCES, TARGET, max_new_tokens=3, layers=[0, 2], batch_size=4, do_sample=False)
    assert set(found) == {0, 2}
    for layer, rows in found.items():
        for source, row in zip(SOURCES, rows, strict=True):
            state = states(model, source)[layer][-1]
            ids = ids_of(model, TARGET.prompt)[0].tolist()
            at = len(ids) - 1
            for _ in range(3):
                edits = [("layers_output", layer, overwrite(at, state))]
                ids.append(int(logits_with(model, ids, edits)[-1].argmax()))
                if ids[-1] == model._module.generation_config.eos_token_id:
                    break
            assert row[: len(ids)].tolist() == ids


def test_all_layers_generate(tiny):
    model = tiny("gpt2")
    found = patchscope_generate(model, SOURCES[0], TARGET, max_new_tokens=2)
    assert set(found) == set(range(model.num_layers))
    assert all(rows.shape[0] == 1 for rows in found.values())


def test_one_source_for_all_targets(tiny):
    model = tiny("llama")
    targets = ["The Eiffel Tower is in", "We are all the same, are we"]
    found = patch_object_attn_lens(model, SOURCES[0], targets, -2, num_patches=2)
    assert found.shape == (2, model.num_layers, model.vocab_size)
    twice = patch_object_attn_lens(model, [SOURCES[0]] * 2, targets, -2, num_patches=2)
    torch.testing.assert_close(found, twice, atol=1e-5, rtol=1e-4)


def test_target_prompts():
    lines = repeat_prompt().prompt.split("\n")
    assert lines[:2] == ["king king", "1135 1135"]
    assert (len(lines), lines[-1], repeat_prompt().index_to_patch) == (9, "?", -1)
    assert repeat_prompt(["a", "b"], rel=":", sep=" ", placeholder="x", index_to_patch=2) == TargetPrompt(
        "a:a b:b x", 2
    )
    batch = TargetPromptBatch.from_target_prompt(TARGET, 3)
    assert len(batch) == 3
    assert list(batch) == [TARGET] * 3
    assert TargetPromptBatch.from_target_prompts([TARGET, repeat_prompt()])[1] == repeat_prompt()
    assert TargetPromptBatch.from_prompts("a b", 1)[0] == TargetPrompt("a b", 1)
    assert TargetPromptBatch.from_prompts(["a", "b"], [0, -1]).index_to_patch.tolist() == [0, -1]
    assert TargetPromptBatch.from_prompts(["a", "b"], torch.tensor([0, -1])).index_to_patch.tolist() == [0, -1]
    assert TargetPromptBatch.auto(batch, 9) is batch
    assert len(TargetPromptBatch.auto(TARGET, 2)) == 2
    assert len(TargetPromptBatch.auto([TARGET, TARGET], 2)) == 2
    with pytest.raises(ValueError, match="TargetPrompt"):
        TargetPromptBatch.auto("text", 1)
    with pytest.raises(ValueError, match="2 target prompts and 1 positions"):
        TargetPromptBatch.from_prompts(["a", "b"], [1])
    with pytest.raises(ValueError, match="index_to_patch"):
        TargetPromptBatch.from_prompts(["a"], "last")


def test_chat_target_prompt(tiny):
    from nnterp.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        it_repeat_prompt(tokenizer)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    text = repeat_prompt(["a"]).prompt
    for user in (True, False):
        for system in (True, False):
            found = it_repeat_prompt(tokenizer, ["a"], add_user_instr=user, use_system_prompt=system)
            assert found.index_to_patch == -1
            assert found.prompt.endswith(f"<assistant>{text}")
            assert ("<system>" in found.prompt) == system
            open_ended = it_repeat_prompt(tokenizer, ["a"], complete_prompt=False, add_user_instr=user)
            assert open_ended.prompt.endswith("<assistant>")
            assert text in open_ended.prompt


def test_steer_is_the_model_s(tiny):
    model = tiny("llama")
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    with model.trace(SOURCES[0]):
        steer(model, [1, 3], vector, factor=0.5)
        steered = model.logits.save()
    edits = [("layers_output", layer, lambda x: x + 0.5 * vector) for layer in (1, 3)]
    torch.testing.assert_close(steered[0], logits_with(model, SOURCES[0], edits), atol=1e-4, rtol=1e-4)


def test_bad_input(tiny):
    model = tiny("llama")
    with pytest.raises(IndexError, match=r"target prompt 0 has \d+ tokens, so there is no position 40. Its tokens: 0:"):
        patchscope_lens(model, SOURCES, TargetPrompt("The capital", 40))
    with pytest.raises(ValueError, match="either source_prompts or latents"):
        patchscope_lens(model)
    with pytest.raises(ValueError, match="either source_prompts or latents"):
        patchscope_lens(model, SOURCES, latents=torch.zeros(4, 1, 64))
    with pytest.raises(ShapeError, match="latents has shape"):
        patchscope_lens(model, latents=torch.zeros(3, 1, 64))
    with pytest.raises(ValueError, match="2 target prompts for 3 sources"):
        patchscope_lens(model, SOURCES, [TARGET, TARGET])
    with pytest.raises(ValueError, match="two names of one argument"):
        patchscope_lens(model, SOURCES, TARGET, layers=1, layer_to_patch=1)
    with pytest.raises(IndexError, match="4 layers"):
        patchscope_lens(model, SOURCES, TARGET, layers=10)
    with pytest.raises(ValueError, match="2 sources for 3 targets"):
        patch_object_attn_lens(model, SOURCES[:2], SOURCES, 0)
    with pytest.raises(IndexError, match="target prompt 1"):
        patch_object_attn_lens(model, SOURCES[0], SOURCES[:2], 3)
    with pytest.raises(ValueError, match="num_patches"):
        patch_object_attn_lens(model, SOURCES[0], SOURCES[0], 0, num_patches=0)
    with pytest.raises(InsideTraceError), model.trace("Hi"):
        patchscope_lens(model, SOURCES, TARGET)


def test_several_streams_are_patched_together(tiny):
    """Gemma 3n keeps four streams, `[streams, batch, seq, hidden]`: a state is that of all of them."""
    model = tiny("gemma3n_text")
    sources, target = [[11, 42, 57, 93], [60, 77, 101, 15]], TargetPrompt("Hello there, who are you", -2)
    found = patchscope_lens(model, sources, target, layers=[0, 2])
    written = patchscope_generate(model, sources, target, 1, [0, 2], do_sample=False)
    ids = ids_of(model, target.prompt)
    for k, layer in enumerate((0, 2)):
        block = model._module.get_submodule(model.anatomy.blocks[layer].path)
        for i, source in enumerate(sources):
            kept = []

            def put(module, args, out, kept=kept):
                out = out.clone()
                out[:, :, -2] = kept[0]
                return out

            with torch.no_grad():
                handle = block.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out[:, :, -1].clone()))
                model._module(input_ids=torch.tensor([source]))
                handle.remove()
                handle = block.register_forward_hook(put)
                logits = model._module(input_ids=ids, use_cache=False).logits[0, -1]
                handle.remove()
            torch.testing.assert_close(found[i, k], logits.softmax(-1), atol=1e-4, rtol=1e-3)
            assert written[layer][i][ids.shape[1]] == logits.argmax()


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_the_default_prompt_repeats_the_word_of_the_source_on_real_models(real, name):
    """With three words, the paper's prompt, both models go on with a newline instead."""
    model = real(name)
    sources = ["The capital of France", "She went to buy a new guitar", "My favourite animal is the tiger"]
    words = [source.split()[-1] for source in sources]
    layers = [0, model.num_layers // 6, model.num_layers // 3 - 1]

    def said(target):
        table = patchscope_table(model, sources, target, layers, top_k=1, progress=False)
        return [[table.vocabulary[i].strip() for i in row] for row in table["top_ids"][:, :, 0].tolist()]

    assert said(repeat_prompt()) == [[word] * len(layers) for word in words]
    assert not any(word in row for word, row in zip(words, said(repeat_prompt(["king", "1135", "hello"])), strict=True))
