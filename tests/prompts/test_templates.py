"""Prompts out of tables, pairs out of rows, and the report of how they tokenize."""

import json
import warnings

import pandas as pd
import pytest
import torch

from nnterp.prompts import (
    CollisionError,
    Prompt,
    PromptPair,
    SharedTokenWarning,
    TokenizationError,
    get_first_tokens,
    pairs_from_table,
    prompts_from_table,
    read_table,
    run_prompts,
    tokenization_report,
)

ROWS = [
    {"country": "France", "capital": "Paris", "wrong": "London"},
    {"country": "Italy", "capital": "Rome", "wrong": "Madrid"},
    {"country": "Japan", "capital": "Tokyo", "wrong": "Rome"},
]
TEMPLATE = "The capital of {country} is"


@pytest.fixture
def tokenizer(tokenizer_of_kind):
    return tokenizer_of_kind("byte_level")


def test_one_prompt_per_row(tokenizer):
    prompts = prompts_from_table(
        TEMPLATE, ROWS, {"target": "{capital}", "other": ["{wrong}", "New {country}"]}, tokenizer
    )
    assert [p.prompt for p in prompts] == [
        "The capital of France is",
        "The capital of Italy is",
        "The capital of Japan is",
    ]
    assert prompts[1].target_strings == {"target": ["Rome"], "other": ["Madrid", "New Italy"]}
    assert prompts[1].target_tokens["other"] == get_first_tokens(["Madrid", "New"], tokenizer)
    assert prompts[2].metadata == ROWS[2]
    single = prompts_from_table(TEMPLATE, ROWS, "{capital}", tokenizer)
    assert [p.target_strings for p in single] == [{"target": [row["capital"]]} for row in ROWS]


def test_the_same_from_every_kind_of_table(tokenizer, tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "t.json", orient="records")
    expected = prompts_from_table(TEMPLATE, ROWS, "{capital}", tokenizer)
    for table in (frame, tmp_path / "t.csv", str(tmp_path / "t.jsonl"), tmp_path / "t.json", iter(ROWS)):
        assert prompts_from_table(TEMPLATE, table, "{capital}", tokenizer) == expected


def test_lists_in_a_column_are_several_answers(tokenizer):
    rows = [{"q": "x", "answers": ["Paris", "Rome"]}]
    [prompt] = prompts_from_table("{q}", rows, {"target": "{answers}"}, tokenizer)
    assert prompt.target_strings == {"target": ["Paris", "Rome"]}


def test_chat_templates(tokenizer_of_kind, model_with):
    tokenizer, model = tokenizer_of_kind("chat"), model_with("llama", "chat")
    [prompt, *_] = prompts_from_table(TEMPLATE, ROWS, "{capital}", tokenizer, chat=True)
    assert prompt.prompt == [{"role": "user", "content": "The capital of France is"}]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": TEMPLATE}]
    made = prompts_from_table(messages, ROWS, "{capital}", tokenizer)
    assert made[1].prompt == [messages[0], {"role": "user", "content": "The capital of Italy is"}]
    texts = run_prompts(model, made, tqdm=None).texts
    assert texts[1] == "<|system|>\nBe short.<|end|>\n<|user|>\nThe capital of Italy is<|end|>\n<|assistant|>\n"
    report = tokenization_report(made, tokenizer)
    assert report.prompts[1].text == texts[1]
    assert report.lengths[1] == len(tokenizer(texts[1], add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match="no chat template"):
        prompts_from_table(TEMPLATE, ROWS, "{capital}", tokenizer_of_kind("byte_level"), chat=True)


def test_bad_tables(tokenizer, tmp_path):
    def refused(template, table, targets, match, error=ValueError):
        with pytest.raises(error, match=match):
            prompts_from_table(template, table, targets, tokenizer)

    refused(TEMPLATE, [], "{capital}", "no rows")
    refused("The {river} is", ROWS, "{capital}", "'river'; row 0 of the table has: 'country', 'capital', 'wrong'")
    refused(TEMPLATE, ROWS, "{river}", "'river'")
    refused(TEMPLATE, [*ROWS, {"country": "Spain"}], "{capital}", "'capital'; row 3")
    refused(TEMPLATE, [*ROWS, {"country": "Spain", "capital": ""}], "{capital}", "empty in row 3")
    refused(TEMPLATE, pd.DataFrame([*ROWS, {"country": "Spain"}]), "{capital}", "empty in row 3")
    refused(TEMPLATE, [{"country": "x", "capital": []}], "{capital}", "empty")
    refused(TEMPLATE, ROWS, {}, "targets is empty")
    refused(TEMPLATE, ROWS, "  ", "only spaces", TokenizationError)
    refused(TEMPLATE, 3, "{capital}", "A table is", TypeError)
    refused(TEMPLATE, ["row"], "{capital}", "not a dict", TypeError)
    (tmp_path / "t.csv").write_text("country,capital\nFrance,Paris,more\n")
    refused(TEMPLATE, tmp_path / "t.csv", "{capital}", "more columns")
    (tmp_path / "t.csv").write_text("country,capital\nFrance\n")
    refused(TEMPLATE, tmp_path / "t.csv", "{capital}", "fewer columns")
    (tmp_path / "t.jsonl").write_text(json.dumps(ROWS[0]) + "\n{no\n")
    refused(TEMPLATE, tmp_path / "t.jsonl", "{capital}", "line 2")
    (tmp_path / "t.json").write_text("{}")
    refused(TEMPLATE, tmp_path / "t.json", "{capital}", "list of objects")
    refused(TEMPLATE, tmp_path / "t.xlsx", "{capital}", "csv, .jsonl")
    refused(TEMPLATE, tmp_path / "none.csv", "{capital}", "none.csv", FileNotFoundError)
    assert read_table(ROWS)[0] == ROWS[0]


def test_collisions_are_counted_or_refused(tokenizer):
    rows = [*ROWS, {"country": "x", "capital": "Paris", "wrong": "Parisian"}]
    targets = {"target": "{capital}", "other": "{wrong}"}
    with pytest.warns(SharedTokenWarning, match=r"In 1 of 4 prompts .* prompt 3"):
        prompts = prompts_from_table(TEMPLATE, rows, targets, tokenizer)
    with pytest.raises(CollisionError, match="Of prompt 3"):
        prompts_from_table(TEMPLATE, rows, targets, tokenizer, distinct=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts_from_table(TEMPLATE, ROWS, targets, tokenizer, distinct=True)
    report = tokenization_report(prompts, tokenizer)
    assert report.colliding == (3,)
    assert "share 'Paris'" in str(report)


def test_pairs_by_columns_of_their_own(tokenizer):
    rows = [{**row, "other": ROWS[i - 1]["country"]} for i, row in enumerate(ROWS)]
    corrupted = {"country": "{other}", "capital": "{wrong}"}
    pairs = pairs_from_table(TEMPLATE, rows, "{capital}", tokenizer, corrupted)
    assert [p.clean.prompt for p in pairs] == [TEMPLATE.format(**row) for row in rows]
    assert [p.corrupted.prompt for p in pairs] == [TEMPLATE.format(country=row["other"]) for row in rows]
    clean, corrupted = pairs[0]
    assert clean.target_strings == corrupted.target_strings == {"clean": ["Paris"], "corrupted": ["London"]}
    assert clean.target_tokens == corrupted.target_tokens


def test_pairs_by_the_next_row_that_differs(tokenizer):
    rows = [ROWS[0], {**ROWS[0], "wrong": "x"}, ROWS[1]]
    pairs = pairs_from_table(TEMPLATE, rows, "{capital}", tokenizer, ["country", "capital"])
    assert [p.corrupted.prompt for p in pairs] == [TEMPLATE.format(country=c) for c in ("Italy", "Italy", "France")]
    assert [p.corrupted.target_strings["corrupted"] for p in pairs] == [["Rome"], ["Rome"], ["Paris"]]


def test_bad_pairs(tokenizer):
    def refused(match, corrupted, rows=ROWS, template=TEMPLATE, **kwargs):
        with pytest.raises(ValueError, match=match):
            pairs_from_table(template, rows, "{capital}", tokenizer, corrupted, **kwargs)

    refused("the corrupted prompt is the clean one", ["capital"])
    refused("same answer", ["country"])
    refused("no other row", ["country", "capital"], rows=[ROWS[0], ROWS[0]])
    refused("'river'", ["river"])
    refused("'river'", {"country": "{river}"})
    refused("corrupted is empty", [])
    rows = [ROWS[0], {"country": "the country of London", "capital": "Rome"}]
    refused("Row 0: the clean prompt has 5 tokens", ["country", "capital"], rows=rows, same_length=True)
    pairs = pairs_from_table(TEMPLATE, rows, "{capital}", tokenizer, ["country", "capital"])
    assert tokenization_report(pairs, tokenizer).unequal == (0, 1)


def test_report(tokenizer, tokenizer_of_kind, model_with):
    prompts = prompts_from_table(TEMPLATE, ROWS, {"target": "{capital}", "other": "{wrong}"}, tokenizer)
    for source in (tokenizer, model_with("gpt2", "byte_level")):
        report = tokenization_report(prompts, source)
        assert report.lengths == tuple(len(tokenizer(p.prompt)["input_ids"]) for p in prompts)
        assert report.prompts[0].tokens == ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")
        assert report.colliding == ()
        assert report.unequal is None
    names = [f"{name!r} ({tokenizer.convert_tokens_to_ids(name)})" for name in ("Paris", "ĠParis")]
    assert list(report.prompts[0].targets["target"]) == names
    frame = report.to_dataframe()
    assert len(frame) == 6
    assert frame.iloc[0].target_tokens == names
    text = str(report)
    assert text.startswith("3 prompts (")
    assert "first token: none" in text
    spaced = Prompt.from_strings("The answer is ", "Paris", tokenizer)
    assert "only a space" in str(tokenization_report([spaced], tokenizer))
    pieces = tokenizer_of_kind("word_piece")
    assert "special, '<sep>'" in str(tokenization_report([Prompt("the", {"t": [5]})], pieces))
    assert tokenization_report([Prompt([5, 6], {"t": [5]})], pieces).lengths == (2,)
    by_tensor = tokenization_report([Prompt(torch.tensor([5, 6]), {"t": [5]})], pieces)
    assert by_tensor == tokenization_report([Prompt([5, 6], {"t": [5]})], pieces)
    for mixed in ([prompts[0], PromptPair(*prompts[:2])], [PromptPair(*prompts[:2]), prompts[0]], ["a text"]):
        with pytest.raises(TypeError, match="prompts or pairs, not both"):
            tokenization_report(mixed, tokenizer)
    with pytest.raises(ValueError, match="No prompts"):
        tokenization_report([], tokenizer)


def test_pairs_run(tokenizer_of_kind, model_with):
    model = model_with("gpt2", "byte_level")
    pairs = pairs_from_table(TEMPLATE, ROWS, "{capital}", model, ["country", "capital"])
    assert isinstance(pairs[0], PromptPair)
    clean = run_prompts(model, [pair.clean for pair in pairs], tqdm=None)
    corrupted = run_prompts(model, [pair.corrupted for pair in pairs], tqdm=None)
    assert set(clean) == set(corrupted) == {"clean", "corrupted"}
    assert clean.logit_difference("clean", "corrupted").shape == (3,)
