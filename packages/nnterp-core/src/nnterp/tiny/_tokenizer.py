"""A small byte-level BPE tokenizer, trained on the spot on the text below."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

RESERVED_TOKEN_IDS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "image": 4, "video": 5, "audio": 6, "other": 7}
VOCAB_SIZE = 509
_SMALLEST_VOCAB = len(RESERVED_TOKEN_IDS) + 256

_TEXT = """\
The Eiffel Tower is in the city of Paris, and the Colosseum is in the city of Rome. The capital of France is Paris;
the capital of Italy is Rome; the capital of Germany is Berlin; the capital of Spain is Madrid; the capital of Japan
is Tokyo. When Mary and John went to the store, John gave a drink to Mary. When Tom and Anna went to the park, Anna
gave a ball to Tom. The quick brown fox jumps over the lazy dog. Hello world! This is a small text about language
models and their hidden states: every layer reads from the residual stream and writes back to it. One, two, three,
four, five, six, seven, eight, nine, ten. 0 1 2 3 4 5 6 7 8 9. She said that he would not have done it if they had
been there with us. What is the opposite of hot? The opposite of hot is cold. What is the colour of the sky? The
colour of the sky is blue. I think that we should ask which words come next, because a model of the next word has to
know something about the world.
def main():
    return 1 + 2
for i in range(10):
    print(i)
"Why not?" she asked. "Because," he answered, "there was no time for the other question, and now it's too late." After
that day nobody could remember where the house had stood, who had lived in it, or how long the people from the village
had been waiting for the summer to come again. Good morning, good evening, good night; yes or no, true or false, left
or right. A cat sat on the mat. Dogs and cats are animals. Water is made of hydrogen and oxygen. The sun is a star.
"""


@lru_cache(maxsize=8)
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[f"<{name}>" for name in RESERVED_TOKEN_IDS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    # A larger vocabulary than the text yields is filled up with tokens that no text is split into.
    fillers = [f"<filler_{i}>" for i in range(vocab_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens(fillers)
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A deterministic byte-level BPE tokenizer for any text, made without a network.

    Ids 0 to 7 are the special tokens `<pad> <bos> <eos> <unk> <image> <video> <audio> <other>`. No special token is
    added to a text, and no text is split into `<unk>`. Each call returns a tokenizer of its own.

    Args:
        vocab_size: `len()` of the tokenizer; its default is the vocabulary of every `tiny_model`.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the special tokens.

    Example:
        print(len(testing.tiny_tokenizer()))  # → 509
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and {len(RESERVED_TOKEN_IDS)} special tokens: "
            f"ask for at least {_SMALLEST_VOCAB}."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
