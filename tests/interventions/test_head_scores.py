"""Kinds of heads and value-weighted attention: hand-made heads, and slow loops over HuggingFace's own attentions."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import Unavailable
from nnterp.interventions import HeadScores, Result, head_scores, probability_difference, value_weighted_attention
from nnterp.interventions._heads import _run
from nnterp.testing import tiny_tokenizer

from ..models import eager

KINDS = ("previous_token", "duplicate_token", "induction", "first_token")
PATTERNS = ["llama", "gpt2", "gemma2", "bloom", "gpt_neox", "falcon", "gemma3_text", "cohere", "jamba", "gpt_oss"]
GROUPED = ["llama", "gemma2", "qwen3", "granite"]  # grouped queries; post-norms; norms of heads; multipliers
PROMPTS = [[11, 42, 57, 11, 42, 57, 93, 200, 42], [60, 77, 60, 15, 77], [33, 70, 12, 91, 33, 140, 12]]
TARGETS = [[42], [15], [91, 70]]


# -- heads made by hand ------------------------------------------------------------------------------------------------

VOCAB, POSITIONS, WIDTH = 509, 64, 576  # one channel for each token, then one for each position, then zeros


@cache
def handmade():
    """A GPT-2 of one layer: head 0 attends to the token before and demotes it, head 1 copies equal tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    hidden = 2 * WIDTH
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=hidden,
        n_layer=1,
        n_head=2,
        n_inner=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval()
    token, place = torch.arange(VOCAB), VOCAB + torch.arange(POSITIONS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        body, layer = model.transformer, model.transformer.h[0]
        for norm in (layer.ln_1, layer.ln_2, body.ln_f):
            norm.weight.fill_(1)
        body.wte.weight[token, token] = 1
        body.wpe.weight[torch.arange(POSITIONS), place] = 1
        queries, keys, values = layer.attn.c_attn.weight.split(hidden, 1)  # columns: head 0, then head 1
        queries[place[1:], place[:-1] - VOCAB] = 1
        keys[place, place - VOCAB] = 1
        queries[token, WIDTH + token] = 1
        keys[token, WIDTH + token] = 1
        for head, sign in enumerate((-1, 1)):
            values[token, head * WIDTH + token] = 1
            layer.attn.c_proj.weight[head * WIDTH + token, token] = sign
    return StandardizedTransformer(model, tokenizer=tiny_tokenizer(), enable_attention_probs=True)


def test_heads_made_by_hand_are_of_their_kind_and_of_no_other():
    model = handmade()
    options = {"n": 4, "length": 12, "progress": False}
    previous = head_scores(model, "previous_token", **options)
    assert [cell["head"] for cell in previous.heads()] == [0]
    assert previous["scores"][0, 0] > 0.99
    assert previous["control"][0, 0] < 0.01
    duplicate = head_scores(model, "duplicate_token", **options)
    assert [cell["head"] for cell in duplicate.heads()] == [1]
    assert duplicate["scores"][0, 1] == pytest.approx(0.5, abs=0.01)  # half of it stays at the token itself
    assert duplicate["control"][0, 1] < 0.02
    assert duplicate.about["control"].startswith("the second halves shuffled")
    for kind in ("induction", "first_token"):
        assert head_scores(model, kind, **options).heads() == []


def test_a_head_that_attends_to_a_distance_is_no_induction_head():
    """In a b a b, the token after the earlier occurrence is the token before."""
    scores = head_scores(handmade(), "induction", n=8, length=2, progress=False)
    assert scores["scores"][0, 0] > 0.99
    assert scores["control"][0, 0] > 0.99
    assert scores.heads() == []


def test_a_head_that_copies_moves_the_token_it_attends_to():
    prompts = [[11, 42, 57, 93, 42], [60, 77, 99, 15, 60]]
    scores = head_scores(handmade(), "name_mover", prompts, [42, 60], draws=3, progress=False)
    assert [cell["head"] for cell in scores.heads()] == [1]
    assert scores["attention"][0, 1] == pytest.approx(0.5, abs=0.01)
    assert scores["copying"].tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(scores["scores"], scores["attention"] * scores["copying"])


# -- slow loops over HuggingFace's attentions --------------------------------------------------------------------------


@torch.no_grad()
def attentions(model, ids):
    """`[heads, query, key]` of each layer that has attention."""
    with_attention = model._module(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    return [a[0] for a in with_attention if a is not None]


def share(pattern, ids, kind):
    """Mean over queries of one head's attention to the keys of a kind."""
    found = []
    for q in range(len(ids)):
        total, keys = 0.0, 0
        for k in range(q + 1):
            if kind == "previous_token":
                hit = k == q - 1 and k > 0
            elif kind == "duplicate_token":
                hit = 0 < k < q and ids[k] == ids[q]
            elif kind == "induction":
                hit = 0 < k < q and ids[k - 1] == ids[q]
            else:
                hit = k == 0 and q > 0
            if hit:
                total += pattern[q, k].item()
                keys += 1
        if keys and keys <= q - keys + (kind == "first_token"):
            found.append(total)
    return sum(found) / len(found)


@pytest.mark.parametrize("model_type", PATTERNS)
def test_scores_of_prompts_equal_a_slow_loop(model_type):
    model = eager(model_type)
    found = {kind: head_scores(model, kind, PROMPTS, progress=False) for kind in KINDS}  # one padded batch
    plain = [attentions(model, ids) for ids in PROMPTS]
    layers = found["induction"].labels["layers"]
    assert len(layers) == len(plain[0]) == len(model.attention_layers)
    for kind, scores in found.items():
        assert scores.about["without_patterns"] == [i for i in range(model.num_layers) if i not in layers]
        assert scores["by_prompt"].shape[1:] == (len(layers), plain[0][0].shape[0])
        for i, ids in enumerate(PROMPTS):
            expected = [[share(head, ids, kind) for head in layer] for layer in plain[i]]
            torch.testing.assert_close(scores["by_prompt"][i], torch.tensor(expected), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(scores["scores"], scores["by_prompt"].mean(0))


def test_the_control_is_other_keys_of_the_same_queries():
    """Over many draws it becomes the mean over all keys but the first and those of the kind."""
    model, ids = eager("llama"), PROMPTS[0]
    scores = head_scores(model, "previous_token", [ids], draws=400, progress=False)
    expected = torch.zeros(scores["scores"].shape)
    for i, layer in enumerate(attentions(model, ids)):
        for h, pattern in enumerate(layer):
            means = [
                sum(pattern[q, k].item() for k in range(1, q + 1) if k != q - 1) / (q - 1) for q in range(2, len(ids))
            ]
            expected[i, h] = sum(means) / len(means)
    error = scores["control_std"] / 400**0.5
    assert ((scores["control"] - expected).abs() < 5 * error + 1e-6).all()


def values_of(model, ids, layer):
    """Values `[seq, heads, head_dim]` as each head reads them, and W_O `[hidden, heads, head_dim]`."""
    kept = []
    attention = model._module.get_submodule(model.anatomy.blocks[layer].self_attn.path)
    fused = hasattr(attention, "c_attn")
    module = attention.c_attn if fused else attention.v_proj
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output[0]))
    with torch.no_grad():
        model._module(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    heads = model.num_heads
    out = attention.c_proj.weight.T if fused else attention.o_proj.weight
    values = kept[0].chunk(3, -1)[-1] if fused else kept[0]
    width = out.shape[1] // heads
    values = values.view(len(ids), -1, width)
    each = [values[:, h * values.shape[1] // heads] for h in range(heads)]
    return torch.stack(each, 1), out.reshape(out.shape[0], heads, width)


@pytest.mark.parametrize("model_type", [*GROUPED, "gpt2"])
def test_value_weighted_attention_equals_a_slow_loop(model_type):
    model = eager(model_type)
    layers = [2, 0]
    found = value_weighted_attention(model, PROMPTS, layers, progress=False)
    width = max(map(len, PROMPTS))
    assert found["weighted"].shape == (3, 2, model.num_heads, width, width)
    for i, ids in enumerate(PROMPTS):
        patterns = attentions(model, ids)
        for k, layer in enumerate(layers):
            values, out = values_of(model, ids, layer)
            for head in range(model.num_heads):
                for q in range(len(ids)):
                    for key in range(len(ids)):
                        norm = (out[:, head] @ values[key, head]).norm()
                        expected = (patterns[layer][head, q, key] * norm).item()
                        assert found["weighted"][i, k, head, q, key] == pytest.approx(expected, abs=1e-5, rel=1e-4)
        own = found["weighted"][i, ..., : len(ids), : len(ids)]
        assert not own.isnan().any()
        assert found["weighted"][i].isnan().sum() == found["weighted"][i].numel() - own.numel()
        assert [t for t in found.tokens[i] if t is not None] == [model.tokenizer.decode([t]) for t in ids]


@pytest.mark.parametrize("model_type", GROUPED)
@torch.no_grad()
def test_name_movers_equal_a_slow_loop(model_type, monkeypatch):
    """Random heads copy hardly anything into the top five of 509 tokens, so the comparison is on the top hundred."""
    monkeypatch.setattr(_run, "COPIED", 100)
    model = eager(model_type)
    found = head_scores(model, "name_mover", PROMPTS, TARGETS, progress=False)
    norm = model._module.get_submodule(model.anatomy.ln_final)
    copying, attention = torch.zeros(2, len(PROMPTS), *found["scores"].shape)
    product = torch.zeros(copying.shape)
    for i, ids in enumerate(PROMPTS):
        patterns = attentions(model, ids)
        keys = [k for k, token in enumerate(ids[:-1]) if token in TARGETS[i]]
        for layer in range(model.num_layers):
            values, out = values_of(model, ids, layer)
            block = model._module.get_submodule(model.anatomy.blocks[layer].path)
            for head in range(model.num_heads):
                for key in keys:
                    written = (out[:, head] @ values[key, head])[None, None]
                    if model_type == "gemma2":
                        written = block.post_attention_layernorm(written)
                    if model_type == "granite":
                        written = written * model._module.config.residual_multiplier
                    logits = model._module.lm_head(norm(written))[0, 0]
                    copied = ids[key] in logits.topk(100).indices.tolist()
                    attention[i, layer, head] += patterns[layer][head, -1, key]
                    copying[i, layer, head] += copied / len(keys)
                    product[i, layer, head] += patterns[layer][head, -1, key] * copied
    torch.testing.assert_close(found["by_prompt"], product, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["attention"], attention.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["copying"], copying.mean(0), atol=1e-5, rtol=1e-4)
    assert 0.05 < copying.mean() < 0.6  # the comparison sees copies


# -- sequences, errors, results ----------------------------------------------------------------------------------------


def test_random_sequences_repeat_ordinary_tokens_behind_what_the_tokenizer_puts_in_front():
    from nnterp.interventions._heads._kinds import SHUFFLED, beginning, on_random_sequences, ordinary_tokens

    model = eager("llama")
    half = ordinary_tokens(model, 40, random.Random(3))
    assert len(set(half)) == 40
    assert not set(half) & set(model.tokenizer.all_special_ids)
    assert all(model.tokenizer.decode([token]).strip().isalnum() for token in half)
    assert beginning(model) == ()
    plan = on_random_sequences("induction", [half[:6], half[6:12]], (1,), 3, random.Random(0))
    assert [row.ids for row in plan.prompts] == [(1, *half[:6] * 2), (1, *half[6:12] * 2)]
    assert plan.control == SHUFFLED
    for row in plan.rows[2:]:
        first, second = row.ids[1:7], row.ids[7:]
        assert sorted(first) == sorted(second)
        assert all(a != b for a, b in zip(first, second, strict=True))
    assert {(look.query, look.key) for look in plan.looks} == {(q, q - 5) for q in range(7, 13)}


def test_the_same_seed_gives_the_same_scores_and_batches_do_not_matter():
    model = eager("llama")
    options = {"n": 3, "length": 6, "draws": 2, "progress": False}
    one, other = (head_scores(model, "induction", batch_size=size, **options) for size in (2, 9))
    for name in one.tensors:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(head_scores(model, "induction", seed=1, **options)["scores"], one["scores"])
    chosen = head_scores(model, "induction", layers=[3, 1], **options)
    torch.testing.assert_close(chosen["scores"], one["scores"][[3, 1]], atol=1e-6, rtol=1e-5)


def test_top_and_heads_say_the_control_and_a_result_is_saved(tmp_path):
    scores = head_scores(eager("llama"), "previous_token", PROMPTS, progress=False)
    best = scores.top(3)
    assert [cell["scores"] for cell in best] == sorted((c["scores"] for c in best), reverse=True)
    where = best[0]["layer"], best[0]["head"]
    assert best[0]["control"] == scores["control"][where].item()
    above = scores["scores"] - scores["control"]
    every = {(c["layer"], c["head"]) for c in scores.heads(threshold=0.02, deviations=1.5)}
    expected = (above >= 0.02) & (above >= 1.5 * scores["control_std"])
    assert every == set(map(tuple, expected.nonzero().tolist()))
    assert 0 < len(every) < expected.numel()
    scores.save(tmp_path / "scores")
    again = Result.load(tmp_path / "scores")
    assert isinstance(again, HeadScores)
    assert again.top(3) == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("banana",), "kind is one of 'previous_token'"),
        (("induction", [[11, 42, 57]]), "Prompt 0 has no token from which 'induction'"),
        (("name_mover",), "needs prompts, and as targets"),
        (("name_mover", PROMPTS, [5, 5, 5]), "Prompt 0 does not hold its target"),
        (("induction", PROMPTS, [5, 5, 5]), "targets are for"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        head_scores(eager("llama"), *arguments, progress=False)


def test_too_short_a_vocabulary_and_too_few_draws_are_refused():
    with pytest.raises(ValueError, match=r"length=5000: this tokenizer has only \d+ ordinary tokens"):
        head_scores(eager("llama"), "induction", length=5000)
    with pytest.raises(ValueError, match="draws"):
        head_scores(eager("llama"), "induction", draws=1)


def test_patterns_need_eager_attention(tiny):
    for call in (
        lambda: head_scores(tiny("llama"), "induction"),
        lambda: value_weighted_attention(tiny("llama"), "a b"),
    ):
        with pytest.raises(Unavailable, match="enable_attention_probs=True"):
            call()
    with pytest.raises(Unavailable, match="no layer of this model has it"):
        head_scores(tiny("mamba"), "induction")
    with pytest.raises(Unavailable):
        head_scores(eager("jamba"), "induction", layers=[0, 1, 2, 3])


def test_a_gate_before_w_o_is_refused():
    """There a head's output is not its probabilities times its values, so a weight of each key would be wrong."""
    with pytest.raises(Unavailable, match=r"not its attention times its values in layers"):
        value_weighted_attention(eager("qwen3_next"), PROMPTS, progress=False)
    with pytest.raises(Unavailable, match=r"not its attention times its values in layers"):
        head_scores(eager("qwen3_next"), "name_mover", PROMPTS, TARGETS, progress=False)


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda m, **k: head_scores(m, "induction", n=3, length=5, draws=2, batch_size=2, progress=False, **k),
        lambda m, **k: head_scores(m, "name_mover", PROMPTS, TARGETS, batch_size=1, progress=False, **k),
        lambda m, **k: value_weighted_attention(m, PROMPTS, [1, 0], batch_size=1, progress=False, **k),
    ],
)
def test_an_interrupted_call_goes_on_where_it_was(call, tmp_path):
    model = eager("llama")
    whole = call(model)
    count = [0]

    def hook(*_):
        count[0] += 1
        if count[0] == 3:
            raise Boom

    handle = model._module.register_forward_pre_hook(hook)
    with pytest.raises(Boom) as caught:
        call(model)
    before = count[0]
    caught.value.partial.save(tmp_path / "partial")
    again = call(model, resume=tmp_path / "partial")
    assert caught.value.partial["done"].any()
    resumed = count[0] - before
    call(model)
    assert resumed < count[0] - before - resumed  # what was done is not run again
    handle.remove()
    for name in whole.tensors:
        torch.testing.assert_close(again[name], whole[name], atol=1e-6, rtol=1e-5, equal_nan=True)


def test_probability_difference_is_a_difference_of_sums():
    logits = torch.randn(4, 509, generator=torch.Generator().manual_seed(0))
    bound = probability_difference([[5, 6], [7, 8]], [[9], [10, 11]]).bind(eager("llama"), 2, logits)
    probs = logits.softmax(-1)
    torch.testing.assert_close(bound(logits, 0), probs[:, 5] + probs[:, 6] - probs[:, 9])
    torch.testing.assert_close(bound(logits, 1), probs[:, 7] + probs[:, 8] - probs[:, 10] - probs[:, 11])
