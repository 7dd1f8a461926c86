"""The sweep against a slow loop of torch hooks: effect, damage and cost of each setting."""

import itertools
import math

import pytest
import torch

from nnterp.interventions import (
    Result,
    SteeringSweep,
    SteeringVector,
    kl_divergence,
    logit_difference,
    steering_sweep,
    target_probability,
)

PROMPTS = ["The capital of France is", "A cat", "Hello there my friend, how are"]
NEUTRAL = ["The sun is warm.", "Water"]
TEXTS = ["The king went to the river and sat down.", "A dog is here"]
FACTORS = [0.0, -1.5, 2.0]
TYPES = ("gpt2", "llama", "gemma2", "jamba", "qwen3_moe", "mamba2")
NEW = 6


def vector_for(model, layers=(0, 2)):
    generator = torch.Generator().manual_seed(4)
    return SteeringVector({layer: 3 * torch.randn(model.hidden_size, generator=generator) for layer in layers})


class Hooked:
    """The HuggingFace module alone, with a vector added to what leaves one layer."""

    def __init__(self, model, layer, shift):
        self.model, self.module = model, model._module
        self.path, self.shift = model.layer_paths[layer], shift

    def __enter__(self):
        def add(_, __, output):
            stream = output if isinstance(output, torch.Tensor) else output[0]
            new = stream + self.shift
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        self.handle = self.module.get_submodule(self.path).register_forward_hook(add)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    @torch.no_grad()
    def logits(self, text):
        return self.module(self.model.tokenizer(text, return_tensors="pt").input_ids, use_cache=False).logits[0].float()

    @torch.no_grad()
    def generated(self, text):
        ids = self.model.tokenizer(text, return_tensors="pt")
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": self.model.tokenizer.pad_token_id}
        made = self.module.generate(**ids, **settings)[0, ids.input_ids.shape[1] :].tolist()
        ends = self.module.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return made[: next((i for i, token in enumerate(made) if token in ends), len(made))]


def measured(model, layer, shift, probability_of):
    with Hooked(model, layer, torch.zeros_like(shift)) as run:
        plain = [run.logits(text).log_softmax(-1) for text in NEUTRAL]
    with Hooked(model, layer, shift) as run:
        scores = [run.logits(text)[-1].softmax(-1)[probability_of].item() for text in PROMPTS]
        steered = [run.logits(text).log_softmax(-1) for text in NEUTRAL]
        pairs = list(zip(plain, steered, strict=True))
        kl = sum((p.exp() * (p - q)).sum().item() for p, q in pairs) / sum(len(p) for p in plain)
        ids = [model.tokenizer(text).input_ids for text in TEXTS]
        logs = [run.logits(text).log_softmax(-1) for text in TEXTS]
        surprises = [-own[i - 1, row[i]].item() for own, row in zip(logs, ids, strict=True) for i in range(1, len(row))]
        made = [run.generated(text) for text in PROMPTS]
    grams = [list(itertools.pairwise(row)) for row in made]
    total = sum(map(len, grams))
    return {
        "scores": scores,
        "kl": kl,
        "perplexity": math.exp(sum(surprises) / len(surprises)),
        "repetition": 1 - sum(len(set(own)) for own in grams) / total if total else math.nan,
        "length": sum(map(len, made)) / len(made),
    }


@pytest.mark.parametrize("kind", TYPES)
def test_equals_a_slow_loop_of_hooks(tiny, kind):
    model = tiny(kind)
    vector = vector_for(model)
    damage = {"kl": NEUTRAL, "perplexity": TEXTS, "repetition": None, "length": None}
    found = steering_sweep(
        model, vector, PROMPTS, target_probability(42), factors=FACTORS, damage=damage, max_new_tokens=NEW, batch_size=3
    )
    assert (found.labels["layers"], found.labels["factors"]) == ((0, 2), tuple(FACTORS))
    plain = measured(model, 0, 0 * vector[0], 42)
    assert found["baseline"].tolist() == pytest.approx(plain["scores"], rel=2e-3, abs=1e-6)
    for name in ("perplexity", "repetition", "length"):
        assert found[f"plain_{name}"].item() == pytest.approx(plain[name], rel=1e-3, nan_ok=True)
    for i, layer in enumerate((0, 2)):
        for j, factor in enumerate(FACTORS):
            expected = measured(model, layer, factor * vector[layer], 42)
            assert found["scores"][i, j].tolist() == pytest.approx(expected["scores"], rel=2e-3, abs=1e-6)
            for name in ("kl", "perplexity", "repetition", "length"):
                assert found[name][i, j].item() == pytest.approx(expected[name], rel=2e-3, abs=2e-5, nan_ok=True), name
            effect = sum(expected["scores"]) / 3 - sum(plain["scores"]) / 3
            assert found["effect"][i, j].item() == pytest.approx(effect, rel=2e-2, abs=1e-5)
    assert found["kl"][:, 0].abs().max() < 1e-5
    assert found["kl"][:, 1:].min() > 1e-3


def test_a_setting_costs_its_forwards_and_no_more(tiny):
    model, calls = tiny("llama"), []
    handle = model._module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        vector = vector_for(model)
        steering_sweep(model, vector, PROMPTS, target_probability(42), factors=FACTORS, damage={"kl": NEUTRAL})
        assert len(calls) == 1 + 2 * len(FACTORS)  # prompts and neutral prompts share one batch
        calls.clear()
        both = {"kl": NEUTRAL, "perplexity": NEUTRAL}
        steering_sweep(model, vector, NEUTRAL, target_probability(42), factors=[1], damage=both, batch_size=2)
        assert len(calls) == 1 + 2  # the same text is run once for all that is measured of it
        calls.clear()
        steering_sweep(model, vector, PROMPTS, target_probability(42), 0, 1, "length", max_new_tokens=4, batch_size=3)
        assert len(calls) == 2 * (1 + 4)
        calls.clear()
        steering_sweep(model, vector, PROMPTS, target_probability(42), factors=[1], damage=None, batch_size=2)
        assert len(calls) == 3 * 2
    finally:
        handle.remove()


def test_every_way_to_give_vectors_and_metrics(tiny):
    model = tiny("llama")
    vector = vector_for(model)
    options = {"layers": [2, -1], "factors": [2], "damage": None}
    wide = dict.fromkeys(range(model.num_layers), vector[0])
    by_tensor = steering_sweep(model, vector[0], PROMPTS, logit_difference(42, 40), **options)
    by_mapping = steering_sweep(model, wide, PROMPTS, lambda logits: logits[:, 42] - logits[:, 40], **options)
    assert by_tensor.labels["layers"] == tuple(dict.fromkeys((2, model.num_layers - 1)))
    torch.testing.assert_close(by_tensor["scores"], by_mapping["scores"])
    divergence = steering_sweep(model, vector[0], PROMPTS, kl_divergence(), **options)
    assert divergence["baseline"].abs().max() < 1e-5
    assert divergence["effect"].min() > 0


def test_further_arguments_of_steering(tiny):
    model = tiny("llama")
    vector = vector_for(model, (1,))
    found = steering_sweep(
        model,
        vector,
        PROMPTS[0],
        target_probability(42),
        factors=[1],
        damage=None,
        mode="project_out",
        token_positions=-1,
    )
    with torch.no_grad(), model.steering(vector, 1, 1, mode="project_out", token_positions=-1), model.trace(PROMPTS[0]):
        expected = model.next_token_probs[0, 42].save()
    assert found["scores"].item() == pytest.approx(expected.item(), rel=1e-4)


def result(effect, **damage):
    tensors = {"effect": torch.tensor(effect), **{name: torch.tensor(values) for name, values in damage.items()}}
    labels = {"layers": (3, 5), "factors": (1.0, 2.0, 4.0)}
    return SteeringSweep(tensors, dict.fromkeys(tensors, ("layers", "factors")), labels)


def test_best():
    nan = float("nan")
    sweep = result(
        [[1.0, 2.0, 9.0], [3.0, -8.0, nan]],
        kl=[[0.1, 0.3, 2.0], [0.5, 0.1, 0.0]],
        repetition=[[0.0, 0.5, 0.9], [0.4, nan, 0.0]],
    )
    assert sweep.best(0.6) == {"layer": 5, "factor": 1.0, "effect": 3.0, "kl": 0.5, "repetition": pytest.approx(0.4)}
    assert sweep.best(0.3)["effect"] == 2.0
    assert sweep.best(0.2, "repetition")["effect"] == 1.0
    assert sweep.best({"kl": 10, "repetition": 0.45})["effect"] == 3.0
    assert sweep.best(float("inf"))["effect"] == 9.0
    with pytest.raises(ValueError, match=r"No setting has kl ≤ 0.01.*layer"):
        sweep.best(0.01)
    for wrong in ("perplexity", "length", "effect"):
        with pytest.raises(ValueError, match="cannot be limited"):
            sweep.best(1, wrong)


def test_an_interrupt_keeps_what_is_done(tiny, tmp_path):
    model, seen = tiny("llama"), []

    def metric(logits):
        seen.append(1)
        if len(seen) == 2 * len(PROMPTS) + 2:
            raise KeyboardInterrupt
        return logits[:, 42]

    with pytest.raises(KeyboardInterrupt) as caught:
        steering_sweep(model, vector_for(model), PROMPTS, metric, factors=FACTORS, damage={"kl": NEUTRAL})
    partial = caught.value.partial
    assert "resume=error.partial" in caught.value.__notes__[0]
    there = [[True, False, False], [False, False, False]]
    assert partial["done"].tolist() == (~partial["effect"].isnan()).tolist() == there
    partial.save(tmp_path / "partial")
    assert Result.load(tmp_path / "partial").best(1.0)["layer"] == 0
    assert model.standing == ()
    again = {"factors": FACTORS, "damage": {"kl": NEUTRAL}}
    before = len(seen)
    resumed = steering_sweep(model, vector_for(model), PROMPTS, metric, **again, resume=tmp_path / "partial")
    assert len(seen) - before == (1 + 5) * len(PROMPTS)  # without steering, and what was left
    whole = steering_sweep(model, vector_for(model), PROMPTS, metric, **again)
    for name in ("effect", "scores", "kl", "baseline"):
        assert torch.equal(resumed[name], whole[name]), name
    with pytest.raises(ValueError, match=r"Cannot resume.*factors"):
        steering_sweep(model, vector_for(model), PROMPTS, metric, factors=[1.0], damage={"kl": NEUTRAL}, resume=partial)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factors": []}, ValueError, "factors"),
        ({"factors": [1, 1.0]}, ValueError, "each once"),
        ({"factors": float("nan")}, ValueError, "finite"),
        ({"layers": []}, ValueError, "layers"),
        ({"layers": 1}, ValueError, "no vector for layer 1"),
        ({"layers": 99}, IndexError, "99"),
        ({"damage": "noise"}, ValueError, "not one of kl"),
        ({"damage": {"perplexity": [[5]]}}, ValueError, "one token"),
        ({"damage": {"length": PROMPTS, "repetition": NEUTRAL}}, ValueError, "one generation"),
        ({"damage": "length", "max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"mode": "multiply"}, ValueError, "mode="),
    ],
)
def test_refuses(tiny, options, error, message):
    model = tiny("llama")
    with pytest.raises(error, match=message):
        steering_sweep(model, vector_for(model), PROMPTS, target_probability(42), **options)


def test_a_vector_of_another_model_is_refused(tiny):
    vector = vector_for(tiny("llama"))
    with pytest.raises(ValueError, match="the/other"):
        steering_sweep(
            tiny("llama"), SteeringVector(vector.directions, model="the/other"), PROMPTS, target_probability(42)
        )
