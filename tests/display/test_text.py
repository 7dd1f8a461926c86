"""Tokens as they are shown: exact, unambiguous, never markup."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nnterp.display import TokenNames, escape, visible
from nnterp.testing import tiny_tokenizer
from nnterp.token_text import shorten, visible_bytes, width


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Paris", "·Paris"),
        ("a\n\tb", "a↵⇥b"),
        ("·", "⟨U+00B7⟩"),
        ("↵", "⟨U+21B5⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\u200b", "⟨U+200B⟩"),
        ("\r", "⟨U+000D⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("", "⟨empty⟩"),
        ("日本", "日本"),
        ("<b>", "<b>"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_visible_is_injective_over_every_short_text():
    alphabet = [" ", "·", "\n", "↵", "\t", "⇥", "⟨", "⟩", "U", "+", "0", "A", "\u00a0", "\u200b"]
    texts = [a + b + c for a in ["", *alphabet] for b in ["", *alphabet] for c in alphabet]
    assert len({visible(text) for text in set(texts)}) == len(set(texts))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b" caf\xc3\xa9", "·café"),
        (b"\xc3", "⟨C3⟩"),
        (b"\xa9x", "⟨A9⟩x"),
        (b"\xe2\x82\n", "⟨E2⟩⟨82⟩↵"),
        (b"", "⟨empty⟩"),
    ],
)
def test_visible_bytes(raw, shown):
    assert visible_bytes(raw) == shown


def test_escape_leaves_nothing_that_plotly_reads_as_markup():
    assert escape("<b>&lt;$x$</b>") == "&lt;b&gt;&amp;lt;&#36;x&#36;&lt;/b&gt;"
    assert escape("سلام 1").startswith("\u2068")
    assert escape("plain") == "plain"


def test_byte_level_tokens_read_as_their_bytes():
    tokenizer = tiny_tokenizer()
    names = TokenNames(tokenizer)
    text = " The café\n\t日本 <b>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any("⟨" in name for name in names.many(ids)), "no token of this text is a part of a character"
    # Independent of the names: the tokenizer's own decoder, where a token is whole text.
    for token, name in zip(ids, names.many(ids), strict=True):
        decoded = tokenizer.decode([token])
        if "\ufffd" not in decoded:
            assert name == visible(decoded)
    assert names(tokenizer.eos_token_id) == "<eos>"
    assert names(len(tokenizer) + 7) == f"⟨id {len(tokenizer) + 7}⟩"
    assert TokenNames(None)(5) == "⟨id 5⟩"


def fast(model, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_sentencepiece_word_and_byte_tokens():
    pieces = [("<unk>", 0.0), ("▁Paris", -1.0), ("ris", -2.0), ("<0xE2>", -3.0), ("<0x0A>", -3.0), ("▁▁", -3.0)]
    tokenizer = fast(
        models.Unigram(pieces, unk_id=0, byte_fallback=True),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    )
    assert TokenNames(tokenizer).many([1, 2, 3, 4, 5]) == ["·Paris", "ris", "⟨E2⟩", "↵", "··"]


def test_wordpiece_tokens_keep_their_hashes():
    tokenizer = fast(
        models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"), decoder=decoders.WordPiece()
    )
    assert TokenNames(tokenizer).many([1, 2]) == ["play", "##ing"]


def test_shorten_counts_wide_characters():
    assert width("日本") == 4
    assert shorten("日本語", 5) == "日本…"
    assert width(shorten("日本語", 5)) == 5
    assert shorten("short", 5) == "short"
