"""Tokens that are parts of a character are shown as their bytes in the figures of every result, not as `�`."""

from __future__ import annotations

import json

import pytest

import nnterp
from nnterp import display
from nnterp.interventions import (
    AttributionGraph,
    Result,
    activation_patching,
    attribution_graph,
    attribution_patching,
    direct_logit_attribution,
    logit_lens_table,
)
from nnterp.interventions._results import joined

CLEAN, CORRUPTED = "The capital of 🙂 France is", "The capital of 🙂 Italy is"
EMOJI = [f"⟨{byte:02X}⟩" for byte in "🙂".encode()]


def metric(logits):
    return logits[..., 5]


MADE = {
    "patching": lambda model: activation_patching(model, CLEAN, CORRUPTED, metric=metric, layers=[0, 1]),
    "attribution": lambda model: attribution_patching(model, CLEAN, CORRUPTED, metric=metric, layers=[0, 1]),
    "lens": lambda model: logit_lens_table(model, CLEAN, layers=[0, 1]),
    "direct": lambda model: direct_logit_attribution(model, CLEAN, " Paris", by="position"),
}


@pytest.fixture(scope="module")
def model():
    """The toy, whose tokenizer is a byte-level BPE, with attention that can be read."""
    return nnterp.StandardizedTransformer(nnterp.toy_checkpoint(), enable_attention_probs=True)


@pytest.fixture(scope="module")
def fragments(model):
    """The tokens of the emoji: several, none of which is a character."""
    pieces = model.tokenizer.convert_ids_to_tokens(model.tokenizer(CLEAN).input_ids)
    texts = [display.TokenNames(model.tokenizer)(i) for i in model.tokenizer(CLEAN).input_ids]
    assert "".join(EMOJI) in "".join(texts)
    assert len(pieces) > 8
    return [text for text in texts if "⟨" in text]


@pytest.mark.parametrize("name", MADE)
def test_figures_show_bytes(name, model, fragments, tmp_path):
    result = MADE[name](model)
    assert "�" not in "".join(token for row in result.exact_tokens for token in row if token)
    result.save(tmp_path / "kept")
    for one in (result, Result.load(tmp_path / "kept")):
        drawn = json.dumps(one.plot().to_plotly_json(), default=list, ensure_ascii=False)
        assert "�" not in drawn
        assert all(piece in drawn for piece in fragments)


def test_a_graph_shows_bytes_in_names_labels_files_and_figure(model, fragments, tmp_path):
    transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
    part, ids = fragments[0], model.tokenizer(CLEAN).input_ids
    token = ids[[display.TokenNames(model.tokenizer)(i) for i in ids].index(part)]
    graph = attribution_graph(model, transcoders, CLEAN, targets=[(token, 5), " Paris"], max_features=20)
    graph.save(tmp_path / "graph")
    for one in (graph, AttributionGraph.load(tmp_path / "graph")):
        position = one.tokens.index(part)
        assert one.nodes[one.index(f"embedding {part!r} @{position}")].feature == token
        assert {node.label for node in one.nodes if node.kind == "logit"} == {
            f"{part} − {model.tokenizer.decode([5])}",
            " Paris",
        }
        drawn = json.dumps(one.plot().to_plotly_json(), default=list, ensure_ascii=False)
        assert "�" not in drawn
        assert all(piece in drawn for piece in [*fragments, part, "·Paris"])
    viewer = graph.to_viewer("emoji")["metadata"]
    assert viewer["prompt"] == CLEAN
    assert part in viewer["prompt_tokens"]
    graph.save_viewer(tmp_path, "emoji")


def test_tokens_of_a_result_stay_text_that_can_be_printed(model):
    result = MADE["patching"](model)
    "".join(token for row in result.tokens for token in row if token).encode()
    expected = tuple(model.tokenizer.decode([i]) for i in model.tokenizer(CLEAN).input_ids)
    assert result.tokens == (expected,)
    exact = "".join(result.exact_tokens[0])
    assert exact.encode("utf-8", "surrogateescape").decode() == CLEAN


def test_bytes_that_are_a_character_together_are_joined_to_it():
    raw = "🙂".encode()
    assert joined([raw[:2].decode("utf-8", "surrogateescape"), raw[2:].decode("utf-8", "surrogateescape")]) == "🙂"
    assert display.visible(joined(["a", raw[:1].decode("utf-8", "surrogateescape")])) == "a⟨F0⟩"
