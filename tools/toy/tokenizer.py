"""The byte-level BPE tokenizer of the toy model.

Merges are learnt on bare words first, and only then on a space followed by a whole word. A word is thus cut
into the same pieces with and without a space before it ("river" and " river"), which keeps the vocabulary
small and makes copying a word across that difference learnable for words of several pieces as well.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import corpus

END_OF_TEXT = "<|endoftext|>"
SPACE = "Ġ"  # how byte-level BPE writes a space
SAMPLE_DOCUMENTS = 30_000
MIN_COUNT = 60  # words at least this frequent in the sample are kept whole too
MAX_LETTER_MERGES = 4_000

# Line breaks and digits stand alone; letters and other signs take the space before them along.
_SPLIT = r"\n| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|[^\S\n]+(?!\S)|\s"


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _words_to_keep(seed: int) -> Counter[str]:
    sample = itertools.islice(corpus.documents(seed), SAMPLE_DOCUMENTS)
    counts = Counter(word for text in sample for word in re.findall(r"[A-Za-z]+", text))
    keep = set(corpus.whole_words()) | {word for word, count in counts.items() if count >= MIN_COUNT}
    return Counter({word: counts[word] for word in keep if re.fullmatch(r"[A-Za-z]+", word)})


def _letter_merges(keep: Counter[str]) -> list[tuple[str, str]]:
    """Merges that make every word of ``keep`` one token: BPE run until no word is left in pieces."""
    trainer = trainers.BpeTrainer(vocab_size=MAX_LETTER_MERGES, min_frequency=1, show_progress=False)
    learner = Tokenizer(models.BPE())
    # Equal counts: a rare capital deserves its own token as much as a frequent verb.
    learner.train_from_iterator(sorted(keep), trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from the corpus; the same seed gives the same tokenizer."""
    keep = _words_to_keep(seed)
    merges = _letter_merges(keep)
    letters = [chr(code) for code in (*range(65, 91), *range(97, 123))]
    digits = [str(digit) for digit in range(10)]
    signs = list("?!*#@&%+=/_:|-\"'.,;()")
    merges += [(SPACE, token) for token in (*sorted(keep), *letters, *digits, *signs) if (SPACE, token) not in merges]
    merges += [("-", ">"), (SPACE + "-", ">"), ('"', "."), ('"', ":")]

    vocabulary = {END_OF_TEXT: 0}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
