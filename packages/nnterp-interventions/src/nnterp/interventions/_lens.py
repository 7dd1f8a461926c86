"""The logit lens: what the model would predict if it ended after a layer (nostalgebraist, 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nnsight
import torch

from nnterp.errors import ShapeError
from nnterp.inputs import Batch, Row, encode, forward_flags
from nnterp.interventions._layers import layers_of
from nnterp.interventions._reduction import Reduction
from nnterp.interventions._results import Result, describe_run, prompt_labels, token_texts, vocabulary_of
from nnterp.interventions._running import BatchSize, in_batches
from nnterp.interventions._tokens import groups_per_prompt
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.positions import Positions, resolve

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READOUT_NUMBERS = 1 << 23  # logits that are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(Result):
    """What a lens read: any of `top_probs` and `top_ids`, `target_probs` and `target_ranks`, `entropy` (in nats).

    All have the axes `prompts`, `layers` and, if positions were asked for, `positions`; then `top` or `targets`. The
    labels of `targets` are indices in each prompt's own list of targets, whose token ids are in `target_ids`.
    """

    figure: ClassVar[str] = "lens"


@takes_nnsight_models
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

    The hidden state goes through everything that the model itself does after its last layer
    (`model.project_on_vocab`), so the last layer gives the model's own prediction. The forward pass stops after the
    last layer asked for. Prompts of different lengths are read at their own last tokens. (nostalgebraist,
    "interpreting GPT: the logit lens", 2020.)

    Args:
        model: The model.
        prompts: A text, or a list; anything that `nnterp.inputs.encode` takes.
        remote: Run on a remote service.
        return_inv_logits: Also return the probabilities read from the negated hidden state.
        layers: The layer or layers; all if None.
        positions: Where to read, over each prompt's own tokens; the last token if None.
        targets: Return only the probabilities of these tokens (ids, or texts of one token): one token for all prompts,
            or a list with a token or a list of targets for each prompt. A target is a token or a list of tokens whose
            probabilities are added up.
        top_k: Return the most probable tokens instead of the vocabulary.
        ranks: Also return the ranks of the targets, 0 for the most probable token.
        entropy: Return the entropy of the distribution, in nats.
        batch_size: Prompts in one forward pass; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.

    Returns:
        `[prompts, layers, vocab]`, with `positions` `[prompts, layers, positions, vocab]`, float32, on the CPU (NaN
        where a shorter prompt has no such position). With `return_inv_logits` a pair of these. With `targets` alone the
        last axis is targets instead of the vocabulary. With `top_k`, `ranks` or `entropy` a `LensResult`.

    Raises:
        IndexError: There is no such layer or position.
        ValueError: There are no prompts, targets do not fit them, or `ranks` is asked for without `targets`.
        InsideTraceError: Called inside a trace of the same model.
        Unavailable: What this model does after its last layer is not proven.
    """
    model.require_no_trace("logit_lens()")
    encoded = encode(model, prompts)
    chosen = layers_of(model, layers)
    read_at = -1 if positions is None else positions
    where = [resolve(model, prompt, read_at, f"prompt {i}") for i, prompt in enumerate(encoded)]
    reduced = targets is not None or top_k is not None or entropy
    if ranks and targets is None:
        raise ValueError("ranks=True asks for the ranks of targets, but no targets were given.")
    if top_k is not None and (top_k < 1 or top_k > (model.vocab_size or top_k)):
        raise ValueError(f"top_k goes from 1 to {model.vocab_size}, the size of the vocabulary, not {top_k}.")
    ids = None if targets is None else groups_per_prompt(model, targets, len(encoded), "targets")
    reduction = Reduction(not reduced, return_inv_logits, top_k, ids, ranks, entropy)
    tensors = _run(model, encoded, chosen, where, reduction, remote, batch_size, progress)
    if positions is None:
        tensors = {name: tensor.squeeze(2) for name, tensor in tensors.items()}
    if reduced and top_k is None and not ranks and not entropy:
        return tensors["target_probs"]
    if not reduced:
        return (tensors["probs"], tensors["inverse"]) if return_inv_logits else tensors["probs"]
    about = describe_run(model, "logit_lens", layers=chosen, positions=positions, targets=targets, top_k=top_k)
    return _result(model, encoded, chosen, None if positions is None else where, tensors, ids, about)


logit_lens.reduces_targets = True  # type: ignore[attr-defined]  # read by nnterp.prompts: this lens takes `targets`


@takes_nnsight_models
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
    """The logit lens at every layer and position, reduced to the numbers that a table or a figure shows.

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


@dataclass(frozen=True)
class _Spots:
    """Where the hidden states of a batch are read, one entry for each position of each prompt.

    Attributes:
        row: Row of the batch.
        seq: Position in the padded batch.
        prompt: Index of the prompt among all prompts.
        place: Index of the position among those read of this prompt.
    """

    row: torch.Tensor
    seq: torch.Tensor
    prompt: torch.Tensor
    place: torch.Tensor


def _spots(batch: Batch, where: list[tuple[int, ...]]) -> _Spots:
    own = [[batch.starts[row] + p for p in where[i]] for row, i in enumerate(batch.indices)]
    row = torch.tensor([row for row, positions in enumerate(own) for _ in positions], dtype=torch.long)
    seq = torch.tensor([p for positions in own for p in positions], dtype=torch.long)
    place = torch.tensor([k for positions in own for k in range(len(positions))], dtype=torch.long)
    return _Spots(row, seq, torch.tensor(batch.indices)[row], place)


def _run(
    model: StandardizedTransformer,
    prompts: list[Row],
    layers: list[int],
    where: list[tuple[int, ...]],
    reduction: Reduction,
    remote: bool,
    batch_size: BatchSize,
    progress: bool | None,
) -> dict[str, torch.Tensor]:
    """Every reduced tensor as `[prompts, layers, positions, ...]`, NaN or -1 where a prompt has fewer positions."""
    model.prepare(remote)
    width = max(len(w) for w in where)
    order = sorted(set(layers))
    back = None if order == layers else torch.tensor([order.index(layer) for layer in layers])
    whole: dict[str, torch.Tensor] = {}

    def step(batch: Batch) -> None:
        spots = _spots(batch, where)
        if not len(spots.row):
            return
        found = _read(model, batch, order, spots, reduction, remote)
        complete = torch.equal(spots.prompt * width + spots.place, torch.arange(len(prompts) * width))
        for name, flat in found.items():
            tensor = flat.unflatten(0, (len(spots.row), len(order)))
            if back is not None:
                tensor = tensor[:, back]
            if complete:  # one batch holds every position of every prompt, in order
                whole[name] = tensor.unflatten(0, (len(prompts), width)).transpose(1, 2)
                continue
            if name not in whole:
                gap = float("nan") if tensor.is_floating_point() else -1
                shape = (len(prompts), len(layers), width, *tensor.shape[2:])
                whole[name] = torch.full(shape, gap, dtype=tensor.dtype)
            whole[name][spots.prompt[:, None], torch.arange(len(layers))[None], spots.place[:, None]] = tensor

    in_batches(model, prompts, batch_size, step, "logit lens", progress)
    return whole


def _read(
    model: StandardizedTransformer, batch: Batch, layers: list[int], spots: _Spots, reduction: Reduction, remote: bool
) -> dict[str, torch.Tensor]:
    """Run one batch up to the last of these layers; reduced tensors `[spots * layers, ...]`."""
    row, seq, prompt, size = spots.row, spots.seq, spots.prompt, batch.input_ids.shape
    # Computed here, because a remote worker does not know the size of the vocabulary.
    most = max(1, READOUT_NUMBERS // (model.vocab_size or 1 << 16))
    with model.trace(batch.encoding, remote=remote, **forward_flags(model)) as tracer:
        states = []
        for layer in layers:
            stream = tokens_first(model.layers_output[layer], model.readout.layout.batch)
            require_stream(stream, size)
            states.append(stream[row.to(stream.device), seq.to(stream.device)])
        hidden = torch.stack([state.to(states[-1].device) for state in states], dim=1)  # [spots, layers, ..., hidden]
        found = nnsight.save(_read_out(model, hidden, prompt, reduction, most))
        tracer.stop()
    return found


def _read_out(
    model: StandardizedTransformer, hidden: torch.Tensor, prompt: torch.Tensor, reduction: Reduction, most: int
) -> dict[str, torch.Tensor]:
    """Reduced logits of hidden states `[spots, layers, ..., hidden]`, `[spots * layers, ...]`, `most` at a time."""
    flat = hidden.flatten(0, 1)
    prompts = prompt.repeat_interleave(hidden.shape[1])
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, flat.shape[0], most):
        some = flat[start : start + most]
        part = reduction(project(model, some).float(), prompts[start : start + most])
        if reduction.inverse:
            part["inverse"] = project(model, -some).float().softmax(-1)
        parts.append({name: tensor.cpu() for name, tensor in part.items()})
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def tokens_first(stream: torch.Tensor, batch: int) -> torch.Tensor:
    """A residual stream with batch and sequence in front; `[batch, seq, streams, hidden]` where there are several."""
    return stream if batch == 0 else stream.movedim((batch, batch + 1), (0, 1))


def project(model: StandardizedTransformer, states: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states `[states, hidden]`, or `[states, streams, hidden]`: `[states, vocab]`."""
    layout = model.readout.layout
    if layout.plain:
        return model.project_on_vocab(states)
    whole = states.unsqueeze(1)  # each is a row of one token, laid out as in `layers_output`
    return model.project_on_vocab(whole.movedim((0, 1), (layout.batch, layout.batch + 1)))[:, 0]


def require_stream(stream: torch.Tensor, shape: torch.Size) -> None:
    """Raise unless a residual stream begins with `[batch, seq]`.

    Raises:
        ShapeError: It does not, so it has no hidden state for each token.
    """
    if stream.dim() < 3 or stream.shape[:2] != shape:
        raise ShapeError(
            f"The residual stream of this model has shape {list(stream.shape)}, which does not begin with [batch, seq] "
            f"of {list(shape)} tokens, so it has no hidden state for each token to read out."
        )


def _result(
    model: StandardizedTransformer,
    prompts: list[Row],
    layers: list[int],
    where: list[tuple[int, ...]] | None,
    tensors: dict[str, torch.Tensor],
    target_ids: torch.Tensor | None,
    about: dict[str, Any],
) -> LensResult:
    lead: tuple[str, ...] = ("prompts", "layers") if where is None else ("prompts", "layers", "positions")
    labels: dict[str, tuple[Any, ...]] = {"prompts": prompt_labels(prompts, model), "layers": tuple(layers)}
    order = ("top_probs", "top_ids", "target_probs", "target_ranks", "entropy")
    kept = {name: tensors[name] for name in order if name in tensors}
    last = {"top_probs": "top", "top_ids": "top", "target_probs": "targets", "target_ranks": "targets"}
    axes = {name: (*lead, last[name]) if name in last else lead for name in kept}
    tokens: tuple[tuple[str | None, ...], ...] = ()
    if where is not None:
        tokens, labels["positions"] = _position_labels(model, prompts, where)
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


def _position_labels(
    model: StandardizedTransformer, prompts: list[Row], where: list[tuple[int, ...]]
) -> tuple[tuple[tuple[str | None, ...], ...], tuple[int, ...]]:
    """The tokens at each prompt's positions; and labels: the positions, or their numbers if prompts have others."""
    width = max(len(w) for w in where)
    tokens = tuple(
        tuple(token_texts(model, [prompt.ids[p] for p in own])) + (None,) * (width - len(own))
        for prompt, own in zip(prompts, where, strict=True)
    )
    same = all(own == where[0] for own in where)
    return tokens, where[0] if same else tuple(range(width))
