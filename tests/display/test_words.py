"""Figures refuse wrong arguments in this library's words, and take labels in every spelling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.testing import tiny_tokenizer

from ..words import error_of, is_ours

WRONG = [
    *(None, "", [], [[]], float("nan"), b"ab", 1.5, -3, True, "nonsense", {}, {1, 2}, ("a", 1), [None], [""]),
    *(torch.zeros(2, 2, 2, 2, 2), np.array([[1.5]]), object(), lambda *a, **k: None, 10**6),
]
PROBS = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0)).softmax(-1)
CALLS = {
    "plot_lens": (
        lambda **k: display.plot_lens(**{"lens": PROBS, "tokenizer": tiny_tokenizer(), **k}),
        "lens tokenizer tokens layers target top_k",
    ),
    "plot_attention": (
        lambda **k: display.plot_attention(**{"pattern": torch.full((2, 3, 5, 5), 0.2), **k}),
        "pattern tokens layers heads",
    ),
    "plot_patching": (lambda **k: display.plot_patching(**{"scores": PROBS[0], **k}), "scores layers"),
    "plot_patchscope": (
        lambda **k: display.plot_patchscope(**{"readings": PROBS, "tokenizer": tiny_tokenizer(), **k}),
        "readings tokenizer layers sources top_k",
    ),
    "plot_tokens": (
        lambda **k: display.plot_tokens(**{"values": [1.0, 2.0], "tokens": ["a", "b"], **k}),
        "values tokens",
    ),
    "plot_topk_tokens": (
        lambda **k: display.plot_topk_tokens(
            **{"next_token_probs": PROBS, "tokenizer": tiny_tokenizer(), "show": False, **k}
        ),
        "next_token_probs tokenizer k width height",
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(n, argument) for n, call in CALLS.items() for argument in call[1].split()]
)
def test_a_wrong_argument_is_refused_in_words(name, argument):
    for wrong in WRONG:
        error = error_of(lambda wrong=wrong: CALLS[name][0](**{argument: wrong}))
        assert error is None or is_ours(error), f"{argument}={wrong!r:.60}: {type(error).__name__}: {error}"


@pytest.mark.parametrize("name", ["plot_lens", "plot_attention", "plot_patching"])
def test_labels_in_every_spelling(name):
    count = {"plot_patching": 3}.get(name, 2)
    expected = CALLS[name][0](layers=list(range(4, 4 + count))).to_json()
    numbers = range(4, 4 + count)
    for spelled in (tuple(numbers), numbers, np.array(numbers), torch.tensor(list(numbers)), iter(numbers)):
        assert CALLS[name][0](layers=spelled).to_json() == expected


def test_a_target_is_an_id():
    for bad in (1.7, True, torch.tensor([1.7, 2.0, 3.0]), "Paris"):
        with pytest.raises((TypeError, ValueError), match="target"):
            CALLS["plot_lens"][0](target=bad)
    one = CALLS["plot_lens"][0](target=7).to_json()
    assert (
        one == CALLS["plot_lens"][0](target=[7, 7, 7]).to_json() == CALLS["plot_lens"][0](target=np.int64(7)).to_json()
    )
