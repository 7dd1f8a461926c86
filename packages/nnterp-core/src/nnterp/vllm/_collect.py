"""`collect` on vLLM: one block of reads is installed in the engine and runs in every request; vLLM batches these."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import check_dtype, count, device_of, path_of
from nnterp.collection import Collected, Filling, Generated, Plan, Reduce, check_reduce, positions_of, resumed
from nnterp.datasets import ActivationDataset, Job, prompts_of, rank_of, write_shards
from nnterp.defaults import plain_defaults
from nnterp.inputs import Row, encode
from nnterp.positions import plain_positions
from nnterp.progress import bar, check_progress
from nnterp.resuming import Call
from nnterp.vllm._kept import versions
from nnterp.vllm._lens import saved
from nnterp.vllm._reads import LAST, by_target, order_of, plan_of, read_pass, shapes_of, wanted_of, which
from nnterp.vllm._requests import finished

if TYPE_CHECKING:
    from nnterp.vllm._engine import TracedVLLM


@plain_defaults()
def collect(
    model: TracedVLLM,
    prompts: Any,
    values: Any,
    layers: Any = None,
    positions: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    reduce: Reduce = None,
    progress: bool | None = None,
    max_new_tokens: int | None = None,
    resume: Collected | str | Path | None = None,
    settings: dict[str, Any] | None = None,
) -> Collected:
    """See `StandardizedVLLM.collect`."""
    model.require_no_trace("collect()")
    device, settings = device_of(device), settings or {}
    check_dtype(dtype)
    check_progress(progress)
    check_reduce(reduce)
    _check_generation(max_new_tokens, settings, positions)
    rows = encode(model, prompts)  # type: ignore[arg-type]
    plan = plan_of(model, values, layers)
    chosen, single = positions_of(model, rows, -1 if max_new_tokens is not None else positions)  # type: ignore[arg-type]
    if max_new_tokens is not None:
        model.params(max_new_tokens, **settings)  # raises before the engine starts
    model.ready()
    for i, row in enumerate(rows):
        model.require_fits(row, f"Prompt {i}")
    asked = {
        "values": [target.label for target in plan.targets],
        "prompts": [row.identity for row in rows],
        "positions": (chosen, single),
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "generation": settings,
    }
    call = Call(model, "collect", asked, {"reduce": reduce}, also="collected")
    earlier = None if resume is None else resumed(call, resume)
    filling: Any
    if max_new_tokens is not None:
        filling = Generated(rows, plan, max_new_tokens, device, dtype, reduce)
    else:
        filling = Filling(plan, rows, chosen, single, device, dtype, reduce)
    if earlier is not None:
        filling.take_over(earlier)
    left = [i for i in range(len(rows)) if i not in filling.done]
    with (
        bar(len(rows), "collect", progress, "prompt") as shown,
        call.keeping(lambda: filling.collected(model.num_layers, call.record) if filling.done else None),
    ):
        shown.update(len(rows) - len(left))
        mine = [rows[i] for i in left]
        if max_new_tokens is not None:
            read = _over_generation(model, mine, plan, max_new_tokens, dtype, settings)
            with contextlib.closing(read):
                for k, tokens, taken in read:
                    there = {t: tensor.to(device) for t, tensor in taken.items()}
                    filling.put([left[k]], tokens[None], torch.ones(1, len(tokens), dtype=torch.bool), there)
                    shown.update(1)
        else:
            own = [chosen[i] for i in left]
            with contextlib.closing(_of_prompts(model, mine, own, single, plan, reduce, dtype, positions)) as some:
                for indices, taken in some:
                    prompts_of_pass = [left[k] for k in indices]
                    if isinstance(reduce, str):
                        filling.add(prompts_of_pass, {t: tensor.sum(0) for t, tensor in taken.items()})
                    else:
                        filling.put(prompts_of_pass, taken)
                    shown.update(len(indices))
    return filling.collected(model.num_layers)


def _check_generation(max_new_tokens: Any, settings: dict[str, Any], positions: Any) -> None:
    """Raise for arguments that do not go together, or that vLLM does not need.

    Raises:
        TypeError, ValueError: There are such arguments.
    """
    for name, instead in (
        ("batch_size", "vLLM batches requests by itself; max_num_seqs= of StandardizedVLLM bounds how many"),
        ("remote", "the engine is on this machine"),
    ):
        if name in settings:
            raise TypeError(f"collect() has no {name}= on vLLM: {instead}.")
    if max_new_tokens is None:
        if settings:
            names = ", ".join(settings)
            raise TypeError(f"collect() got {names}, settings of a generation, which needs max_new_tokens=.")
        return
    count(max_new_tokens, "max_new_tokens")
    if settings.get("n", 1) != 1:
        raise ValueError(f"n={settings['n']}: collect() reads one generation of each prompt; give the prompt n times.")
    if positions is not None:
        raise ValueError("positions is for prompts; over a generation, the positions that predict new tokens are read.")


def _of_prompts(
    model: TracedVLLM,
    rows: Sequence[Row],
    chosen: Sequence[tuple[int, ...]],
    single: bool,
    plan: Plan,
    reduce: Reduce,
    dtype: torch.dtype | None,
    positions: Any,
) -> Generator[tuple[list[int], dict[int, torch.Tensor]], None, None]:
    """Read prompts, and yield some when they are finished: their indices, and target → `[prompts, (positions,) ...]`.

    With "mean" and "sum", positions are added up.
    """
    if not rows:
        return
    order, wanted = order_of(plan), wanted_of(rows, chosen, plain_positions(positions) is None)
    with model.edit() as (_, edit):
        taken = read_pass(model, order, wanted, single, reduce, dtype)
        taken.save()  # type: ignore[attr-defined]  # every object has it in a trace
    try:
        given = model.prompts_of([row.ids for row in rows])
        with contextlib.closing(finished(model.vllm_entrypoint, given, model.params())) as run:
            for outputs in run:
                alike: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
                for i, output in outputs:
                    one = saved(output, "taken")[which(wanted, rows[i], chosen[i])]
                    alike.setdefault(shapes_of(one), []).append((i, one))
                for some in alike.values():
                    yield [i for i, _ in some], by_target(plan, (one for _, one in some))
    finally:
        edit.clear()


def _over_generation(
    model: TracedVLLM,
    rows: Sequence[Row],
    plan: Plan,
    max_new_tokens: int,
    dtype: torch.dtype | None,
    settings: dict[str, Any],
) -> Generator[tuple[int, torch.Tensor, dict[int, torch.Tensor]], None, None]:
    """Generate, and yield each prompt when it ends: its index, new tokens, and target → `[1, tokens, ...]`."""
    if not rows:
        return
    order = order_of(plan)
    taken: Any
    with model.edit() as (tracer, edit):
        taken = []
        taken.save()  # type: ignore[attr-defined]
        for _ in tracer.iter[:]:
            taken.append(read_pass(model, order, LAST, True, None, dtype)[0])
    try:
        params = model.params(max_new_tokens, **settings)
        given = model.prompts_of([row.ids for row in rows])
        with contextlib.closing(finished(model.vllm_entrypoint, given, params)) as run:
            for outputs in run:
                for i, output in outputs:
                    tokens = torch.tensor(list(output.outputs[0].token_ids), dtype=torch.long)
                    steps = saved(output, "taken")[: len(tokens)]
                    if len(steps) < len(tokens):
                        raise RuntimeError(f"Prompt {i} has {len(tokens)} new tokens and {len(steps)} forward passes.")
                    yield i, tokens, {t: tensor[None] for t, tensor in by_target(plan, steps).items()}
    finally:
        edit.clear()


@dataclass(frozen=True)
class _Requests(Job):
    """Prompts as requests of vLLM's engine, which is empty when a shard begins: so its bytes depend on it alone."""

    def run(
        self, rows: list[Row], chosen: list[tuple[int, ...]]
    ) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        """As `Job.run`."""
        read = _of_prompts(self.model, rows, chosen, self.single, self.plan, None, self.dtype, self.positions)
        with contextlib.closing(read):
            for indices, taken in read:
                yield indices, {self.plan.targets[t].label: tensor for t, tensor in taken.items()}


@plain_defaults()
def write(
    model: TracedVLLM,
    to: str | Path,
    prompts: Any,
    values: Any,
    layers: Any,
    positions: Any,
    dtype: torch.dtype | None,
    progress: bool | None,
    prompts_per_shard: int,
    rank: tuple[int, int] | None,
) -> ActivationDataset:
    """See `StandardizedVLLM.collect`, `to=`."""
    model.require_no_trace("collect()")
    folder, size = path_of(to, "to"), count(prompts_per_shard, "prompts_per_shard")
    check_dtype(dtype)
    check_progress(progress)
    share = rank_of(rank)
    given, total = prompts_of(model, prompts)  # type: ignore[arg-type]
    plan = plan_of(model, values, layers)
    model.ready()
    together = model.vllm_entrypoint.llm_engine.vllm_config.scheduler_config.max_num_seqs
    job = _Requests(model, plan, folder, plain_positions(positions), dtype, together, size)
    certificate = model.certificate
    about = {
        "backend": "vLLM",
        "versions": versions(),
        "certificate": "not validated" if certificate is None else {**asdict(certificate), "seconds": None},
    }
    return write_shards(job, given, total, progress, share, about)
