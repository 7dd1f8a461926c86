"""Path patching: the effect of one component on another along the residual stream, with all parts between frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import nnsight
import torch

from nnterp.arguments import listed
from nnterp.defaults import plain_defaults
from nnterp.errors import Unavailable
from nnterp.inputs import Row, forward_flags
from nnterp.interventions._components import Component, check, cut, edit_of, positions_of
from nnterp.interventions._contributions import as_contribution, check_sender, held_parts, writes_at
from nnterp.interventions._engine import (
    Cell,
    Edit,
    Key,
    Passing,
    Shortcuts,
    forward_order,
    forward_steps,
    layer_of,
    positions_axis,
    rows_of,
    sweep,
)
from nnterp.interventions._metrics import Bound, bind_some, by_prompt, metric_name, scored
from nnterp.interventions._pairs import Direction, Pairs, encode_pairs
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import AUTO_ROWS, BatchSize, bar, check_batch_size, within_memory
from nnterp.interventions._states import States, states_of
from nnterp.resuming import Call
from nnterp.values import get_label

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True, eq=False, repr=False)
class PathResult(Result):
    """The metric of each patched path, `scores` `[prompts, senders]`, and of the `clean` and `corrupted` runs.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        result = path_patching(model, clean, corrupted, Component("attention_head_outputs", 4, 1), "logits", metric)
        moved = result["scores"] - result["corrupted"]  # [prompts, senders]
    """

    figure: ClassVar[str] = "paths"


@plain_defaults()
def path_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    sender: Component | Sequence[Component],
    receivers: Component | Sequence[Component] | Literal["logits"],
    metric: Any,
    *,
    direction: Direction = "denoising",
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
) -> PathResult:
    """The direct effect of a sender on receivers: along the residual stream, through no other part.

    In a first run the sender is taken from the other prompt, and what all other mixers and MLPs from its layer on add
    to the stream is frozen at its unedited value; the receivers' values are recorded. In a second run the receivers,
    and nothing else, are replaced by these. (Wang et al., "Interpretability in the wild", 2022, section 3.1;
    Goldowsky-Dill et al., "Localizing model behavior with path patching", 2023.)

    The output of a whole mixer or MLP, as a sender or a receiver, means what it adds to the stream, also in models
    whose modules add the stream themselves before they return (BLOOM, MPT).

    In a looped model, layers are those of `model.unrolled(layer, pass)`: mixers and MLPs are frozen in every pass, and
    the stream goes from one pass to the next as the model's own code takes it, a norm between them included.

    Args:
        model: The model.
        clean: A prompt, or a list.
        corrupted: As many prompts, each as long as its clean one.
        sender: A `Component`, such as a head `Component("attention_head_outputs", 5, 1)`; a list for a sweep.
        receivers: Components that are replaced together: "attention_queries", "attention_keys",
            "attention_values" of heads, "mlps_input", "attentions_input", ...; or "logits".
        metric: As in `activation_patching`.
        direction: "denoising" takes the sender from the clean run, into the corrupted one; "noising" the reverse.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service, the metric included; the activations to patch in are fetched first.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        `scores` `[prompts, senders]`, `clean` and `corrupted` `[prompts]`, float32, on the CPU.

    Raises:
        ValueError: Prompts do not match, or a receiver comes before a sender.
        Unavailable: The model, or a layer, does not have a value.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` is False.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        senders = components(model, "attention_head_outputs", layers=[4], heads="all")
        scores = path_patching(model, clean, corrupted, senders, "logits", metric)["scores"]  # [prompts, senders]
    """
    model.require_no_trace("path_patching()")
    check_batch_size(batch_size)
    pairs = encode_pairs(model, clean, corrupted, direction)
    if [len(prompt) for prompt in pairs.clean] != [len(prompt) for prompt in pairs.corrupted]:
        raise ValueError("Clean and corrupted prompts go in pairs of equally many tokens.")
    model.prepare(remote)
    senders, receiving = _senders_and_receivers(model, sender, receivers)
    about = describe_run(
        model,
        "path_patching",
        receivers=[str(r) for r in receiving],
        metric=metric_name(metric),
        direction=direction,
        corrupted=prompt_labels(pairs.corrupted, model),
    )
    asked = {
        "prompts": ids_of(pairs.clean, pairs.corrupted),
        "senders": [(c.value, c.layer, c.heads, c.positions) for c in senders],
        "receivers": [(c.value, c.layer, c.heads, c.positions) for c in receiving],
        "direction": direction,
    }
    call = Call(model, "path_patching", asked, {"metric": metric})
    found = _Found(len(pairs), len(senders), resumed(call, resume))

    def result() -> PathResult:
        return PathResult(
            {"scores": found.scores, "clean": found.ends[0], "corrupted": found.ends[1]},
            {"scores": ("prompts", "senders"), "clean": ("prompts",), "corrupted": ("prompts",)},
            {"prompts": prompt_labels(pairs.clean, model), "senders": tuple(str(s) for s in senders)},
            about=about,
        )

    with (
        bar(len(pairs) * len(senders), "path patching", progress) as shown,
        call.keeping(lambda: unfinished(call, result, found.done, ("prompts", "senders"))),
    ):
        run = _Paths(model, senders, receiving, proven_shortcuts(model, remote), batch_size, remote)
        run.all_pairs(pairs, metric, found, shown)
    return result()


class _Found:
    """What a call of `path_patching` has computed.

    Attributes:
        scores, done: The metric of each path, `[prompts, senders]`, and whether it is there.
        ends: The metric of the clean and of the corrupted runs, `[2, prompts]`.
    """

    def __init__(self, pairs: int, senders: int, earlier: Result | None) -> None:
        self.scores, self.ends = torch.full((pairs, senders), float("nan")), torch.full((2, pairs), float("nan"))
        self.done = torch.zeros(pairs, senders, dtype=torch.bool)
        if earlier is not None:
            self.scores, self.done = earlier["scores"].clone(), earlier[DONE].clone()
            self.ends = torch.stack([earlier["clean"], earlier["corrupted"]])


def _senders_and_receivers(
    model: StandardizedTransformer, sender: Any, receivers: Any
) -> tuple[list[Component], list[Component]]:
    """Both as lists of checked components; the receiver "logits" is what leaves the last layer.

    Raises:
        ValueError: There are none, or a receiver comes before a sender.
        Unavailable: The model does not have one, or adds to the stream outside of its layers.
    """
    if model.anatomy.between:
        raise Unavailable(
            f"{model.anatomy.model_class} adds to the stream between its layers ({model.anatomy.between[0]}), so "
            "holding mixers and feed-forwards still leaves more than the direct path: path patching is not served."
        )
    given = [sender] if isinstance(sender, Component) else listed(sender, "sender", "a Component, or several")
    senders = [check(model, c) for c in given]
    if isinstance(receivers, str) and receivers != "logits":
        raise ValueError(f'receivers are components or "logits", not {receivers!r}.')
    last = Component("layers_output", max(set(range(model.num_layers)) - set(model.facts.only_with_image)))
    if isinstance(receivers, (str, Component)):
        receivers = [last if receivers == "logits" else receivers]
    receiving = [check(model, c) for c in listed(receivers, "receivers", 'a Component, several, or "logits"')]
    if not senders or not receiving:
        raise ValueError("There are no senders or no receivers; give at least one of each.")
    _check_order(model, senders, receiving)
    for sender in senders:
        check_sender(model, sender)
    return senders, receiving


class _Paths:
    """The runs of a call of `path_patching`.

    Attributes:
        frozen: Names and layers of what is frozen: what all parts between senders and receivers add to the stream.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        senders: list[Component],
        receivers: list[Component],
        shortcuts: Shortcuts,
        batch_size: BatchSize,
        remote: Any,
    ) -> None:
        self.model = model
        self.senders = [as_contribution(model, sender) for sender in senders]
        self.receivers = [as_contribution(model, receiver) for receiver in receivers]
        self.shortcuts, self.batch_size, self.remote = shortcuts, batch_size, remote
        self.limit = AUTO_ROWS if batch_size == "auto" else batch_size
        first, last = min(layer_of(s.layer) for s in senders), max(layer_of(r.layer) for r in receivers)
        running = [layer for layer in range(first, last + 1) if layer not in model.facts.only_with_image]
        self.frozen = held_parts(model, running, {(r.value, r.layer) for r in self.receivers})

    def all_pairs(self, pairs: Pairs, metric: Any, found: _Found, shown: Any) -> None:
        """Fill in the scores and the metric of the unpatched runs."""
        model, shortcuts, remote = self.model, self.shortcuts, self.remote
        wanted = [(s.value, s.layer) for s in self.senders]
        for i, (into, source) in enumerate(zip(pairs.into, pairs.source, strict=True)):
            if not found.done[i].all():
                (given,), source_logits = states_of(model, [source], wanted, shortcuts, remote)
                (frozen,), into_logits = states_of(model, [into], self.frozen, shortcuts, remote)
                both = (source_logits, into_logits) if pairs.denoising else (into_logits, source_logits)
                bound = bind_some(metric, model, len(pairs), both[0], range(i, i + 1))
                for end in range(2):
                    found.ends[end, i] = by_prompt(bound, both[end], [0])[0]
                self.all_senders(into, given, frozen, bound, found.scores[i], found.done[i])
            shown.update(len(self.senders))

    def all_senders(
        self, prompt: Row, given: States, frozen: States, bound: Bound, scores: torch.Tensor, done: torch.Tensor
    ) -> None:
        """Fill in the metric of every sender's path in one prompt, `[senders]`, where it is not done."""
        start = 0
        while start < len(self.senders):
            own = slice(start, start + self.limit)
            some = self.senders[own]
            step = partial(self.some, prompt, given, frozen, bound, some, scores[own], done[own])
            if not done[own].all() and not within_memory(step, len(some)):
                self.limit = max(1, len(some) // 2)
                continue
            start += len(some)

    def some(
        self,
        prompt: Row,
        given: States,
        frozen: States,
        bound: Bound,
        senders: list[Component],
        scores: torch.Tensor,
        done: torch.Tensor,
    ) -> None:
        """Both runs for some senders; writes their metrics into `scores`."""
        model = self.model
        received = self.received(prompt, given, frozen, senders)
        every = tuple(range(len(prompt)))
        cells = []
        for k in range(len(senders)):
            edits = []
            for receiver, arrived in zip(self.receivers, received, strict=True):
                at = every if receiver.positions is None else positions_of(model, receiver, prompt, "the prompt")
                edits.append(edit_of(receiver, at, cut(receiver, at, arrived[k])))
            cells.append(Cell(0, tuple(edits)))
        options: dict[str, Any] = {"remote": self.remote, "batch_size": self.batch_size, "progress": False}
        found = sweep(model, [prompt], cells, scored(bound, cells), self.shortcuts, tokens=bound.tokens, **options)[
            "scores"
        ]
        scores.copy_(found)
        done.fill_(True)

    @torch.no_grad()
    def received(self, prompt: Row, given: States, frozen: States, senders: list[Component]) -> list[torch.Tensor]:
        """The first run: for each receiver its values, `[senders, seq, ...]`."""
        model, size = self.model, (len(senders), len(prompt))
        edits = self.first_edits(prompt, given, frozen, senders)
        wanted = [(r.value, r.layer) for r in self.receivers]
        steps = forward_steps(model, [*edits, *wanted])
        steps = steps[: 1 + max(k for k, step in enumerate(steps) if step.term is None and step.key in wanted)]
        ids = torch.tensor([prompt.ids] * len(senders))
        with model.trace({"input_ids": ids}, remote=self.remote, **forward_flags(model)) as tracer:
            arrived: dict[Key, torch.Tensor] = nnsight.save({})
            passing = Passing(model)
            for step in steps:
                key = step.key
                if step.term is not None:
                    passing.hold(step)
                    continue
                if key in wanted:  # before it is frozen, if it is
                    arrived[key] = rows_of(passing.read(key), *size, get_label(key[0])).clone()
                if key in edits:
                    passing.write(key, edits[key], size, 0)
            tracer.stop()
        return [arrived[key] for key in wanted]

    def first_edits(
        self, prompt: Row, given: States, frozen: States, senders: list[Component]
    ) -> dict[Key, list[tuple[int, Edit]]]:
        """Edits of the first run, by value and layer: each row has one sender replaced and all other parts frozen."""
        every = tuple(range(len(prompt)))
        edits: dict[Key, list[tuple[int, Edit]]] = {}
        spoken = [writes_at(self.model, sender) for sender in senders]
        for name, layer in self.frozen:
            for row, sender in enumerate(senders):
                if layer_of(layer) >= layer_of(sender.layer) and (name, layer) not in spoken[row]:
                    edits.setdefault((name, layer), []).append((row, Edit(name, layer, every, frozen[name, layer])))
        for row, sender in enumerate(senders):
            at = positions_of(self.model, sender, prompt, "the prompt")
            new = cut(sender, at, given[sender.value, sender.layer])
            edits.setdefault((sender.value, sender.layer), []).append((row, edit_of(sender, at, new)))
        return edits


def _check_order(model: StandardizedTransformer, senders: list[Component], receivers: list[Component]) -> None:
    for sender in senders:
        positions_axis(sender.value)
        if not sender.value.startswith(("attention", "mlp", "mixer")):
            raise ValueError(
                f"{sender} is no part that writes into the stream; send from attention heads, mixers or MLPs."
            )
        for receiver in receivers:
            first = forward_order(model, [(receiver.value, receiver.layer), (sender.value, sender.layer)])[0]
            if layer_of(receiver.layer) < layer_of(sender.layer) or first == (receiver.value, receiver.layer):
                raise ValueError(f"{receiver} comes before {sender} in the forward pass, so nothing is sent to it.")
