"""Steering, skipping, the lens, collecting and generating in vLLM, against HuggingFace's own model."""

import os

import pytest
import torch

import nnterp
from nnterp.errors import ShapeError, Unavailable, UnprovenWarning
from nnterp.prompts import Prompt
from nnterp.traced import Activation
from nnterp.vllm import StandardizedVLLM, logit_lens, run_prompts
from nnterp.vllm._kept import recall

from .reference import NEW, PROMPTS, SKIPPED, STEERED
from .test_values import close

GIVEN = [list(ids) for ids in PROMPTS]


def test_the_lens_reads_every_layer(model, reference):
    lens = logit_lens(model, GIVEN)
    close(lens, torch.stack(reference["lens"]))
    assert not model._installed_edits


def test_probabilities_of_targets(model, reference):
    """The same prompt twice, with other targets."""
    asked = [Prompt(ids, {"a": [7, 20 + i], "b": [9]}) for i, ids in enumerate([*GIVEN, GIVEN[0]])]
    logits = [*reference["logits"], reference["logits"][0]]
    lens = [*reference["lens"], reference["lens"][0]]
    last, every = run_prompts(model, asked), run_prompts(model, asked, over_layers=True)
    for i, prompt in enumerate(asked):
        for name, tokens in prompt.target_tokens.items():
            close(last[name][i], logits[i][-1].softmax(-1)[list(tokens)].sum(), 1.0)
            close(every[name][i], lens[i][:, list(tokens)].sum(-1), 1.0)


def test_steering_one_of_several_invokes(model, reference):
    vector, scale = reference["vector"], reference["scale"]
    with model.trace() as tracer:
        with tracer.invoke(GIVEN[0]):
            plain = model.logits.save()
        with tracer.invoke(GIVEN[1]):
            model.steer(list(STEERED), vector, scale)
            steered = model.logits.save()
    close(plain[0], reference["logits"][0])
    close(steered[0], reference["steered"][1])


def test_skipping_in_one_of_several_invokes(model, reference):
    with model.trace() as tracer:
        with tracer.invoke(GIVEN[0]):
            model.skip_layers(SKIPPED[0], SKIPPED[-1])
            skipped = model.logits.save()
        with tracer.invoke(GIVEN[1]):
            plain = model.logits.save()
    close(skipped[0], reference["skipped"][0])
    close(plain[0], reference["logits"][1])


def test_greedy_tokens_plain_and_steered(model, reference):
    def tokens():
        return [list(output.outputs[0].token_ids) for output in model.run(GIVEN, NEW, ignore_eos=True)]

    assert tokens() == reference["greedy"]
    with model.steering(reference["vector"], list(STEERED), reference["scale"]):
        assert tokens() == reference["steered greedy"]
        logits = model.collect(GIVEN, "logits", positions=-1)["logits"]
    close(logits, torch.stack([one[-1] for one in reference["steered"]]))
    assert tokens() == reference["greedy"]


def test_steering_the_prompt_alone(model, reference):
    """The first token is that of a steered prompt, the state of later steps is not steered."""
    vector, scale = reference["vector"], reference["scale"]
    with model.steering(vector, list(STEERED), scale, steps="prompt"):
        first = model.run(GIVEN, 1, ignore_eos=True)
    assert [o.outputs[0].token_ids[0] for o in first] == [one[0] for one in reference["steered greedy"]]
    with model.steering(vector, list(STEERED), scale, steps="generated"):
        logits = model.collect(GIVEN, "logits", positions=-1)["logits"]
    close(logits, torch.stack([one[-1] for one in reference["logits"]]))


@pytest.mark.parametrize("chosen", [{"steps": "prompt"}, {"steps": "generated"}, {"token_positions": [0, -1]}])
def test_requests_that_come_back_into_the_engine_are_steered_as_before(model, reference, monkeypatch, chosen):
    """Where memory does not hold all requests, vLLM puts some off, and later runs their tokens again in one pass."""
    if os.environ["NNTERP_VLLM_NAME"] != "gpt2":
        pytest.skip("tried on the model whose engine has little memory")
    scheduler = model.vllm_entrypoint.llm_engine.engine_core.engine_core.scheduler
    put_off, preempt = [], scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *own, **named: put_off.append(preempt(*own, **named)))
    prompts = [[*ids, *range(20 + i, 42 + i)] for i in range(3) for ids in GIVEN]  # of fewer tokens than a block
    with model.steering(reference["vector"], list(STEERED), reference["scale"], **chosen):
        single = [model.run([ids], 14, ignore_eos=True)[0] for ids in prompts]
        assert not put_off
        together = model.run(prompts, 14, ignore_eos=True)
        last = model.collect(prompts, "layers_output", max_new_tokens=14, ignore_eos=True)
    assert put_off
    plain = model.run(prompts, 14, ignore_eos=True)
    ids = [[list(output.outputs[0].token_ids) for output in outputs] for outputs in (single, together, plain)]
    assert ids[0] == ids[1] == last.generated.tolist()
    assert ids[0] != ids[2]


def test_steering_at_some_positions(model, reference):
    vector, scale = reference["vector"], reference["scale"]
    with model.trace(GIVEN[0]):
        model.steer(1, vector, scale, token_positions=[0, -1])
        stream = model.layers_output[1].save()
    expected = reference["read"][0]["layers_output", 1].clone()
    expected[:, [0, -1]] += scale * vector
    close(stream, expected)


@pytest.mark.parametrize("positions", [None, -1, [0, 2], slice(1, None)])
def test_collecting_from_prompts_of_different_lengths(model, reference, positions):
    collected = model.collect(GIVEN, ["layers_output", "attention_queries", "logits"], positions=positions)
    for i, (ids, read) in enumerate(zip(GIVEN, reference["read"], strict=True)):
        own = list(range(len(ids)))
        own = own if positions is None else own[positions] if isinstance(positions, slice) else positions
        for layer in range(model.num_layers):
            mine = collected["layers_output", layer][i]
            theirs = read["layers_output", layer][0][own]
            close(mine[: len(theirs)] if theirs.dim() > 1 else mine, theirs)
            mine = collected["attention_queries", layer][i]
            theirs = read["attention_queries", layer][0][own]
            close(mine[: len(theirs)] if theirs.dim() > 2 else mine, theirs)


def test_collecting_while_generating(model, reference):
    collected = model.collect(GIVEN, ["layers_output", "next_token_probs"], max_new_tokens=NEW, ignore_eos=True)
    assert collected.generated.tolist() == reference["greedy"]
    assert collected["next_token_probs"].argmax(-1).tolist() == reference["greedy"]
    whole = [ids + new for ids, new in zip(GIVEN, reference["greedy"], strict=True)]
    again = model.collect(whole, "layers_output")["layers_output"]
    for i, ids in enumerate(GIVEN):
        span = slice(len(ids) - 1, len(ids) - 1 + NEW)
        close(collected["layers_output"][:, i], again[:, i, span])


def test_prompts_that_generate_fewer_tokens_are_filled_up(model, reference):
    whole = model.collect(GIVEN, "layers_output", max_new_tokens=NEW, ignore_eos=True)
    last = reference["greedy"][0][1]  # the first prompt ends after two tokens, if not one
    ended = [new[: new.index(last) + 1] if last in new else new for new in reference["greedy"]]
    made = model.collect(GIVEN, "layers_output", max_new_tokens=NEW, ignore_eos=True, stop_token_ids=[last])
    longest = max(map(len, ended))
    assert made.generated.tolist() == [new + [-1] * (longest - len(new)) for new in ended]
    assert made.mask.tolist() == [[True] * len(new) + [False] * (longest - len(new)) for new in ended]
    for i, new in enumerate(ended):
        close(made["layers_output"][:, i, : len(new)], whole["layers_output"][:, i, : len(new)])
        assert not made["layers_output"][:, i, len(new) :].any()


def test_an_error_in_the_engine_leaves_nothing_behind(model, reference):
    with pytest.raises(ShapeError):
        model.steering(torch.zeros(3), 1).__enter__()
    with pytest.raises(Unavailable, match=r"mixture|fused|does not serve"):
        model.collect(GIVEN, "router_logits")
    with pytest.raises(Unavailable, match=r"with model\.steering"), model.trace(GIVEN[0], max_new_tokens=3):
        model.steer(1, reference["vector"])
    with pytest.raises(ValueError, match=r"exactly one prompt|Multiple prompts"), model.trace(GIVEN):
        model.logits.save()
    with pytest.raises(IndexError):
        model.collect(GIVEN, "layers_output", positions=50)
    with pytest.raises(Unavailable, match="inference mode"):
        model.gradients(GIVEN, lambda logits: logits.sum(), "layers_output")
    with pytest.raises(Unavailable, match="StandardizedTransformer"):
        model.prepare()
    with pytest.raises(Unavailable, match="indexed by one number"):
        model.place("layers_output", (0, 1))
    assert not model._installed_edits
    close(model.collect(GIVEN, "logits", positions=-1)["logits"][0], reference["logits"][0][-1])


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"tensor_parallel_size": 2}, "several devices"),
        ({"pipeline_parallel_size": 2}, "several devices"),
        ({"data_parallel_size": 2}, "several devices"),
        ({"mode": "async"}, "nnsight"),
        ({"taps": ["model.layers.*.output"]}, "few places"),
        ({"enable_prefix_caching": True}, "would be missing"),
        ({"enable_chunked_prefill": True}, "in pieces"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "no one next token"),
    ],
)
def test_engines_whose_values_would_be_wrong_are_refused_before_they_start(folder, option, match):
    with pytest.raises(Unavailable, match=match):
        StandardizedVLLM(folder, dtype="float32", **option)


def test_methods_that_need_the_weights_or_a_padded_batch_say_what_to_use(model):
    for name in ("scan", "each_step", "get_topk_closest_tokens"):
        with pytest.raises(Unavailable, match="not there on vLLM"):
            getattr(model, name)()
    width = model.hidden_size
    nothing = torch.zeros(width)
    dictionary = nnterp.Dictionary(torch.eye(width), nothing, torch.eye(width), nothing, Activation())
    with pytest.raises(Unavailable, match="Dictionaries are attached to StandardizedTransformer"):
        nnterp.attach(model, dictionary, at="layers_output[1]")


def test_numbers_that_nothing_has_proven_say_so(model):
    model.certificate, model._warned = None, False
    with pytest.warns(UnprovenWarning, match="validate"):
        model.collect(GIVEN, "logits", positions=-1)


def test_several_steps_given_to_the_trace_or_to_an_invoke(model, reference):
    with pytest.raises(Unavailable, match=r"with model\.steering"), model.trace(max_new_tokens=3) as tracer:  # noqa: SIM117
        with tracer.invoke(GIVEN[0]):
            model.steer(1, reference["vector"])
    with model.trace(GIVEN[0], max_new_tokens=NEW, ignore_eos=True) as tracer:
        tokens = []
        tokens.save()
        for _ in tracer.iter[:NEW]:
            tokens.append(model.next_token_logits.argmax(-1).item())
    assert tokens == reference["greedy"][0]


def test_the_certificate_proves_every_value_and_is_kept_on_disk(model, monkeypatch, tmp_path):
    monkeypatch.setenv("NNTERP_CACHE", str(tmp_path))
    certificate = model.validate()
    assert certificate.ok, certificate.failures
    assert {"layers_output", "layers_mid", "attention_keys", "logits", "token_embeddings"} <= model.proven
    assert certificate.lines[-1].status == "passed"
    model.certificate, model.proven = None, frozenset()
    assert recall(model)
    assert model.certificate == certificate
    assert "layers_output" in model.proven
    monkeypatch.setitem(model.dispatch_options, "max_model_len", 64)
    assert not recall(model)


def test_a_value_that_differs_is_served_no_more(model, monkeypatch):
    """The attention's input, read from before the norm."""
    if model.model_class != "GPT2LMHeadModel":
        pytest.skip("tried on one model, because it runs a process")
    before = model.structure
    wrong = {**before.layers, "attentions_input": before.layers["layers_input"]}
    monkeypatch.setattr(model, "structure", type(before)(before.whole, wrong))
    certificate = model.validate()
    assert not certificate.ok
    assert model.proven >= {"layers_input", "attentions_output"}
    assert "attentions_input" not in model.proven
    with pytest.raises(Unavailable, match="differs from HuggingFace's"):
        model.place("attentions_input", 0)
    model.served = before
