"""What a `get_probs_func` returns is checked: logits, log-probabilities and other shapes are no probabilities."""

import pytest
import torch

from nnterp.prompts import IncompleteRunError, Prompt, next_token_probs, run_prompts
from nnterp.testing import tiny_model

TEXTS = ["The capital of France is", "The", "Paris, Rome and"]
PROMPTS = [Prompt(text, {"a": [20, 21], "b": [30]}) for text in TEXTS]


def plain_logits(text):
    """HuggingFace's own logits after a text, `[vocab]`."""
    from nnterp.testing import tiny_tokenizer

    with torch.no_grad():
        return tiny_model("gpt2")(**tiny_tokenizer()(text, return_tensors="pt")).logits[0, -1].float()


def function_of(readout, layers=False):
    """A function for `run_prompts` that applies `readout` to HuggingFace's own logits."""

    def by_hand(model, prompts, remote=False):
        texts = [prompts] if isinstance(prompts, str) else prompts
        values = torch.stack([readout(plain_logits(text)) for text in texts])
        return values.unsqueeze(1) if layers else values

    return by_hand


def reducing(readout):
    def by_hand(model, prompts, remote=False, targets=None):
        texts = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in prompts]
        rows = [
            [readout(plain_logits(text))[ids].sum() for ids in own] for text, own in zip(texts, targets, strict=True)
        ]
        return torch.tensor(rows)

    by_hand.reduces_targets = True
    return by_hand


def softmax(logits):
    return logits.softmax(-1)


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_any_precision_pass(tiny, layers, dtype):
    function = function_of(lambda logits: softmax(logits).to(dtype), layers)
    results = run_prompts(tiny("gpt2"), PROMPTS, get_probs_func=function, tqdm=None)
    wanted = torch.stack([softmax(plain_logits(text))[[20, 21]].sum() for text in TEXTS])
    tolerance = 1e-6 if dtype.itemsize > 2 else 1e-3
    assert (results["a"].view(-1) - wanted).abs().max() < tolerance
    one = PROMPTS[0].run(tiny("gpt2"), function)
    assert (one["a"].view(-1) - wanted[:1]).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_certain_function_passes(tiny, dtype):
    """All probability on the most probable token."""
    function = function_of(lambda logits: (torch.arange(len(logits)) == logits.argmax()).to(dtype))
    top = int(plain_logits(TEXTS[0]).argmax())
    other = 20 if top != 20 else 21
    prompts = [Prompt(TEXTS[0], {"top": [top], "other": [other]})]
    results = run_prompts(tiny("gpt2"), prompts, get_probs_func=function, tqdm=None)
    assert results["top"].tolist() == [1]
    assert results["other"].tolist() == [0]


WRONG = {
    "logits": lambda logits: logits,
    "large logits": lambda logits: logits.abs() * 10 + 1,
    "log-probabilities": lambda logits: logits.log_softmax(-1),
    "not normalised": lambda logits: logits.sigmoid(),
    "half of it": lambda logits: softmax(logits) / 2,
    "negative ones": lambda logits: torch.cat((softmax(logits)[:-2], torch.tensor([-1.0, 1.0]))),
}


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("readout", WRONG.values(), ids=WRONG)
def test_what_is_no_distribution_is_refused(tiny, readout, layers):
    model, function = tiny("gpt2"), function_of(readout, layers)
    match = (
        r"'by_hand' did not return probabilities: for prompt \d.*values go from .* to .*, and they add up to .*softmax"
    )
    with pytest.raises(IncompleteRunError, match=match):
        run_prompts(model, PROMPTS, get_probs_func=function, tqdm=None)
    with pytest.raises(IncompleteRunError, match=match):
        run_prompts(
            model,
            [Prompt.from_strings(text, "Paris", model) for text in TEXTS],
            get_probs_func=function,
            scoring="sequence",
            tqdm=None,
        )
    with pytest.raises(ValueError, match=match):
        PROMPTS[0].run(model, function)


@pytest.mark.parametrize("readout", [WRONG["large logits"], WRONG["log-probabilities"]])
def test_the_same_for_functions_that_reduce(tiny, readout):
    model, function = tiny("gpt2"), reducing(readout)
    with pytest.raises(IncompleteRunError, match="did not return probabilities"):
        run_prompts(model, PROMPTS, get_probs_func=function, tqdm=None)
    with pytest.raises(ValueError, match="did not return probabilities"):
        PROMPTS[0].run(model, function)
    right = run_prompts(model, PROMPTS, get_probs_func=reducing(softmax), tqdm=None)
    assert (right["a"] - run_prompts(model, PROMPTS, tqdm=None)["a"]).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1 - 5e-4, 1 + 5e-4])
def test_rounding_is_no_error(tiny, scale):
    function = function_of(lambda logits: softmax(logits) * scale)
    results = run_prompts(tiny("gpt2"), PROMPTS, get_probs_func=function, tqdm=None)
    assert (results["a"] - run_prompts(tiny("gpt2"), PROMPTS, tqdm=None)["a"] * scale).abs().max() < 1e-6


SHAPES = {
    "no tensor": lambda probs: probs.tolist(),
    "one prompt too few": lambda probs: probs[1:],
    "no vocabulary": lambda probs: probs[:, 0],
    "four axes": lambda probs: probs[:, None, None],
    "an empty axis of layers": lambda probs: probs[:, None][:, :0],
    "complex": lambda probs: probs.to(torch.complex64),
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_other_shapes_are_refused(tiny, change):
    model = tiny("gpt2")

    def function(model, prompts, remote=False):
        return change(next_token_probs(model, prompts))

    with pytest.raises(IncompleteRunError, match=r"'function' returned .* was expected"):
        run_prompts(model, PROMPTS, get_probs_func=function, tqdm=None)
    with pytest.raises(ValueError, match=r"'function' returned .* was expected"):
        PROMPTS[0].run(model, function)
