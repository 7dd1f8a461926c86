"""Attention patterns weighted by how much is attended to: the norm of each value through W_O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nnsight
import torch

from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.inputs import Batch, Row, encode, forward_flags
from nnterp.interventions._engine import Passing, forward_steps
from nnterp.interventions._heads._reading import (
    HEADS,
    PATTERN,
    VALUES,
    by_head,
    mixing_error,
    norms_through,
    refuse,
    through_out,
    tolerance,
)
from nnterp.interventions._layers import layers_with
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._results import Result, describe_run, exact_texts, prompt_labels
from nnterp.interventions._running import BatchSize, check_batch_size, in_batches
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READ = (PATTERN, VALUES, HEADS)


@dataclass(frozen=True, eq=False, repr=False)
class WeightedAttention(Result):
    """Attention weighted by value norms, `weighted` `[prompts, layers, heads, query, key]`, float32, on the CPU.

    `pattern` holds the attention probabilities, in the same shape, and `value_norms` `[prompts, layers, heads, key]`
    what they are weighted by. NaN past the end of a shorter prompt.

    Example:
        result = value_weighted_attention(model, prompts[0], layers=[4])
        weighted = result["weighted"]  # [prompts, layers, heads, query, key]
    """

    figure: ClassVar[str] = "attention"


@plain_defaults()
def value_weighted_attention(
    model: StandardizedTransformer,
    prompts: Any,
    layers: Indices = None,
    *,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
) -> WeightedAttention:
    """Attention probabilities times the norm of what is attended to (Kobayashi et al., 2020, section 2.2).

    A head may attend to a token and take next to nothing from it: the value there is small, as of most attention sinks.
    Each probability is multiplied by the Euclidean norm of the key's value through the head's part of W_O, without its
    bias: the length of what this key adds to attention's output at this query. (A post-norm after attention, as in
    Gemma 2 and 3, is not in it.)

    Args:
        model: The model, loaded with `enable_attention_probs=True`.
        prompts: Texts, token ids or chats.
        layers: The layers; by default all that have attention patterns.
        batch_size: Prompts of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: its prompts are not run again.

    Returns:
        A `WeightedAttention`; queries and keys are each prompt's own tokens. It grows with layers × heads × tokens².

    Raises:
        Unavailable: No layer, or one that was asked for, has attention patterns and values; or a head's output is not
            its probabilities times its values (a gate or a norm stands before W_O).
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` `[prompts]` is False.

    Example:
        weighted = value_weighted_attention(model, "The capital of France is", layers=4)["weighted"]
        print(list(weighted.shape))  # → [1, 1, 4, 5, 5]
    """
    model.require_no_trace("value_weighted_attention()")
    check_batch_size(batch_size)
    model.prepare(remote)
    chosen = layers_with(model, list(READ), layers)
    for layer in chosen:
        through_out(model, layer)
    rows = encode(model, prompts)
    call = Call(model, "value_weighted_attention", {"prompts": ids_of(rows), "layers": chosen}, {})
    run = _Weighting(model, rows, chosen, resumed(call, resume))
    with call.keeping(lambda: unfinished(call, run.result, run.done, ("prompts",))):
        run.batches(batch_size, progress, remote)
    return run.result()


class _Weighting:
    """The batches of a call.

    Attributes:
        whole: By name, patterns and norms of all prompts, NaN where nothing is read.
        done: Which prompts are read.
    """

    def __init__(
        self, model: StandardizedTransformer, rows: list[Row], layers: list[int], earlier: Result | None
    ) -> None:
        self.model, self.rows, self.layers, self.order = model, rows, layers, sorted(set(layers))
        self.whole: dict[str, torch.Tensor] = {}
        self.done = torch.zeros(len(rows), dtype=torch.bool)
        if earlier is not None:
            self.done = earlier[DONE].clone()
            self.whole = {name: t.clone() for name, t in earlier.tensors.items() if name != DONE}

    def batches(self, batch_size: BatchSize, progress: bool | None, remote: Any) -> None:
        """Run the prompts that are not done."""
        left = [i for i in range(len(self.rows)) if not self.done[i]]

        def step(batch: Batch) -> None:
            found, errors = _read(self.model, batch, self.order, remote)
            limit = tolerance(next(self.model._module.parameters()).dtype)
            made = dict(zip(self.order, map(float, errors), strict=True))
            refuse(self.model, made, limit, "a head's output is not its attention times its values")
            for row, i in enumerate(batch.indices):
                own = slice(batch.starts[row], batch.starts[row] + len(batch.rows[row]))
                self._keep(left[i], row, own, found)
                self.done[left[i]] = True

        if left:
            in_batches(self.model, [self.rows[i] for i in left], batch_size, step, "value_weighted_attention", progress)

    def _keep(self, prompt: int, row: int, own: slice, found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep one row of a batch, cut to the prompt's own tokens."""
        heads, size = max(pattern.shape[1] for pattern, _ in found), own.stop - own.start
        if not self.whole:
            self.whole = self._empty(heads)
        for k, layer in enumerate(self.layers):
            pattern, norms = (t[row].float().cpu() for t in found[self.order.index(layer)])
            pattern, norms = pattern[:, own, own], norms[own].T  # [heads, query, key], [heads, key]
            at = (prompt, k, slice(0, len(pattern)), slice(0, size))
            self.whole["weighted"][(*at, slice(0, size))] = pattern * norms[:, None]
            self.whole["pattern"][(*at, slice(0, size))] = pattern
            self.whole["value_norms"][at] = norms

    def _empty(self, heads: int) -> dict[str, torch.Tensor]:
        shape = (len(self.rows), len(self.layers), heads, *[max(map(len, self.rows))] * 2)
        made = {name: torch.full(shape, float("nan")) for name in ("weighted", "pattern")}
        return {**made, "value_norms": torch.full(shape[:-1], float("nan"))}

    def result(self) -> WeightedAttention:
        """What is read, with labels."""
        whole = self.whole or self._empty(1)
        width = whole["weighted"].shape[-1]
        axes = dict.fromkeys(("weighted", "pattern"), ("prompts", "layers", "heads", "query", "key"))
        labels = {
            "prompts": prompt_labels(self.rows, self.model),
            "layers": tuple(self.layers),
            "heads": tuple(range(whole["weighted"].shape[2])),
            "query": tuple(range(width)),
            "key": tuple(range(width)),
        }
        tokens = tuple((*exact_texts(self.model, row.ids), *[None] * (width - len(row))) for row in self.rows)
        about = describe_run(self.model, "value_weighted_attention")
        return WeightedAttention(
            dict(whole), axes | {"value_norms": ("prompts", "layers", "heads", "key")}, labels, tokens, about=about
        )


@torch.no_grad()
def _read(
    model: StandardizedTransformer, batch: Batch, layers: list[int], remote: Any
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """For each layer the pattern `[batch, heads, query, key]` and value norms `[batch, key, heads]`; and its error."""
    steps = forward_steps(model, [(name, layer) for layer in layers for name in READ])
    own, count, hidden = batch.attention_mask.bool(), len(READ), model.hidden_size or 1
    with model.trace(batch.encoding, remote=remote, **forward_flags(model)) as tracer:
        passing, read = Passing(model), {}
        found, errors = [], []
        for step in steps:
            if step.term is not None:
                passing.hold(step)
                continue
            name, layer = step.key
            assert isinstance(layer, int)
            read[name] = passing.read(step.key)
            if len(read) < count:
                continue
            pattern = read[PATTERN]
            values = by_head(read[VALUES], pattern.shape[1])
            found.append((pattern, norms_through(model, layer, values, hidden)))
            errors.append(mixing_error(pattern, values, read[HEADS], own))
            read = {}
        nnsight.save(found)
        nnsight.save(errors)
        tracer.stop()
    return found, errors
