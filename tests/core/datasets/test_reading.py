"""What is on the disk against the plain HuggingFace model, run one prompt at a time."""

import hashlib
import json
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import nnterp
from nnterp.positions import at

PROMPTS = [
    "The capital of France is",
    "Hello",
    "The Eiffel Tower is in the city of Paris",
    "A cat",
    [5, 6, 7, 8],
    "The capital of Spain is Madrid, and the capital of Italy is Rome",
    "one two three",
]
VALUES = ["layers_output", "logits", "next_token_probs"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def plain():
    """The toy checkpoint in HuggingFace alone: token ids → layers `[layers, tokens, hidden]`, logits, patterns."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = nnterp.toy_checkpoint()
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def run(prompt):
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        seen = []
        hooks = [
            layer.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
            for layer in module.model.layers
        ]
        with torch.no_grad():
            out = module(torch.tensor([ids]), output_attentions=True)
        for hook in hooks:
            hook.remove()
        return ids, torch.stack(seen)[:, 0], out.logits[0], torch.stack(out.attentions)[:, 0]

    return [run(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """All tokens of prompts of different lengths, in three shards."""
    model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
    folder = tmp_path_factory.mktemp("ragged") / "deep" / "folder"
    dataset = model.collect(PROMPTS, VALUES, to=folder, prompts_per_shard=3, batch_size=2, progress=False)
    return dataset, folder


def test_all_tokens_of_every_layer(ragged, plain):
    dataset, folder = ragged
    assert (len(dataset), dataset.complete, dataset.values) == (len(PROMPTS), True, tuple(VALUES))
    for i, (ids, layers, logits, _) in enumerate(plain):
        item = dataset[i]
        assert item["prompt"] == i
        assert item["token_ids"].tolist() == list(ids)
        assert item["text"] == (PROMPTS[i] if isinstance(PROMPTS[i], str) else None)
        assert item["positions"].tolist() == list(range(len(ids)))
        torch.testing.assert_close(item["layers_output"], layers, **CLOSE)
        torch.testing.assert_close(item["logits"], logits, **CLOSE)
        torch.testing.assert_close(item["next_token_probs"], logits[-1].softmax(-1), **CLOSE)
        torch.testing.assert_close(dataset["layers_output", -1].prompt(i, token=-1), layers[-1, -1], **CLOSE)
        torch.testing.assert_close(dataset["blocks.2.hook_resid_post"].prompt(i), layers[2], **CLOSE)
        torch.testing.assert_close(dataset["layers_output"].prompt(i - len(PROMPTS), token=0), layers[:, 0], **CLOSE)
    assert nnterp.ActivationDataset.open(folder)[3]["layers_output"].shape == dataset[3]["layers_output"].shape


def test_rows_are_tokens_in_the_order_of_the_prompts(ragged, plain):
    dataset, _ = ragged
    layers = torch.cat([layers for _, layers, _, _ in plain], dim=1)
    tokens = [(i, p, token) for i, (ids, *_) in enumerate(plain) for p, token in enumerate(ids)]
    column, all_layers = dataset["layers_output", 3], dataset["layers_output"]
    assert len(column) == len(tokens)
    torch.testing.assert_close(column.tensor(), layers[3], **CLOSE)
    torch.testing.assert_close(all_layers.tensor(), layers, **CLOSE)
    rows = [len(tokens) - 1, 0, 9, 9]
    torch.testing.assert_close(column[rows], layers[3][rows], **CLOSE)
    torch.testing.assert_close(all_layers[rows], layers[:, rows].transpose(0, 1), **CLOSE)
    torch.testing.assert_close(column[4:19], layers[3][4:19], **CLOSE)
    torch.testing.assert_close(column[torch.tensor(rows)], layers[3][rows], **CLOSE)
    torch.testing.assert_close(column[torch.tensor(9)], layers[3][9], **CLOSE)
    with torch.device("meta"):  # a default device is not where a dataset is
        again = nnterp.ActivationDataset.open(dataset.folder)["layers_output", 3]
        assert torch.equal(again.tensor(), column.tensor())
        assert next(iter(again.shuffled(4))).device.type == "cpu"
    torch.testing.assert_close(column[-1], layers[3][-1], **CLOSE)
    torch.testing.assert_close(torch.stack(list(column)), layers[3], **CLOSE)
    assert [tuple(column.where(k)) for k in range(len(tokens))] == tokens
    assert dataset["next_token_probs"].where(2) == (2, len(plain[2][0]) - 1, plain[2][0][-1])


def test_the_files_are_safetensors_with_the_checksums_of_the_manifest(ragged):
    dataset, folder = ragged
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [shard["prompts"] for shard in manifest["shards"]] == [3, 3, 1]
    for shard in manifest["shards"]:
        content = (folder / "shards" / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == shard["bytes"]
        stored = load_file(folder / "shards" / shard["file"])
        assert stored["layers_output[3]"].shape == (shard["positions"], 128)
        mine = range(shard["first"], shard["first"] + shard["prompts"])
        assert stored["prompts.token_ids"].tolist() == [t for i in mine for t in dataset[i]["token_ids"].tolist()]
        assert torch.equal(stored["layers_output[3]"], torch.cat([dataset["layers_output", 3].prompt(i) for i in mine]))
    assert manifest["certificate"]["lines"]
    assert manifest["model"]["model_class"] == "LlamaForCausalLM"
    assert manifest["tensors"]["layers_output[3]"] == {"dtype": "F32", "shape": [128]}
    assert manifest["versions"]["torch"] == version("torch")


def test_what_is_handed_out_can_be_changed(ragged):
    dataset, _ = ragged
    before = dataset["layers_output", 0][0].clone()
    for take in (
        lambda: dataset["layers_output", 0][0],
        lambda: dataset["layers_output", 0].prompt(0),
        lambda: dataset[0]["token_ids"],
    ):
        take().zero_()
    assert torch.equal(dataset["layers_output", 0][0], before)
    assert dataset[0]["token_ids"].any()


def test_what_is_not_there_is_named(ragged):
    dataset, _ = ragged
    with pytest.raises(KeyError, match="mlps_output was not collected"):
        dataset["mlps_output"]
    with pytest.raises(KeyError, match="Layer 8"):
        dataset["layers_output", 8]
    with pytest.raises(IndexError, match="7 prompts"):
        dataset[7]
    with pytest.raises(IndexError, match="tokens"):
        dataset["layers_output", 1].prompt(1, token=40)
    with pytest.raises(IndexError, match="rows"):
        dataset["layers_output", 1][10_000]
    with pytest.raises(TypeError):
        dataset["layers_output", 1][1.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_loads_it(ragged, workers):
    dataset, _ = ragged
    column = dataset["layers_output", 5]
    found = torch.cat(list(DataLoader(column, batch_size=5, num_workers=workers)))
    assert torch.equal(found, column.tensor())
    prompts = [
        item["prompt"] for batch in DataLoader(dataset, 3, collate_fn=list, num_workers=workers) for item in batch
    ]
    assert prompts == list(range(len(PROMPTS)))
    stream = column.shuffled(buffer=8, seed=1)
    mixed = torch.cat(list(DataLoader(stream, batch_size=4, num_workers=workers)))
    assert sorted(map(tuple, mixed.tolist())) == sorted(map(tuple, column.tensor().tolist()))


@pytest.mark.parametrize("buffer", [1, 8, 10_000])
def test_shuffled_gives_every_row_once_in_an_order_of_its_seed(ragged, buffer):
    dataset, _ = ragged
    column = dataset["layers_output", 5]
    rows = [tuple(row) for row in column.tensor().tolist()]

    def order(seed, epoch=0):
        stream = column.shuffled(buffer, seed)
        stream.set_epoch(epoch)
        return [tuple(row.tolist()) for row in stream]

    first = order(0)
    assert sorted(first) == sorted(rows)
    assert first == order(0)
    if buffer > 1:
        assert len({tuple(first), tuple(order(1)), tuple(order(0, epoch=1)), tuple(rows)}) == 4


def test_chosen_positions_and_one_position(tmp_path, toy, plain):
    texts = [prompt for prompt in PROMPTS if isinstance(prompt, str)]
    reference = [one for one, prompt in zip(plain, PROMPTS, strict=True) if isinstance(prompt, str)]
    last = toy.collect(texts, "layers_output", positions=-1, to=tmp_path / "last", prompts_per_shard=4)
    torch.testing.assert_close(
        last["layers_output"].tensor(), torch.stack([r[1][:, -1] for r in reference], 1), **CLOSE
    )
    assert last["layers_output", 2].prompt(1).shape == (128,)
    assert last["layers_output", 2].where(3).position == len(reference[3][0]) - 1
    with pytest.raises(IndexError, match="is not stored"):
        last["layers_output", 2].prompt(0, token=0)
    lists = [[0], [0], [2, 0, -1], [0], [1, 1], [0]]
    some = toy.collect(iter(texts), "layers_output", [3, 0], positions=lists, to=tmp_path / "some", prompts_per_shard=4)
    for i, (mine, (ids, layers, *_)) in enumerate(zip(lists, reference, strict=True)):
        torch.testing.assert_close(some["layers_output"].prompt(i), layers[[3, 0]][:, mine], **CLOSE)
        assert some[i]["positions"].tolist() == [p % len(ids) for p in mine]
    capital = toy.collect(texts[:1], "layers_output[1]", positions=at("capital"), to=tmp_path / "text")
    assert [toy.tokenizer.decode(capital[0]["token_ids"][p]) for p in capital[0]["positions"]] == [" capital"]
    for wrong in (lists[:-1], [*lists, [0]]):
        for prompts in (texts, iter(texts)):
            with pytest.raises(ValueError, match="lists"):
                toy.collect(
                    prompts, "layers_output", positions=wrong, to=tmp_path / f"{len(wrong)}{type(prompts).__name__}"
                )


def test_entries_of_prompts_mean_the_same_in_every_shard(tmp_path, toy):
    lists = [[0, 1], 2, -1, 0]  # the second shard holds no list, and its entries still belong to one prompt each
    texts = ["The capital of France is", "The capital of Spain", "Hello there, my friend", "A dog ran"]
    stored = toy.collect(texts, "layers_output", positions=lists, to=tmp_path / "mixed", prompts_per_shard=2)
    ids = [toy.tokenizer(text)["input_ids"] for text in texts]
    expected = [[0, 1], [2], [len(ids[2]) - 1], [0]]
    assert [stored[i]["positions"].tolist() for i in range(4)] == expected


@pytest.mark.parametrize("position", [None, -1])
def test_patterns(tmp_path, plain, position):
    model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint(), enable_attention_probs=True)
    folder, name = tmp_path / "patterns", "attention_probabilities"
    dataset = model.collect(PROMPTS, name, [1, 4], position, to=folder, prompts_per_shard=4, batch_size=3)
    for i, (_, _, _, patterns) in enumerate(plain):
        expected = patterns[[1, 4]] if position is None else patterns[[1, 4], :, position]
        torch.testing.assert_close(dataset[name].prompt(i), expected, **CLOSE)
        torch.testing.assert_close(dataset[name, 4][i], expected[1], **CLOSE)
        torch.testing.assert_close(dataset[name, 4].prompt(i, token=-1), patterns[4, :, -1], **CLOSE)
    with pytest.raises(ValueError, match="different lengths"):
        dataset[name, 1].tensor()
    with pytest.raises(ValueError, match="differ in shape"):
        dataset[name, 1].shuffled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_bit_for_bit(tmp_path, dtype):
    model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint(), dtype=dtype)
    model.dispatch()
    dataset = model.collect(PROMPTS, "layers_output", to=tmp_path / "half", batch_size=1, prompts_per_shard=5)
    rounded = model.collect(PROMPTS, "layers_output", to=tmp_path / "float", batch_size=1, dtype=torch.float32)
    for i in range(len(PROMPTS)):
        with torch.no_grad():
            states = model._module.model(dataset[i]["token_ids"][None], output_hidden_states=True).hidden_states
        stored = dataset["layers_output"].prompt(i)
        assert stored.dtype == dtype
        assert torch.equal(stored[:-1], torch.stack(states[1:-1])[:, 0])  # the last of HuggingFace's is normed
        assert torch.equal(rounded["layers_output"].prompt(i), stored.float())


def test_layers_of_different_shapes(tmp_path, tiny):
    model = tiny("laguna")
    prompts = ["The capital of France is", "A cat"]
    whole = model.collect(prompts, "attention_head_outputs")
    dataset = model.collect(prompts, "attention_head_outputs", to=tmp_path / "a")
    layers = dataset.layers["attention_head_outputs"]
    with pytest.raises(ValueError, match="ask for one"):
        dataset["attention_head_outputs"]
    for i in range(len(prompts)):
        own = int(whole.mask[i].sum())
        for layer in layers:
            expected = whole["attention_head_outputs", layer][i, :own]
            torch.testing.assert_close(dataset["attention_head_outputs", layer].prompt(i), expected, **CLOSE)
            torch.testing.assert_close(dataset[i][f"attention_head_outputs[{layer}]"], expected, **CLOSE)


def test_huggingface(ragged, plain, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    found = ragged[0].huggingface()
    assert len(found) == len(PROMPTS)
    for i, (ids, layers, _, _) in enumerate(plain):
        assert found[i]["token_ids"] == list(ids)
        torch.testing.assert_close(torch.tensor(found[i]["layers_output[6]"]), layers[6], **CLOSE)
