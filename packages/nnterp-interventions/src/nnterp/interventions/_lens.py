"""The logit lens: what every layer would predict if it were the last one (nostalgebraist, 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nnsight
import torch

from nnterp.errors import ShapeError
from nnterp.inputs import Batch, Row, encode
from nnterp.interventions._results import Result, describe_run, prompt_labels, token_texts, vocabulary_of
from nnterp.interventions._running import BatchSize, forward_flags, in_batches
from nnterp.interventions._tokens import groups_per_prompt
from nnterp.positions import Positions, resolve
from nnterp.record import Record
from nnterp.values import layer_index

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READOUT_NUMBERS = 1 << 23  # logits that are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(Result):
    """What a lens reads: any of `top_probs` and `top_ids`, `target_probs` and `target_ranks`, `entropy` (in nats).

    All have the axes `prompts`, `layers` and, where positions were asked for, `positions`; then `top` or `targets`.
    `targets` are places in each prompt's own list of targets, whose ids are in `target_ids`.
    """

    figure: ClassVar[str] = "lens"


class Reduction(Record):
    """What is made of the logits before they are let go.

    Attributes:
        probs: All probabilities.
        inverse: Also those of the negated hidden state.
        top_k: The most probable tokens.
        targets: `[prompts, targets, members]` token ids, -1 for none; members of one target count together.
        ranks: How many tokens are more probable than each target (than its most probable member).
        entropy: Of the next-token distribution, in nats.
    """

    def __init__(
        self,
        probs: bool = False,
        inverse: bool = False,
        top_k: int | None = None,
        targets: torch.Tensor | None = None,
        ranks: bool = False,
        entropy: bool = False,
    ) -> None:
        self.probs, self.inverse, self.top_k = probs, inverse, top_k
        self.targets, self.ranks, self.entropy = targets, ranks, entropy

    def __call__(self, logits: torch.Tensor, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of float32 logits `[n, vocab]`, whose rows belong to `prompts` `[n]`."""
        found: dict[str, torch.Tensor] = {}
        if self.probs:
            found["probs"] = logits.softmax(-1)
        if self.top_k is None and self.targets is None and not self.entropy:
            return found
        logs = logits.log_softmax(-1)
        if self.top_k is not None:
            top, found["top_ids"] = logs.topk(self.top_k, dim=-1)
            found["top_probs"] = top.exp()
        if self.targets is not None:
            ids = self.targets.to(logits.device)[prompts.to(logits.device)]
            own = logs.gather(-1, ids.clamp(min=0).flatten(1)).view(ids.shape).masked_fill(ids < 0, -torch.inf)
            absent = (ids < 0).all(-1)
            found["target_probs"] = own.exp().sum(-1).masked_fill(absent, float("nan"))
            if self.ranks:
                best = own.amax(-1)
                ranks = [(logs > best[:, k : k + 1]).sum(-1) for k in range(best.shape[1])]
                found["target_ranks"] = torch.stack(ranks, dim=-1).masked_fill(absent, -1)
        if self.entropy:
            found["entropy"] = -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1)
        return found


@torch.no_grad()
def logit_lens(
    model: StandardizedTransformer,
    prompts: Any,
    remote: bool = False,
    return_inv_logits: bool = False,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = None,
    targets: Any = None,
    top_k: int | None = None,
    ranks: bool = False,
    entropy: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | LensResult:
    """Next-token probabilities of each prompt, read at the output of every layer.

    The hidden state goes through what the model itself does after its last layer (`model.project_on_vocab`), so the
    last layer's row is the model's own prediction. The forward pass stops after the last layer asked for. Prompts of
    different lengths are read at their own last tokens. (nostalgebraist, "interpreting GPT: the logit lens", 2020.)

    Args:
        model: The model.
        prompts: A text, or a list; anything that `nnterp.inputs.encode` takes.
        remote: Run on a remote service.
        return_inv_logits: Also return the probabilities read from the negated hidden state.
        layers: The layer or layers; all if None.
        positions: Where to read, over each prompt's own tokens; the last token if None.
        targets: Token ids (or texts of one token): one for all prompts, or a list with a token or a list of targets for
            each prompt, a target being a token or a list of tokens whose probabilities are added up. Their
            probabilities are returned, and the vocabulary never leaves the model.
        top_k: Return the most probable tokens instead of the vocabulary.
        ranks: Also return the ranks of the targets, 0 for the most probable token.
        entropy: Return the entropy of the distribution, in nats.
        batch_size: Prompts in one forward pass; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.

    Returns:
        `[prompts, layers, vocab]`, with `positions` `[prompts, layers, positions, vocab]`, float32, on the CPU (NaN
        where a shorter prompt has no such position). With `return_inv_logits` a pair of these. With `targets` alone the
        same with an axis of targets for the vocabulary; with `top_k`, `ranks` or `entropy` a `LensResult`.

    Raises:
        IndexError: There is no such layer or position.
        ValueError: There are no prompts, targets do not fit them, or `ranks` is asked for without `targets`.
        InsideTraceError: Called inside a trace of the same model.
        Unavailable: It is not proven what this model does after its last layer.
    """
    model.require_no_trace("logit_lens()")
    rows = encode(model, prompts)
    chosen = layers_of(model, layers)
    where = [resolve(model, row, -1 if positions is None else positions, f"prompt {i}") for i, row in enumerate(rows)]
    reduced = targets is not None or top_k is not None or entropy
    if ranks and targets is None:
        raise ValueError("ranks=True asks for the ranks of targets, but no targets were given.")
    if top_k is not None and (top_k < 1 or top_k > (model.vocab_size or top_k)):
        raise ValueError(f"top_k goes from 1 to {model.vocab_size}, the size of the vocabulary, not {top_k}.")
    ids = None if targets is None else groups_per_prompt(model, targets, len(rows), "targets")
    reduction = Reduction(not reduced, return_inv_logits, top_k, ids, ranks, entropy)
    tensors = _run(model, rows, chosen, where, reduction, remote, batch_size, progress)
    if positions is None:
        tensors = {name: tensor.squeeze(2) for name, tensor in tensors.items()}
    if reduced and top_k is None and not ranks and not entropy:
        return tensors["target_probs"]
    if not reduced:
        return (tensors["probs"], tensors["inverse"]) if return_inv_logits else tensors["probs"]
    about = describe_run(model, "logit_lens", layers=chosen, positions=positions, targets=targets, top_k=top_k)
    return _result(model, rows, chosen, None if positions is None else where, tensors, ids, about)


logit_lens.reduces_targets = True  # it can be asked for targets, see nnterp.prompts


def logit_lens_table(
    model: StandardizedTransformer,
    prompts: Any,
    top_k: int = 5,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = None,
    targets: Any = None,
    remote: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> LensResult:
    """The logit lens at every layer and position, reduced to what a table or a figure shows.

    Args:
        model, prompts, layers, remote, batch_size, progress: As in `logit_lens`.
        top_k: Most probable tokens to keep.
        positions: Where to read, over each prompt's own tokens; all if None.
        targets: Tokens whose probabilities and ranks to keep.

    Returns:
        `top_probs` and `top_ids` `[prompts, layers, positions, top]`, `entropy` `[prompts, layers, positions]`; with
        targets also `target_probs` and `target_ranks` `[prompts, layers, positions, targets]`.
    """
    result = logit_lens(
        model,
        prompts,
        remote,
        layers=layers,
        positions=slice(None) if positions is None else positions,
        targets=targets,
        top_k=top_k,
        ranks=targets is not None,
        entropy=True,
        batch_size=batch_size,
        progress=progress,
    )
    assert isinstance(result, LensResult)
    return result


def _run(
    model: StandardizedTransformer,
    rows: list[Row],
    layers: list[int],
    where: list[tuple[int, ...]],
    reduction: Reduction,
    remote: bool,
    batch_size: BatchSize,
    progress: bool | None,
) -> dict[str, torch.Tensor]:
    """Every reduced tensor as `[prompts, layers, positions, ...]`, gaps filled with NaN or -1."""
    model.prepare(remote)
    flags = forward_flags(model)
    width = max(len(w) for w in where)
    order = sorted(set(layers))
    back = None if order == layers else torch.tensor([order.index(layer) for layer in layers])
    whole: dict[str, torch.Tensor] = {}

    def step(batch: Batch) -> None:
        spots = [[batch.starts[r] + p for p in where[i]] for r, i in enumerate(batch.indices)]
        row_index = torch.tensor([r for r, own in enumerate(spots) for _ in own])
        seq_index = torch.tensor([p for own in spots for p in own])
        place = torch.tensor([k for own in spots for k in range(len(own))])
        owner = torch.tensor(batch.indices)[row_index]
        if not len(row_index):
            return
        size = batch.input_ids.shape
        with model.trace(batch.encoding, remote=remote, **flags) as tracer:
            states = []
            for layer in order:
                stream = model.layers_output[layer]
                require_stream(stream, size)
                states.append(stream[row_index.to(stream.device), seq_index.to(stream.device)])
            hidden = torch.stack([state.to(states[-1].device) for state in states], dim=1)  # [spots, layers, hidden]
            found = nnsight.save(_read_out(model, hidden, owner, reduction))
            tracer.stop()
        complete = torch.equal(owner * width + place, torch.arange(len(rows) * width))
        for name, flat in found.items():
            tensor = flat.unflatten(0, (len(row_index), len(order)))
            if back is not None:
                tensor = tensor[:, back]
            if complete:  # one batch holds every position of every prompt, in order
                whole[name] = tensor.unflatten(0, (len(rows), width)).transpose(1, 2)
                continue
            if name not in whole:
                gap = float("nan") if tensor.is_floating_point() else -1
                whole[name] = torch.full((len(rows), len(layers), width, *tensor.shape[2:]), gap, dtype=tensor.dtype)
            whole[name][owner[:, None], torch.arange(len(layers))[None], place[:, None]] = tensor

    in_batches(model, rows, batch_size, step, "logit lens", progress)
    return whole


def _read_out(
    model: StandardizedTransformer, hidden: torch.Tensor, owner: torch.Tensor, reduction: Reduction
) -> dict[str, torch.Tensor]:
    """Reduced logits of hidden states `[spots, layers, hidden]` as `[spots * layers, ...]`, some at a time."""
    flat = hidden.flatten(0, 1)
    prompts = owner.repeat_interleave(hidden.shape[1])
    size = max(1, READOUT_NUMBERS // (model.vocab_size or 1 << 16))
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, flat.shape[0], size):
        some = flat[start : start + size]
        part = reduction(model.project_on_vocab(some).float(), prompts[start : start + size])
        if reduction.inverse:
            part["inverse"] = model.project_on_vocab(-some).float().softmax(-1)
        parts.append({name: tensor.cpu() for name, tensor in part.items()})
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def require_stream(stream: torch.Tensor, shape: torch.Size) -> None:
    """Raise unless a residual stream is `[batch, seq, hidden]`.

    Raises:
        ShapeError: It is laid out otherwise (several streams side by side), so a row of it is not one hidden state.
    """
    if stream.dim() != 3 or stream.shape[:2] != shape:
        raise ShapeError(
            f"The residual stream of this model has shape {list(stream.shape)}, not [batch, seq, hidden] with "
            f"{list(shape)} tokens: it carries several streams, and none of them alone is a hidden state to read out."
        )


def layers_of(model: StandardizedTransformer, layers: int | Sequence[int] | None) -> list[int]:
    """Layers asked for as indices from 0."""
    if layers is None:
        return list(range(model.num_layers))
    wanted: list[int] = list(layers) if isinstance(layers, Iterable) else [layers]
    if not wanted:
        raise ValueError("layers is empty; give at least one layer, or None for all.")
    return [layer_index(layer, model.num_layers, "layers") for layer in wanted]


def _result(
    model: StandardizedTransformer,
    rows: list[Row],
    layers: list[int],
    where: list[tuple[int, ...]] | None,
    tensors: dict[str, torch.Tensor],
    target_ids: torch.Tensor | None,
    about: dict[str, Any],
) -> LensResult:
    lead: tuple[str, ...] = ("prompts", "layers") if where is None else ("prompts", "layers", "positions")
    labels: dict[str, tuple[Any, ...]] = {"prompts": prompt_labels(rows, model), "layers": tuple(layers)}
    order = ("top_probs", "top_ids", "target_probs", "target_ranks", "entropy")
    kept = {name: tensors[name] for name in order if name in tensors}
    last = {"top_probs": "top", "top_ids": "top", "target_probs": "targets", "target_ranks": "targets"}
    axes = {name: (*lead, last[name]) if name in last else lead for name in kept}
    tokens: tuple[tuple[str | None, ...], ...] = ()
    if where is not None:
        width = max(len(w) for w in where)
        tokens = tuple(
            tuple(token_texts(model, [row.ids[p] for p in own])) + (None,) * (width - len(own))
            for row, own in zip(rows, where, strict=True)
        )
        same = all(own == where[0] for own in where)
        labels["positions"] = where[0] if same else tuple(range(width))
    if "top_probs" in kept:
        labels["top"] = tuple(range(kept["top_probs"].shape[-1]))
    if target_ids is not None:
        labels["targets"] = tuple(range(target_ids.shape[1]))
        single = target_ids.shape[2] == 1
        kept["target_ids"] = target_ids[..., 0] if single else target_ids
        axes["target_ids"] = ("prompts", "targets") if single else ("prompts", "targets", "members")
        if not single:
            labels["members"] = tuple(range(target_ids.shape[2]))
    seen = [kept[name].flatten() for name in ("top_ids", "target_ids") if name in kept]
    vocabulary = vocabulary_of(model, torch.cat(seen)) if seen else {}
    return LensResult(kept, axes, labels, tokens, vocabulary, about)
