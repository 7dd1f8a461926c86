"""First tokens of words, against where the word's first letter is found in a text."""

import warnings

import pytest

from nnterp.prompts import (
    CollisionError,
    Prompt,
    SharedTokenWarning,
    TokenizationError,
    get_first_tokens,
    shared_first_tokens,
)

WORDS = ["Paris", "Rome", "London", "capital", "New York", "drink", "is", "5", "."]


def holder(tokenizer, text, index):
    """Id of the token that stands for the character at `index`, and whether a space of its own comes before it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    k = next(k for k, (a, b) in enumerate(spans) if a <= index < b)
    alone = (
        k > 0
        and text[slice(*spans[k - 1])].strip() == ""
        and tokenizer.convert_ids_to_tokens(ids[k - 1]).strip("▁Ġ ") == ""
    )
    return ids[k], alone


def expected(tokenizer, word):
    bare, _ = holder(tokenizer, f"The city is ({word}", len("The city is ("))
    spaced, lone = holder(tokenizer, f"The city is {word}", len("The city is "))
    return {bare} if lone else {bare, spaced}


@pytest.mark.parametrize("word", WORDS)
def test_first_tokens_are_those_inside_a_text(tokenizer_kind, tokenizer_of_kind, word):
    tokenizer = tokenizer_of_kind(tokenizer_kind)
    found = get_first_tokens(word, tokenizer)
    assert set(found) == expected(tokenizer, word)
    assert len(found) == len(set(found))
    for token in found:
        assert tokenizer.convert_ids_to_tokens(token).strip("▁Ġ ") != "", "a lone space"


def test_kinds_differ_as_they_should(tokenizer_of_kind):
    def names(kind, word):
        tokenizer = tokenizer_of_kind(kind)
        return tokenizer.convert_ids_to_tokens(get_first_tokens(word, tokenizer))

    assert names("byte_level", "Paris") == names("byte_level_prefix", "Paris") == ["Paris", "ĠParis"]
    for kind in ("unigram_prefix", "unigram_prefix_first", "unigram_bare", "byte_fallback"):
        assert names(kind, "Paris") == ["Paris", "▁Paris"]
    assert names("word_piece", "Paris") == ["paris"]
    assert names("word_piece", "New York") == ["new"]
    assert names("byte_fallback", "東京") == ["<0xE6>"]
    assert names("chat", "Eiffel Tower") == ["Eiffel Tower"]
    assert names("byte_level", " Paris") == ["ĠParis"], "a word that brings its space is taken as written"
    assert names("byte_level", "\n") == ["Ċ"]


def test_words_keep_their_order_and_tokens_are_not_repeated(tokenizer_of_kind):
    tokenizer = tokenizer_of_kind("byte_level")
    paris, rome = get_first_tokens("Paris", tokenizer), get_first_tokens("Rome", tokenizer)
    assert get_first_tokens(["Rome", "Paris", "Rome"], tokenizer) == rome + paris


def test_hacky_implementation_is_the_word_after_other_text(tokenizer_of_kind):
    for kind in ("byte_level", "byte_level_prefix"):
        tokenizer = tokenizer_of_kind(kind)
        assert tokenizer.convert_ids_to_tokens(get_first_tokens("Paris", tokenizer, True)) == ["Paris"]


@pytest.mark.parametrize("word", ["", " ", "   "])
def test_an_empty_word_is_refused(tokenizer_of_kind, word):
    with pytest.raises(TokenizationError, match="empty"):
        get_first_tokens(["Paris", word], tokenizer_of_kind("byte_level"))


def test_a_word_without_tokens_is_refused(tokenizer_of_kind):
    with pytest.raises(TokenizationError, match="no first token"):
        get_first_tokens("\u200b", tokenizer_of_kind("word_piece"))


@pytest.mark.parametrize("kind", ["word_piece", "unigram_prefix", "unigram_bare"])
def test_a_word_the_tokenizer_does_not_know_is_refused(tokenizer_of_kind, kind):
    with pytest.raises(TokenizationError, match="does not know it"):
        get_first_tokens("東京", tokenizer_of_kind(kind))


def test_not_a_tokenizer():
    with pytest.raises(TypeError, match="A tokenizer or a model"):
        get_first_tokens("Paris", object())


def test_words_that_share_a_token_are_reported(tokenizer_of_kind):
    tokenizer = tokenizer_of_kind("byte_level")
    with pytest.warns(SharedTokenWarning, match="'Paris', 'Parisian' by 'Paris'"):
        get_first_tokens(["Paris", "Parisian"], tokenizer)
    shared = shared_first_tokens(["Paris", "Parisian", "Rome"], tokenizer)
    assert list(shared.values()) == [["Paris", "Parisian"]] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_first_tokens(["Paris", "Rome"], tokenizer)


def test_prompt_from_strings(tokenizer_of_kind, model_with):
    tokenizer = tokenizer_of_kind("byte_level")
    paris = get_first_tokens("Paris", tokenizer)
    for targets in ("Paris", ["Paris"]):
        prompt = Prompt.from_strings("The capital is", targets, tokenizer)
        assert prompt.target_tokens == {"target": paris}
        assert prompt.target_strings == {"target": targets}
    cities = {"target": "Paris", "other": ["Rome", "Madrid"]}
    prompt = Prompt.from_strings("The capital is", cities, model_with("gpt2", "byte_level"))
    assert prompt.target_strings == cities
    assert prompt.prompt == "The capital is"
    assert prompt.target_tokens["other"] == get_first_tokens(["Rome", "Madrid"], tokenizer)


def test_prompt_from_bad_strings(tokenizer_of_kind):
    tokenizer = tokenizer_of_kind("byte_level")
    with pytest.raises(ValueError, match="'other' is empty"):
        Prompt.from_strings("x", {"target": "Paris", "other": []}, tokenizer)
    with pytest.raises(TokenizationError, match="empty"):
        Prompt.from_strings("x", {"target": "Paris", "other": ""}, tokenizer)
    with pytest.raises(TypeError, match="words are texts"):
        Prompt.from_strings("x", [3], tokenizer)


def test_collisions(tokenizer_of_kind):
    tokenizer = tokenizer_of_kind("byte_level")
    targets = {"a": "Paris", "b": "Parisian", "c": "Rome"}
    with pytest.warns(SharedTokenWarning, match="'a', 'b' share 'Paris'"):
        prompt = Prompt.from_strings("x", targets, tokenizer)
    assert not prompt.has_no_collisions()
    assert prompt.has_no_collisions("a")
    assert prompt.has_no_collisions(["b"])
    assert not prompt.has_no_collisions(["c"])
    assert list(prompt.collisions().values()) == [["a", "b"]] * 2
    assert not prompt.collisions("b")
    with pytest.raises(CollisionError, match="'a', 'b' share 'Paris'"):
        Prompt.from_strings("x", targets, tokenizer, distinct=True)
    assert not Prompt("x", {"a": [1, 1]}).has_no_collisions()
    assert Prompt("x", {"a": [1], "b": [2]}).has_no_collisions()
