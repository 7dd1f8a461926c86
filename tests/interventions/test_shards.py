"""Sweeps shared by processes: two of them, one killed, give the result of one call; what does not fit is refused."""

import copy
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import nnterp
from nnterp.interventions import (
    Result,
    ablate,
    activation_patching,
    components,
    edge_attribution,
    logit_difference,
    logit_lens,
    logit_lens_table,
    merge_shards,
    run_shards,
)

from ..core.datasets.processes import contents, ended, forked

PLACES = ["France", "Italy", "Spain", "Germany", "Japan", "Egypt", "Peru"]
PAIRS = [(f"The capital of {a} is", f"The capital of {b} is") for a, b in itertools.pairwise(PLACES)]
PAIRS[2] = ("Surely the capital of Spain is", "Surely the capital of Italy is")
SETTINGS = {"progress": False}


def patching(model, some, layers=(1, 3), killed_after=None):
    if killed_after is not None and some.start >= killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
    own = [PAIRS[i] for i in some]
    metric = logit_difference([5 + i for i in some], [9] * len(own))
    return activation_patching(model, [a for a, _ in own], [b for _, b in own], metric, layers=layers, **SETTINGS)


def same(one, other):
    assert type(one) is type(other)
    assert (one.axes, one.labels, one.tokens, one.vocabulary) == (
        other.axes,
        other.labels,
        other.tokens,
        other.vocabulary,
    )
    assert one.about == other.about
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.fixture
def whole(toy):
    return patching(toy, range(len(PAIRS)))


def test_two_processes_one_of_them_killed(toy, tmp_path, whole):
    """The killed one loses the shard that it was working on, and nothing else; started again, it fills the gap."""

    def work(some):
        return patching(toy, some)

    def run(rank, function=work):
        return lambda: run_shards(
            toy, function, len(PAIRS), tmp_path / "out", prompts_per_shard=2, rank=rank, **SETTINGS
        )

    def killing(some):
        return patching(toy, some, killed_after=2)

    ends = [ended(child) for child in [forked(run((0, 2))), forked(run((1, 2), killing))]]
    assert ends == [0, -signal.SIGKILL]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "shard-000000.safetensors",
        "shard-000002.safetensors",
    ]
    with pytest.raises(ValueError, match=r"1 of 3 shards are not in .*: prompts 2 to 3\. Processes are still at work"):
        merge_shards(tmp_path / "out")
    before = contents(tmp_path / "out")
    assert ended(forked(run((1, 2)))) == 0
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    same(merge_shards(tmp_path / "out"), whole)


@pytest.mark.slow
def test_torchrun_sets_the_ranks(toy, tmp_path, whole):
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, nnterp\n"
        "torch.set_num_threads(1)\n"
        "from nnterp.interventions import run_shards\n"
        "from tests.interventions.test_shards import PAIRS, patching\n"
        "model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())\n"
        f"out = {str(tmp_path / 'out')!r}\n"
        "run_shards(model, lambda some: patching(model, some), len(PAIRS), out, prompts_per_shard=1)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    same(merge_shards(tmp_path / "out"), whole)


def test_the_last_one_returns_all(toy, tmp_path, whole, monkeypatch):
    def run():
        return run_shards(toy, lambda some: patching(toy, some), len(PAIRS), tmp_path, prompts_per_shard=2, **SETTINGS)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run() is None
    monkeypatch.setenv("RANK", "0")
    found = run()
    same(found, whole)
    assert "shard" not in found.about
    found.save(tmp_path / "all")
    same(Result.load(tmp_path / "all"), whole)


def test_other_functions_shard_too(toy, tmp_path):
    prompts, parts = [clean for clean, _ in PAIRS[:4]], components(toy, "mlps_output", layers=[0, 1])

    def ablated(some):
        return ablate(toy, [prompts[i] for i in some], parts, metric=logit_difference(5, 9), **SETTINGS)

    def table(some):
        return logit_lens_table(toy, [prompts[i] for i in some], layers=[1, 7], top_k=3)

    for function in (ablated, table):
        folder = tmp_path / function.__name__
        same(run_shards(toy, function, 4, folder, prompts_per_shard=3, **SETTINGS), function(range(4)))


def test_labels_are_those_of_one_call(toy, tmp_path):
    """Positions from the end are others in each shard; bytes of tokens are kept."""

    def lens(some):
        return logit_lens(toy, [IDS[i] for i in some], top_k=2, positions=[-1, -2], layers=[1, 7], **SETTINGS)

    def broken(some):
        return replace(lens(some), token_bytes=dict.fromkeys(some, "ff"))

    same(run_shards(toy, lens, 3, tmp_path / "lens", prompts_per_shard=1, **SETTINGS), lens(range(3)))
    found = run_shards(toy, broken, 3, tmp_path / "bytes", prompts_per_shard=2, **SETTINGS)
    assert found.token_bytes == {0: "ff", 1: "ff", 2: "ff"}


@dataclass
class Pair:
    ids: list[int]
    right: int


class Options:
    def __init__(self, layer):
        self.layer = layer


IDS = [[5, 9, 7, 14], [5, 9, 7, 15, 3], [6, 2]]
RECORDS = [Pair([5, 9, 7], 5), Pair([6, 2], 6)]
METRIC = logit_difference(5, 9)
OPTIONS = Options(1)


def of_globals(some):
    parts = components(MODEL["toy"], "mlps_output", layers=[OPTIONS.layer])
    return ablate(MODEL["toy"], [RECORDS[i].ids for i in some], parts, metric=METRIC, **SETTINGS)


MODEL = {}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("RECORDS", [Pair([5, 9, 7], 5), Pair([6, 3], 6)]),
        ("METRIC", logit_difference(6, 9)),
        ("OPTIONS", Options(2)),
    ],
)
def test_records_that_work_reads_belong_to_the_call(toy, tmp_path, monkeypatch, name, other):
    """Shards of other data were merged with those of this call."""
    monkeypatch.setitem(MODEL, "toy", toy)

    def run(rank):
        return run_shards(toy, of_globals, 2, tmp_path, prompts_per_shard=1, rank=rank, **SETTINGS)

    assert run((0, 2)) is None
    before = getattr(sys.modules[__name__], name)
    monkeypatch.setitem(globals(), name, other)
    with pytest.raises(ValueError, match=rf"was made with work \(global variable '{name}'\)"):
        run((0, 1))
    monkeypatch.setitem(globals(), name, copy.deepcopy(before))
    assert run((0, 1)) is not None


def test_what_averages_over_prompts_is_refused(toy, tmp_path):
    def edges(some):
        own = [PAIRS[i] for i in some]
        return edge_attribution(toy, [a for a, _ in own], [b for _, b in own], logit_difference(5, 9), **SETTINGS)

    with pytest.raises((TypeError, ValueError), match=r"returns a Result|has no axis of prompts"):
        run_shards(toy, edges, 2, tmp_path, prompts_per_shard=1, **SETTINGS)


def averaged(some):
    """A result that has an axis of prompts, and a mean over them."""
    scores = torch.arange(10.0)[list(some)]
    tensors = {"scores": scores, "mean": scores.mean()[None]}
    labels = {"prompts": tuple(some), "one": (0,)}
    return Result(tensors, {"scores": ("prompts",), "mean": ("one",)}, labels)


def test_a_mean_beside_prompts_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="mean has no axis of prompts, and differs between shards"):
        run_shards(toy, averaged, 4, tmp_path, prompts_per_shard=2, **SETTINGS)
    assert run_shards(toy, averaged, 4, tmp_path / "one", **SETTINGS)["mean"].item() == 1.5


def test_shards_of_another_call_are_refused(toy, tmp_path):
    def run(function, prompts=4, **options):
        return run_shards(toy, function, prompts, tmp_path, **{"prompts_per_shard": 2, **SETTINGS, **options})

    layers = (1,)
    assert run(lambda some: patching(toy, some, layers)) is not None
    layers = (2,)
    with pytest.raises(ValueError, match=r"shard-000000.safetensors was made with .*'layers'"):
        run(lambda some: patching(toy, some, layers))
    layers = (1,)
    with pytest.raises(ValueError, match="was made with prompts = 4, and this call has 6"):
        run(lambda some: patching(toy, some, layers), prompts=6)
    with pytest.raises(ValueError, match="was made with prompts_per_shard = 2, and this call has 1"):
        run(lambda some: patching(toy, some, layers), prompts_per_shard=1)
    other = nnterp.StandardizedTransformer(nnterp.toy_checkpoint(), keep_proofs=False)
    other.dispatch()
    with torch.no_grad():
        other._module.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"was made with .*weights"):
        run_shards(other, lambda some: patching(other, some, layers), 4, tmp_path, prompts_per_shard=2, **SETTINGS)


def test_shards_that_do_not_belong_together_are_refused(toy, tmp_path):
    run_shards(toy, averaged, 4, tmp_path / "a", prompts_per_shard=4, **SETTINGS)
    run_shards(toy, averaged, 6, tmp_path / "b", prompts_per_shard=3, rank=(1, 2), **SETTINGS)
    (tmp_path / "b" / "shard-000001.safetensors").rename(tmp_path / "a" / "shard-000001.safetensors")
    with pytest.raises(ValueError, match="are of different calls: the first was made with prompts = 6"):
        merge_shards(tmp_path / "a")


def test_a_damaged_shard_is_named_and_can_be_written_again(toy, tmp_path):
    def run():
        return run_shards(toy, lambda some: patching(toy, some), 4, tmp_path, prompts_per_shard=2, **SETTINGS)

    run()
    path = tmp_path / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000001.*Delete it, and make the same call again"):
        run()
    path.unlink()
    assert run() is not None


def test_what_is_no_share_is_refused(toy, tmp_path):
    with pytest.raises(TypeError, match="work returns a Result, such as activation_patching"):
        run_shards(toy, lambda some: torch.zeros(len(some)), 2, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="work was given 2 prompts, and the PatchingResult it returned has 1"):
        run_shards(toy, lambda some: patching(toy, some[:1]), 2, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="rank must be at least 0, at most 1, not 2"):
        run_shards(toy, averaged, 2, tmp_path, rank=(2, 2), **SETTINGS)
    with pytest.raises(FileNotFoundError, match="There are no shards in"):
        merge_shards(tmp_path / "nothing")
