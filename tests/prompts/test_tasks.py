"""Tasks: equal lengths, and answers that are the tokens with which the text goes on, for several tokenizers."""

import os
import re
from functools import cache
from pathlib import Path

import pytest

import nnterp
from nnterp.prompts import TokenizationError, run_prompts
from nnterp.prompts.tasks import capitals, greater_than, ioi

REAL = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser()


@cache
def tokenizer(name):
    from transformers import AutoTokenizer

    from nnterp.testing import tiny_tokenizer

    if name == "tiny":
        return tiny_tokenizer()
    folder = Path(nnterp.toy_checkpoint()) if name == "toy" else REAL / name
    if not folder.exists():
        pytest.skip(f"{folder} is not there: tools/real_models.py makes it")
    return AutoTokenizer.from_pretrained(folder)


def ids(tokens, text):
    return tokens(text, add_special_tokens=False)["input_ids"]


def check(tokens, task, n):
    assert len(task) == n == len(task.corrupted) == len(task.correct) == len(task.wrong)
    for clean, corrupted, correct, wrong in zip(task.clean, task.corrupted, task.correct, task.wrong, strict=True):
        assert clean != corrupted
        assert len(tokens(clean)["input_ids"]) == len(tokens(corrupted)["input_ids"])
        assert correct
        assert wrong
        assert not set(correct) & set(wrong)


@pytest.mark.parametrize("name", ["toy", "tiny", "smollm2", "gemma3"])
@pytest.mark.parametrize("corrupted", ["abc", "swap"])
def test_indirect_objects(name, corrupted):
    tokens = tokenizer(name)
    task = ioi(tokens, 20, corrupted=corrupted)
    check(tokens, task, 20)
    for clean, other, (correct,), (wrong,) in zip(task.clean, task.corrupted, task.correct, task.wrong, strict=True):
        once, twice = (tokens.decode([token]).strip() for token in (correct, wrong))
        assert len(re.findall(rf" {once}\b", clean)) == 1
        assert len(re.findall(rf" {twice}\b", clean)) == 2
        assert ids(tokens, f"{clean} {once}") == [*ids(tokens, clean), correct]
        assert len(re.findall(rf" {twice}\b", other)) == 1
        assert len(re.findall(rf" {once}\b", other)) == (1 if corrupted == "abc" else 2)
        a, b = ids(tokens, clean), ids(tokens, other)
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1
    assert ioi(tokens, 20, corrupted=corrupted) == task
    assert ioi(tokens, 20, seed=1, corrupted=corrupted) != task


@pytest.mark.parametrize("name", ["toy", "tiny", "smollm2", "gemma3"])
def test_greater_years(name):
    tokens = tokenizer(name)
    task = greater_than(tokens, 20)
    check(tokens, task, 20)
    for clean, corrupted, correct, wrong in zip(task.clean, task.corrupted, task.correct, task.wrong, strict=True):
        century, start = re.search(r"year (\d\d)(\d\d) to", clean).groups()
        assert clean.replace(century + start, f"{century}01") == corrupted
        assert clean.endswith(f"to the year {century}")
        for year in range(100):
            whole = ids(tokens, f"{clean}{year:02d}")
            assert whole[: len(ids(tokens, clean))] == ids(tokens, clean)
            token = whole[len(ids(tokens, clean))]
            assert token not in (wrong if year > int(start) else correct)
            if tokens.decode([token]) == f"{year:02d}":
                assert token in (correct if year > int(start) else wrong)


def test_years_of_one_digit_tokens_are_compared_by_decade():
    tokens = tokenizer("toy")
    task = greater_than(tokens, 10)
    for clean, correct, wrong in zip(task.clean, task.correct, task.wrong, strict=True):
        decade, unit = map(int, re.search(r"year \d\d(\d)(\d) to", clean).groups())
        assert [tokens.decode([t]) for t in correct] == [str(d) for d in range(decade + 1, 10)]
        assert [tokens.decode([t]) for t in wrong] == [str(d) for d in range(decade + (unit == 9))]


@pytest.mark.parametrize("name", ["toy", "tiny", "smollm2", "gemma3"])
def test_capitals(name):
    tokens = tokenizer(name)
    task = capitals(tokens, 12)
    check(tokens, task, 12)


def test_two_digit_years_and_merged_years(tokenizer_of_kind):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def splitting(digits):
        words = sorted({f"{i:0{n}d}" for n in (1, 2, 3) for i in range(10**n)})
        vocabulary = {word: i for i, word in enumerate(["<unk>", " ", *words])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        pattern = Regex(rf"\d{{1,{digits}}}| |[a-zA-Z]+")
        made.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")

    from tokenizers import Regex

    tokens = splitting(2)
    task = greater_than(tokens, 5)
    check(tokens, task, 5)
    for clean, correct, wrong in zip(task.clean, task.correct, task.wrong, strict=True):
        start = int(re.search(r"year \d\d(\d\d) to", clean)[1])
        assert [tokens.decode([t]) for t in correct] == [f"{year:02d}" for year in range(start + 1, 100)]
        assert [tokens.decode([t]) for t in wrong] == [f"{year:02d}" for year in range(start + 1)]
    with pytest.raises(TokenizationError, match="one or two digits of the year"):
        greater_than(splitting(3), 5)
    with pytest.raises(TokenizationError, match="at least 3 names"):
        ioi(tokens, 5)
    with pytest.raises(TokenizationError, match="capitals"):
        capitals(tokens, 5)


def test_bad_arguments():
    tokens = tokenizer("toy")
    with pytest.raises(ValueError, match="corrupted is"):
        ioi(tokens, 5, corrupted="none")
    with pytest.raises(ValueError, match="n"):
        ioi(tokens, 0)
    with pytest.raises(TokenizationError, match=r"has 1 \(Mary\)"):
        ioi(tokens, 5, names=["Mary", "Xylophonia"])


def test_the_toy_knows_objects_and_capitals(toy):
    for task, least in ((ioi(toy, 20), 0.6), (capitals(toy, 20), 0.95)):
        found = run_prompts(toy, task.prompts(), tqdm=None)
        assert (found["correct"] > found["wrong"]).float().mean() >= least
