"""`collect` of logits and next-token probabilities, against HuggingFace's forward pass of each prompt alone."""

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.collection import Collected
from nnterp.testing import tiny_model, tiny_tokenizer

ROWS = [[11, 42, 57, 93, 130], [60, 77, 101], [9, 12, 31, 40, 8, 33, 21], [60, 78, 101]]
TYPES = ["llama", "gpt2", "gemma2", "cohere", "opt", "mamba"]


@pytest.fixture(params=TYPES)
def model(request):
    return StandardizedTransformer(tiny_model(request.param), tokenizer=tiny_tokenizer())


@torch.no_grad()
def logits_of(model):
    return [model._module(torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_logits_and_probabilities(model, batch_size, tmp_path):
    expected = logits_of(model)
    options = {"batch_size": batch_size, "progress": False}
    found = model.collect(ROWS, ["logits", "next_token_probs", "layers_output[0]"], **options)
    assert found["logits"].shape == (4, 7, model.vocab_size)
    assert found["next_token_probs"].shape == (4, model.vocab_size)
    for i, logits in enumerate(expected):
        close(found["logits"][i][found.mask[i]], logits)
        assert not found["logits"][i][~found.mask[i]].any()
        close(found["next_token_probs"][i], logits[-1].softmax(-1))
    some = model.collect(ROWS, ["next_token_probs", "logits"], positions=[0, -1], layers=[1], **options)
    assert some["logits"].shape == (4, 2, model.vocab_size)
    assert some["logits"].untyped_storage().nbytes() == some["logits"].numel() * some["logits"].element_size()
    last = model.collect(ROWS, "logits", positions=-1, **options)
    for i, logits in enumerate(expected):
        close(some["logits"][i], logits[[0, -1]])
        close(some["next_token_probs"][i], logits[-1].softmax(-1))
        close(last["logits"][i], logits[-1])
    some.save(tmp_path / "some")
    again = Collected.load(tmp_path / "some")
    assert torch.equal(again["logits"], some["logits"])
    assert torch.equal(again["next_token_probs"], some["next_token_probs"])


def test_reduced(model):
    expected = logits_of(model)
    ends = torch.stack([logits[-1].softmax(-1) for logits in expected])
    for batch_size in (2, 16):
        options = {"batch_size": batch_size, "progress": False}
        mean = model.collect(ROWS, ["logits", "next_token_probs"], reduce="mean", **options)
        close(mean["logits"], torch.cat(expected).mean(0))
        close(mean["next_token_probs"], ends.mean(0))
        top = model.collect(ROWS, ["logits", "next_token_probs"], reduce=lambda t: t.amax(-1), **options)
        close(top["next_token_probs"], ends.amax(-1))
        for i, logits in enumerate(expected):
            close(top["logits"][i][: len(logits)], logits.amax(-1))


def test_over_a_generation():
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    found = model.collect(
        ROWS, ["logits", "next_token_probs"], max_new_tokens=3, do_sample=False, pad_token_id=0, progress=False
    )
    for i, row in enumerate(ROWS):
        made = found.generated[i][found.mask[i]].tolist()
        with torch.no_grad():
            logits = model._module(torch.tensor([row + made])).logits[0, len(row) - 1 : -1]
        close(found["logits"][i][: len(made)], logits)
        close(found["next_token_probs"][i][: len(made)], logits.softmax(-1))


def test_errors():
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="logit"):
        model.collect(ROWS, "logits[1]")
    with pytest.raises(KeyError, match="was not collected"):
        model.collect(ROWS, "layers_output", progress=False)["logits"]
    with pytest.raises(ValueError, match="no value called 'logits'"):
        model.gradients(ROWS, lambda logits: logits.sum(), "logits")
