"""What a prompt gives never depends on the prompts that run beside it: every function, architecture and rotary kind.

Prompts are drawn around the lengths at which a model's code decides something for the whole batch. Each result is
compared with that of the prompt alone, and the prompt alone with HuggingFace's own forward pass.
"""

import random
import zlib

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import PaddingError, Unavailable
from nnterp.interventions import (
    Component,
    TargetPrompt,
    ablate,
    activation_patching,
    logit_lens,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    path_patching,
)
from nnterp.nnsight_utils import collect_token_activations_batched, compute_next_token_probs, get_token_activations
from nnterp.prompts import Prompt, next_token_probs, run_prompts
from nnterp.testing import tiny_model, tiny_tokenizer

THRESHOLD = 16
ROTARY = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": THRESHOLD},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": THRESHOLD,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": THRESHOLD},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
ARCHITECTURES = (
    *("gpt2", "llama", "gemma2", "gemma3_text", "bloom", "mpt", "falcon", "opt", "qwen3_moe", "mixtral"),
    *("jamba", "mamba2", "rwkv", "falcon_h1", "deepseek_v32", "deepseek_v4", "phi3", "cpmant", "xlnet", "roberta"),
    *("granitemoehybrid", "recurrent_gemma", "qwen3_next", "doge"),
)

NO_STEPS = ("deepseek_v4", "xlnet")  # steps of a generation have no one state for each token


def rotary_model(kind: str) -> StandardizedTransformer:
    parameters = {"rope_theta": 1e4, **ROTARY[kind]}
    model_type, more = "llama", {}
    if kind == "longrope":
        model_type = "phi3"
        config = tiny_model("phi3").config
        half = config.hidden_size // config.num_attention_heads // 2
        more = {"original_max_position_embeddings": THRESHOLD}
        parameters |= {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "partial_rotary_factor": 1.0}
    longest = THRESHOLD if kind == "dynamic" else 4 * THRESHOLD
    module = tiny_model(model_type, rope_parameters=parameters, max_position_embeddings=longest, **more)
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer())


def drawn(name: str, lengths: tuple[int, ...]) -> list[list[int]]:
    draw = random.Random(zlib.crc32(name.encode()))
    return [[draw.randrange(10, 400) for _ in range(length)] for length in lengths]


def metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, 5::7].float()).sum(-1)


def other(row: list[int]) -> list[int]:
    """A prompt of the same length."""
    return [(token * 7 + 3) % 389 + 10 for token in row]


def split(tensor: torch.Tensor, axis: int) -> list[torch.Tensor]:
    return list(tensor.unbind(axis))


# Each: what a function gives of prompts, as a list with one tensor for each.
def lens(model, rows):
    return split(logit_lens(model, rows), 0)


def lens_of_targets(model, rows):
    return split(logit_lens(model, rows, targets=[[[11], [12, 13]]] * len(rows)), 0)


def last_states(model, rows):
    return split(model.collect(rows, "layers_output", positions=-1)["layers_output"], 1)


def all_states(model, rows):
    found = model.collect(rows, "layers_output")
    states, mask = found["layers_output"], found.mask
    return [states[:, i, mask[i]] for i in range(len(rows))]


def sums(model, rows):
    return [model.collect(rows, "layers_output", reduce="sum")["layers_output"]]


def gradients(model, rows):
    found = model.gradients(rows, lambda logits: metric(logits[:, -1]).sum(), "layers_input")["layers_input"]
    return [found[:, i, -len(row) :] for i, row in enumerate(rows)]


def patching(model, rows):
    scores = activation_patching(model, [other(r) for r in rows], rows, metric, layers=[0, -1], positions=[0, -1])
    return split(scores["scores"], 0)


def ablation(model, rows):
    what = [Component("mlps_output", 1), Component("layers_output", 0, positions=-1)]
    return split(ablate(model, rows, what, "zero", metric)["scores"], 0)


def paths(model, rows):
    sender = [Component("mlps_output", 0)]
    found = path_patching(model, [other(r) for r in rows], rows, sender, "logits", metric)
    return split(found["scores"], 0)


def patchscope(model, rows):
    target = TargetPrompt("A cat sat", 1)
    return split(patchscope_lens(model, rows, target), 0)


def attention_patchscope(model, rows):
    return split(patch_object_attn_lens(model, rows, ["A cat sat"] * len(rows), 1, num_patches=2), 0)


def written(model, rows):
    found = patchscope_generate(model, rows, TargetPrompt("A cat sat", 1), max_new_tokens=3, layers=[1])
    return split(found[1][:, :3].float(), 0)


def generated(model, rows):
    found = model.collect(rows, "layers_output", layers=[-1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    return [found["layers_output"][0, i][found.mask[i]] for i in range(len(rows))]


def first_tokens(model, rows):
    prompts = [Prompt(row, {"a": [11, 12], "b": [13]}) for row in rows]
    found = run_prompts(model, prompts, progress=False)
    return [torch.stack([found["a"][i], found["b"][i]]) for i in range(len(rows))]


def sequences(model, rows):
    prompts = [Prompt(row, {"a": [11], "b": [13]}, {"a": ["a city", "the river"], "b": "a"}) for row in rows]
    found = run_prompts(model, prompts, scoring="sequence", progress=False)
    return [torch.stack([found["a"][i], found["b"][i]]) for i in range(len(rows))]


def probabilities(model, rows):
    return split(next_token_probs(model, rows), 0)


def older_states(model, rows):
    return split(get_token_activations(model, rows, idx=-1), 1)


def older_batches(model, rows):
    return split(collect_token_activations_batched(model, rows, batch_size=3, idx=-1), 1)


def older_probabilities(model, rows):
    return split(compute_next_token_probs(model, rows), 0)


FUNCTIONS = (
    *(lens, lens_of_targets, last_states, all_states, sums, gradients, patching, ablation, paths, patchscope),
    *(attention_patchscope, written, generated, first_tokens, sequences, probabilities),
    *(older_states, older_batches, older_probabilities),
)
REFUSING = (gradients, older_states, older_probabilities)  # one batch: refused where rows may not share one


def compare(model, name, function, lengths):
    rows = drawn(name, lengths)
    alone = [function(model, [row]) for row in rows]
    try:
        together = function(model, rows)
    except PaddingError:
        assert function in REFUSING or function.__name__.startswith("older")
        assert len({model.sharing.side(length) for length in lengths}) > 1
        return
    # A sum over prompts is the sum of the prompts' sums.
    expected = [torch.stack([one for (one,) in alone]).sum(0)] if function is sums else [one for (one,) in alone]
    assert len(together) == len(expected)
    for found, one in zip(together, expected, strict=True):
        scale = one.abs().max().clamp(min=1e-3)
        assert found.shape == one.shape
        torch.testing.assert_close(found / scale, one / scale, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def rotary():
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = rotary_model(kind)
        return made[kind]

    return get


SWITCHED = (
    "dynamic",
    "longrope",
)  # by the longest row of a batch; the others treat each row as it is, one like another


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in SWITCHED)) for k in ROTARY])
def test_every_rotary_kind(rotary, kind, function):
    model = rotary(kind)
    compare(model, kind, function, (5, 30, THRESHOLD, THRESHOLD + 1, 9))


@pytest.mark.parametrize("kind", ROTARY)
def test_alone_is_huggingfaces(rotary, kind):
    model = rotary(kind)
    for row in drawn(kind, (5, 30, THRESHOLD, THRESHOLD + 1, 9)):
        fresh = rotary_model(kind)._module if kind == "dynamic" else model._module
        with torch.no_grad():
            expected = fresh(input_ids=torch.tensor([row])).logits[0, -1].softmax(-1)
        torch.testing.assert_close(logit_lens(model, [row])[0, -1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_batch_across_the_threshold_is_refused_in_a_trace(rotary, kind):
    model = rotary(kind)
    short, long = drawn(kind, (6, THRESHOLD + 4))
    with pytest.raises(PaddingError, match="16"), model.trace([short, long]):
        pass
    with torch.no_grad(), model.trace([short, short[:3]]):  # on one side
        logits = model.logits[:, -1].save()
    with torch.no_grad():
        torch.testing.assert_close(
            logits[1], model._module(input_ids=torch.tensor([short[:3]])).logits[0, -1], rtol=1e-3, atol=1e-3
        )
    with pytest.raises(PaddingError, match="generate"), model.generate([short, short[:3]], max_new_tokens=THRESHOLD):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture(tiny, model_type, function):
    model = tiny(model_type)
    if function is paths and model_type in ("mamba2", "roberta"):
        return
    draw = random.Random(zlib.crc32(f"{model_type} {function.__name__}".encode()))
    lengths = tuple(draw.randrange(3, 14) for _ in range(5))
    try:
        compare(model, f"{model_type} {function.__name__}", function, lengths)
    except (Unavailable, ValueError) as refused:  # refused in words: several streams, tokens of its own in each step
        if not isinstance(refused, Unavailable) and not (function is generated and model_type in NO_STEPS):
            raise
        pytest.skip(str(refused)[:150])
