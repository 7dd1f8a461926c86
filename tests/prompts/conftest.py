"""Tokenizers of six kinds, trained on the spot, and a lens that sums over targets inside its trace."""

import json
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nnterp.inputs import batches, encode

TEXT = (
    """The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo; Paris, Rome and
Tokyo are cities. London is not Madrid, and Madrid is not London. "Paris" is a word: Paris (Paris), =Paris, Rome (Rome),
=Rome. The Eiffel Tower is in the city of Paris. When Mary and John went to the store, John gave a drink to Mary. 1 2 3
4 5. Parma is in Italy, and Parma is not Paris. What is the opposite of hot? The opposite of hot is cold. New York, New
Delhi.
"""
    * 3
)
VOCAB = 440  # every tiny model has 509 tokens; room for bytes and special ones


def _special(names):
    return [f"<{name}>" for name in names]


def _wrap(tokenizer, **kwargs):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False, **kwargs
    )


def _byte_level(prefix=False, **kwargs):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=_special(["pad", "unk", "bos"]),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer, kwargs


def _unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB, special_tokens=_special(["pad", "unk"]), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB, special_tokens=_special(["pad", "unk", "cls", "sep"]), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 2), ("<sep>", 3)]
    )
    return tokenizer


def _byte_fallback():
    """BPE with a prefix space made by the normalizer, and bytes for unknown characters, as in Llama 2."""
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone
    specials = _special(["pad", "unk", "bos"]) + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials, show_progress=False)
    )
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    plain = Tokenizer(models.BPE(trained["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    plain.normalizer = normalizers.Sequence(spaces)
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    plain.add_special_tokens(_special(["pad", "unk", "bos"]))
    plain.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return plain


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _chat():
    tokenizer, _ = _byte_level()
    made = _wrap(tokenizer, bos_token="<bos>", chat_template=TEMPLATE)
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]})
    made.add_tokens(["Eiffel Tower"])
    return made


KINDS = {
    "byte_level": lambda: _wrap(_byte_level()[0]),
    "byte_level_prefix": lambda: _wrap(_byte_level(prefix=True)[0]),
    "unigram_prefix": lambda: _wrap(_unigram("always")),
    "unigram_prefix_first": lambda: _wrap(_unigram("first")),
    "unigram_bare": lambda: _wrap(_unigram("never")),
    "word_piece": lambda: _wrap(_word_piece(), cls_token="<cls>", sep_token="<sep>"),
    "byte_fallback": lambda: _wrap(_byte_fallback(), bos_token="<bos>"),
    "chat": _chat,
}


def pytest_generate_tests(metafunc):
    if "tokenizer_kind" in metafunc.fixturenames:
        metafunc.parametrize("tokenizer_kind", list(KINDS))


@cache
def _built(kind):
    return KINDS[kind]()


@pytest.fixture
def tokenizer_of_kind():
    """`tokenizer_of_kind("word_piece")`: trained once a worker."""
    return _built


@cache
def _model(model_type, kind):
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model

    return StandardizedTransformer(tiny_model(model_type), tokenizer=_built(kind))


@pytest.fixture
def model_with():
    """`model_with("llama", "word_piece")`: a tiny model with a tokenizer of that kind."""
    return _model


def plain_lens(model, prompts, remote=False):
    """`[prompts, layers, vocab]`, as a function of one's own for `run_prompts` would be."""
    rows = encode(model, prompts)
    out = [None] * len(rows)
    for batch in batches(model, rows, len(rows)):
        index = (torch.arange(len(batch)), batch.last)
        with torch.no_grad(), model.trace(batch.encoding):
            states = torch.stack([model.layers_output[i][index] for i in range(model.num_layers)], dim=1)
            probs = model.project_on_vocab(states).float().softmax(-1).save()
        for i, row in zip(batch.indices, probs, strict=True):
            out[i] = row
    return torch.stack(out)


def reducing_lens(model, prompts, remote=False, targets=None):
    """The same with the sum over targets inside the trace; `[prompts, layers, categories]`."""
    rows = encode(model, prompts)
    out = [None] * len(rows)
    for batch in batches(model, rows, len(rows)):
        index = (torch.arange(len(batch)), batch.last)
        wanted = [targets[i] for i in batch.indices]
        with torch.no_grad(), model.trace(batch.encoding) as tracer:
            states = torch.stack([model.layers_output[i][index] for i in range(model.num_layers)], dim=1)
            probs = model.project_on_vocab(states).float().softmax(-1)
            pairs = zip(probs, wanted, strict=True)
            sums = [torch.stack([row[:, ids].sum(-1) for ids in own], dim=-1) for row, own in pairs]
            sums = torch.stack(sums).save()
            tracer.stop()
        for i, row in zip(batch.indices, sums, strict=True):
            out[i] = row
    return torch.stack(out)


reducing_lens.reduces_targets = True


@pytest.fixture
def lens():
    return reducing_lens


@pytest.fixture
def whole_lens():
    return plain_lens
