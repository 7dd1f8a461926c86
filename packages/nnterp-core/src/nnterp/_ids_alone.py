"""`IdsAlone`, in place of a tokenizer for a model that has none: it is run on token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn


class IdsAlone:
    """Shows token ids as numbers, and refuses text. Of the attributes of a tokenizer it has those that may be None."""

    padding_side = "left"
    pad_token = eos_token = bos_token = unk_token = None
    pad_token_id = eos_token_id = bos_token_id = unk_token_id = None
    chat_template = None
    name_or_path = ""
    is_fast = False
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to read a text.

        Raises:
            ValueError: Always: there is no tokenizer.
        """
        raise ValueError(
            "This model has no tokenizer, so it cannot read texts. Give token ids ([5, 9, 12], or a tensor "
            "[batch, seq]), or load it with StandardizedTransformer(..., tokenizer=...)."
        )

    encode = apply_chat_template = tokenize = __call__

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Each id as a number in text; one text for one id."""
        return [str(int(i)) for i in ids] if isinstance(ids, Iterable) else str(int(ids))

    def decode(self, ids: Any, *_: Any, **__: Any) -> str:
        """The ids as numbers, with spaces between them."""
        return " ".join(self.convert_ids_to_tokens(ids if isinstance(ids, Iterable) else [ids]))
