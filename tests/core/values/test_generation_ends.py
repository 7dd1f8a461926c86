"""`collect` over a generation: where each row ends, against HuggingFace's `generate` of each row alone."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer

NEW = 8


def prompts(lengths=(7, 5, 9, 5)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, 400, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def llama():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


def plain(model, row, **settings):
    """What HuggingFace generates from one row alone."""
    return model._module.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings)[
        0, len(row) :
    ].tolist()


@pytest.fixture(scope="module")
def ends(llama):
    """Tokens at which two rows end early, at different steps."""
    free = [plain(llama, row, eos_token_id=None) for row in prompts()]
    return [free[0][2], free[1][4]]


class EndsWith(StoppingCriteria):
    """Stops a row at a token, without being an end token: HuggingFace goes on with the row in a batch."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def ways(ends):
    """Ways to say where a row ends."""
    config = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return {
        "a number": {"eos_token_id": ends[0]},
        "a list": {"eos_token_id": ends},
        "a tensor": {"eos_token_id": torch.tensor([ends[0]])},
        "a tensor of two": {"eos_token_id": torch.tensor(ends)},
        "a config": {"generation_config": GenerationConfig(eos_token_id=ends, **config)},
        "criteria": {"stopping_criteria": StoppingCriteriaList([EndsWith(ends[1])]), "eos_token_id": None},
        "criteria and an end token": {
            "stopping_criteria": StoppingCriteriaList([EndsWith(ends[1])]),
            "eos_token_id": ends[0],
        },
    }


WAYS = [*ways([0, 0])]


def collected(model, **settings):
    more = {} if "generation_config" in settings else {"do_sample": False, "pad_token_id": 0}
    return model.collect(
        prompts(), ["layers_output", "mlps_output"], layers=[1], max_new_tokens=NEW, progress=False, **more, **settings
    )


def alone(model, settings):
    """For each prompt the tokens that it generates alone, and the hidden states that predicted them."""
    found = []
    for row in prompts():
        if "generation_config" in settings:
            made = model._module.generate(torch.tensor([row]), **settings)[0, len(row) :].tolist()
        else:
            made = plain(model, row, **settings)
        with torch.no_grad():
            states = model._module(torch.tensor([row + made]), output_hidden_states=True).hidden_states[2][0]
        found.append((made, states[len(row) - 1 : len(row) - 1 + len(made)]))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch_size", [16, 2])
def test_a_row_ends_where_it_ends_alone(llama, ends, way, batch_size):
    settings = ways(ends)[way]
    got, reference = collected(llama, batch_size=batch_size, **settings), alone(llama, settings)
    lengths = {len(made) for made, _ in reference}
    assert len(lengths) > 1, "every row ends at one step, so nothing is tried"
    assert got.mask.shape == got.generated.shape == (4, max(lengths))
    for i, (made, states) in enumerate(reference):
        k = len(made)
        assert got.mask[i].tolist() == [True] * k + [False] * (max(lengths) - k)
        assert got.generated[i].tolist() == made + [-1] * (max(lengths) - k)
        assert got.positions[i] == tuple(range(len(prompts()[i]) - 1, len(prompts()[i]) - 1 + k))
        torch.testing.assert_close(got["layers_output", 1][i, :k], states, atol=1e-4, rtol=1e-4)
        assert not got["layers_output", 1][i, k:].any()


def test_the_model_s_own_config_ends_rows(llama, ends):
    before = llama._module.generation_config.eos_token_id
    llama._module.generation_config.eos_token_id = ends
    try:
        got, reference = collected(llama), alone(llama, {})
    finally:
        llama._module.generation_config.eos_token_id = before
    assert [m.sum().item() for m in got.mask] == [len(made) for made, _ in reference]


def test_stop_strings(llama, ends):
    text = llama.tokenizer.decode([ends[0]])
    settings = {"stop_strings": [text], "tokenizer": llama.tokenizer, "eos_token_id": None}
    got, reference = collected(llama, **settings), alone(llama, settings)
    assert got.mask.sum(1).tolist() == [len(made) for made, _ in reference]
    assert got.mask.sum(1).min() < NEW


def test_reduce_is_applied_to_a_row_s_own_positions(llama, ends):
    settings = {"eos_token_id": torch.tensor(ends)}
    reference = [states for _, states in alone(llama, settings)]
    mean = collected(llama, reduce="mean", batch_size=2, **settings)
    assert mean.mask is None
    torch.testing.assert_close(mean["layers_output", 1], torch.cat(reference).mean(0), atol=1e-4, rtol=1e-4)
    total = collected(llama, reduce="sum", **settings)
    torch.testing.assert_close(total["layers_output", 1], torch.cat(reference).sum(0), atol=1e-3, rtol=1e-4)
    for batch_size in (16, 1, 2):
        each = collected(llama, reduce=lambda t: t.mean(1), batch_size=batch_size, **settings)
        assert each["layers_output", 1].shape == (4, llama.hidden_size)
        expected = torch.stack([states.mean(0) for states in reference])
        torch.testing.assert_close(each["layers_output", 1], expected, atol=1e-4, rtol=1e-4)
        norms = collected(llama, reduce=lambda t: t.norm(dim=-1), batch_size=batch_size, **settings)
        for i, states in enumerate(reference):
            own = norms["layers_output", 1][i]
            torch.testing.assert_close(own[: len(states)], states.norm(dim=-1), atol=1e-3, rtol=1e-4)
            assert not own[len(states) :].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=3)},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_several_rows_for_a_prompt_are_refused(llama, settings):
    words = r"one row for each prompt, one forward pass for each token|each prompt has one answer"
    with pytest.raises(ValueError, match=words):
        llama.collect(prompts(), "layers_output", max_new_tokens=3, progress=False, pad_token_id=0, **settings)
    got = llama.collect(prompts(), "layers_output", max_new_tokens=2, progress=False, do_sample=False, pad_token_id=0)
    assert got.generated.shape == (4, 2)


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 5.0}, {"min_length": 12}, {"no_repeat_ngram_size": 1}], ids=str
)
def test_settings_that_read_padding_give_what_a_row_gives_alone(llama, ends, setting):
    settings = {"eos_token_id": ends, **setting}
    got = collected(llama, **settings)
    for i, (made, _) in enumerate(alone(llama, settings)):
        assert got.generated[i][got.mask[i]].tolist() == made


def test_the_answer_may_be_a_dict(llama, ends):
    got = collected(llama, eos_token_id=ends, return_dict_in_generate=True)
    assert torch.equal(got.generated, collected(llama, eos_token_id=ends).generated)
