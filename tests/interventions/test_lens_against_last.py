"""What a lens keeps for figures: ids and exact bytes of tokens, and how each layer compares with the model's last."""

from __future__ import annotations

import pytest
import torch

from nnterp.interventions import Result, _lens, logit_lens, logit_lens_table
from nnterp.token_text import visible_bytes

TEXTS = ["The capital of France is 世界 🙂", "Mary"]


@pytest.fixture
def table(toy):
    return logit_lens_table(toy, TEXTS, progress=False)


@pytest.mark.parametrize("layers", [None, [4, 1], 2])
@pytest.mark.parametrize("at_a_time", [1, 1 << 23])
def test_ranks_and_divergence_are_those_of_the_whole_distributions(toy, monkeypatch, layers, at_a_time):
    monkeypatch.setattr(_lens, "READOUT_NUMBERS", at_a_time)
    found = logit_lens(toy, TEXTS, layers=layers, positions=slice(None), against_last=True, progress=False)
    full = logit_lens(toy, TEXTS, layers=layers, positions=slice(None), progress=False).double()
    deepest = logit_lens(toy, TEXTS, layers=-1, positions=slice(None), progress=False).double()[:, 0]
    assert list(found.tensors) == ["last_ranks", "kl", "input_ids"]
    assert found["kl"].shape == full.shape[:3]
    for prompt in range(2):
        for place in range(full.shape[2]):
            rows = full[prompt, :, place]
            if rows.isnan().any():
                assert (found["last_ranks"][prompt, :, place] == -1).all()
                assert found["kl"][prompt, :, place].isnan().all()
                continue
            last = deepest[prompt, place]
            for layer, row in enumerate(rows):
                assert found["last_ranks"][prompt, layer, place] == (row > row[last.argmax()]).sum()
                expected = (last * (last.log() - row.log())).nansum()
                assert found["kl"][prompt, layer, place] == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
    own = found["kl"][~found["kl"].isnan()]
    assert (own == 0).any() == (layers is None)


def test_layers_alone_are_as_among_all(toy, table):
    """No number depends on which other layers are read; figures name the layer that distances are from."""
    for layers in (2, [4, 1], range(3)):
        some = logit_lens_table(toy, TEXTS, layers=layers, progress=False)
        assert some.labels["layers"] == tuple([layers] if isinstance(layers, int) else layers)
        own = list(some.labels["layers"])
        for name in ("kl", "last_ranks", "entropy", "top_ids"):
            torch.testing.assert_close(some[name], table[name][:, own], rtol=1e-4, atol=1e-5, equal_nan=True)
        bar = some.plot(color="kl").data[0].colorbar.title.text.replace("<br>", " ")
        assert bar == f"KL from layer {toy.num_layers - 1} (nats)"


def test_a_reading_of_one_position_is_compared_too(toy, table):
    found = logit_lens(toy, TEXTS, against_last=True, top_k=1, progress=False)
    assert found.axes["kl"] == ("prompts", "layers")
    assert torch.allclose(found["kl"][1], table["kl"][1, :, 0], atol=1e-5)
    assert "input_ids" not in found.tensors


def test_input_ids_and_bytes_give_the_prompt_back(toy, table, tmp_path):
    assert "�" in "".join(filter(None, table.tokens[0])), "this text has tokens that are part of a character"
    table.save(tmp_path / "lens")
    for result in (table, Result.load(tmp_path / "lens.safetensors")):
        for row, text in zip(result["input_ids"].tolist(), TEXTS, strict=True):
            ids = [token for token in row if token >= 0]
            assert ids == toy.tokenizer(text)["input_ids"]
            special = set(toy.tokenizer.all_special_ids)
            pieces = [
                bytes.fromhex(result.token_bytes[token])
                if token in result.token_bytes
                else result.vocabulary[token].encode()
                for token in ids
                if token not in special
            ]
            assert b"".join(pieces).decode() == text


def test_figures_name_parts_of_characters_without_a_tokenizer(toy, table):
    labels = list(table.plot(page=4000).layout.xaxis.ticktext)
    assert not any("�" in label for label in labels)
    assert labels == list(table.plot(tokenizer=toy.tokenizer, page=4000).layout.xaxis.ticktext)
    piece = next(bytes.fromhex(raw) for raw in table.token_bytes.values() if bytes.fromhex(raw)[-1] >= 0x80)
    assert "⟨" in visible_bytes(piece)
    assert any("⟨" in label for label in labels)
