"""The toy checkpoint knows what its card says, on the combinations its training text leaves out.

Everything here goes through plain transformers and ``tools/toy/evaluate.py``: these tests are about the
checkpoint, and stay green or red whatever nnterp does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "packages" / "nnterp-core" / "src" / "nnterp" / "_toy"
TOOLS = ROOT / "tools" / "toy"
SIZE_LIMIT = 4 * 1024 * 1024
ACCURACY = 0.95


@pytest.fixture(scope="module")
def evaluate():
    """The evaluation module of the training tool, whose folder is on the path only while it is imported."""
    own = {path.stem for path in TOOLS.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    sys.path.insert(0, str(TOOLS))
    try:
        import evaluate as module

        yield module
    finally:
        sys.path.remove(str(TOOLS))
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def toy(evaluate):
    return evaluate.Toy(FOLDER)


def test_the_folder_is_small_enough_to_ship():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= SIZE_LIMIT


def test_it_loads_in_float32_from_float16_weights(toy):
    assert {parameter.dtype for parameter in toy.model.parameters()} == {torch.float32}
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_it_is_deep_enough_to_show_layers(toy):
    config = toy.model.config
    assert config.num_hidden_layers >= 6
    assert config.max_position_embeddings >= 512
    assert config.num_key_value_heads < config.num_attention_heads


def test_no_machine_path_is_left_in_the_folder():
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (FOLDER / name).read_text()
        assert "_name_or_path" not in text
        assert "/work" not in text
        assert "/home" not in text


@pytest.mark.parametrize("text", ["king  king\n\n1135", "Ünïcödé 漢字 🙂", ' "a" -> b\t', "The capital of France is"])
def test_any_text_survives_the_tokenizer(toy, text):
    assert toy.tokenizer.decode(toy.ids(text)) == text


def test_the_tokenizer_adds_nothing_and_pads_with_end_of_text(toy):
    tokenizer = toy.tokenizer
    assert tokenizer.convert_ids_to_tokens(toy.ids("The capital")) == ["The", "Ġcapital"]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert toy.model.config.eos_token_id == toy.model.config.pad_token_id == tokenizer.eos_token_id


def test_subjects_and_answers_are_single_tokens(evaluate, toy):
    for kind, (single, total) in evaluate.single_tokens(toy).items():
        assert single / total > 0.95, kind


def test_published_prompts_work(evaluate, toy):
    probabilities = evaluate.published_prompts(toy)
    assert min(probabilities.values()) > 0.9, probabilities


def test_facts_in_phrasings_never_seen_for_them(evaluate, toy):
    by_relation = evaluate.fact_examples()
    assert len(by_relation["capital"]) >= 60
    assert len(by_relation["language"]) >= 60
    assert len(by_relation["landmark_city"]) >= 60
    for relation, examples in by_relation.items():
        assert evaluate.accuracy(toy, examples)[0] >= ACCURACY, relation


def test_held_out_prompts_are_not_in_the_training_text(evaluate):
    text = [document for document, _ in zip(evaluate.corpus.documents(1), range(10_000), strict=False)]
    text = "\n".join(text)
    prompts = [prompt for examples in evaluate.fact_examples().values() for prompt, _ in examples]
    assert not [prompt for prompt in prompts if prompt in text]
    assert "John and Mary" not in text
    assert "1135 1135" not in text


def test_copying_items_never_seen_in_lists(evaluate, toy):
    for kind, examples in evaluate.list_examples().items():
        # The card measures 1,000 lists of each kind: 95.2 % for words, 86.1 % for made-up words, which are several
        # tokens long. A sample of 200 may lie a little below.
        least = {"word": 0.93, "made-up word": 0.80}.get(kind, ACCURACY)
        assert evaluate.accuracy(toy, examples)[0] >= least, kind


def test_indirect_objects_with_unseen_pairs_of_names(evaluate, toy):
    for order, examples in evaluate.indirect_object_examples(count=100).items():
        assert evaluate.accuracy(toy, examples)[0] >= ACCURACY, order


def test_the_tone_of_a_text_carries_on(evaluate, toy):
    for tone, share in evaluate.tone_accuracy(toy).items():
        assert share >= ACCURACY, tone


def test_a_direction_flips_the_tone(evaluate, toy):
    for row in evaluate.tone_steering(toy):
        if row["scale"] >= 2:
            assert row["pleasant"] > 0.8, row
        if row["scale"] <= -2:
            assert row["unpleasant"] > 0.8, row


def test_the_identity_prompt_reads_countries_out(evaluate, toy):
    assert evaluate.identity_readout(toy)[-1] >= 0.8


def test_the_answer_emerges_over_depth(evaluate, toy):
    lens = evaluate.logit_lens(toy, "The capital of France is", " Paris")
    assert lens[0][1] != " Paris"
    assert lens[-1][1] == " Paris"


@torch.no_grad()
def test_a_left_padded_batch_equals_single_prompts(evaluate, toy):
    prompts = [
        "The capital of France is",
        evaluate.IDENTITY_PROMPT,
        "When Mary and John went to the store, John gave a",
    ]
    batch = toy.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    together = toy.model(**batch).logits[:, -1]
    alone = torch.cat([toy.model(torch.tensor([toy.ids(prompt)])).logits[:, -1] for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_a_sentence_ends(evaluate, toy):
    assert evaluate.generate(toy, "The capital of France is", new_tokens=2) == "The capital of France is Paris."
