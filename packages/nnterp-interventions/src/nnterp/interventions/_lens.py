"""The logit lens: what the model would predict if it ended after a layer (nostalgebraist, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import nnsight
import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.devices import device_of
from nnterp.indices import Indices
from nnterp.inputs import Batch, Row, all_images, encode, forward_flags
from nnterp.interventions._fitted._lens import Lens, mapped
from nnterp.interventions._inverse import INVERSE, inverse_logits, split_inverse
from nnterp.interventions._layers import layers_of
from nnterp.interventions._lens_run import LensRun
from nnterp.interventions._partial import Resume, ids_of, resumed
from nnterp.interventions._reduction import Reduction
from nnterp.interventions._results import (
    Result,
    describe_run,
    exact_texts,
    prompt_labels,
    token_bytes_of,
    vocabulary_of,
)
from nnterp.interventions._running import BatchSize, check_batch_size, in_batches
from nnterp.interventions._spots import Spots, spots_of, states_at
from nnterp.interventions._tokens import groups_per_prompt
from nnterp.memory import require_memory, size_of
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.positions import Positions, per_prompt, plain_positions, resolve
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READOUT_NUMBERS = 1 << 23  # logits that are held at a time
Maps = list[tuple[torch.Tensor, torch.Tensor | None] | None]  # of a fitted lens, for each layer; see `Lens.maps_for`


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(Result):
    """What a lens read: any of `top_probs` and `top_ids`, `target_probs` and `target_ranks`, `entropy` (in nats).

    With `against_last` also `last_ranks` and `kl` (in nats), against the model's last layer. All have the axes
    `prompts`, `layers` and, if positions were asked for, `positions`; then `top` or `targets`. The labels of `targets`
    are indices in each prompt's own list of targets, whose token ids are in `target_ids`. `input_ids` `[prompts,
    positions]` are the prompts' own tokens at these positions.

    Example:
        print(logit_lens(model, prompts, targets=" Paris", ranks=True)["target_ranks"][0, -1].tolist())  # → [0]
    """

    figure: ClassVar[str] = "lens"


@takes_nnsight_models
@plain_defaults()
@torch.no_grad()
def logit_lens(
    model: StandardizedTransformer,
    prompts: Any,
    remote: bool = False,
    return_inv_logits: bool = False,
    *,
    layers: Indices = None,
    lens: Lens | None = None,
    positions: Positions = None,
    targets: Any = None,
    top_k: int | None = None,
    ranks: bool = False,
    entropy: bool = False,
    against_last: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    resume: Resume = None,
) -> torch.Tensor | LensResult | tuple[torch.Tensor, torch.Tensor] | tuple[LensResult, LensResult]:
    """Next-token probabilities of each prompt, read at the output of every layer.

    The hidden state goes through everything that the model itself does after its last layer
    (`model.project_on_vocab`), so the last layer gives the model's own prediction. The forward pass stops after the
    last layer read. Prompts of different lengths are read at their own last tokens. (nostalgebraist 2020.)

    Args:
        model: The model.
        prompts: A text, or a list; anything that `nnterp.inputs.encode` takes.
        remote: Run on a remote service.
        return_inv_logits: Also return the same of the inverse logits: the head is given the negative of what it is
            given otherwise, `-ln_final(hidden)`. A softcap or a scale after the head is applied to what it returns.
        layers: The layer or layers; all if None.
        lens: A fitted lens: the hidden state goes through its map first. With it, `layers` are those that it has a map
            for, and the last, if None.
        positions: Where to read, over each prompt's own tokens, as in `model.collect`; the last token if None.
        targets: Return only the probabilities of these tokens (ids, or texts of one token): one token for all prompts,
            or a list with a token or a list of targets for each prompt. A target is a token or a list of tokens whose
            probabilities are added up.
        top_k: Return the most probable tokens instead of the vocabulary.
        ranks: Also return the ranks of the targets, 0 for the most probable token.
        entropy: Return the entropy of the distribution, in nats.
        against_last: Return how each layer compares with the model's last, which is then read too, whether asked for
            or not: `last_ranks`, the rank of the token on top there (0 is the top), and `kl`, KL(last ‖ layer) in nats.
        batch_size: Prompts in one forward pass; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        `[prompts, layers, vocab]`, with `positions` `[prompts, layers, positions, vocab]`, float32, on the CPU (NaN
        where a shorter prompt has no such position). With `targets` alone the last axis is targets instead of the
        vocabulary. With `top_k`, `ranks`, `entropy` or `against_last` a `LensResult`. With `return_inv_logits` a pair:
        this, and the same of the inverse logits.

    Raises:
        IndexError: There is no such layer or position.
        ValueError: There are no prompts, targets do not fit them, `ranks` is asked for without `targets`, or the lens
            is of another model, or does not lead to the last layer.
        KeyError: The lens has no map for a layer.
        TypeError: `lens` is no `Lens`.
        InsideTraceError: Called inside a trace of the same model.
        Unavailable: What this model does after its last layer is not proven.

        An error or KeyboardInterrupt in the middle carries a partial result as `error.partial`: NaN where not `done`.

    Example:
        print(model.tokenizer.decode(logit_lens(model, prompts)[0, -1].argmax()))  # → Paris
    """
    model.require_no_trace("logit_lens()")
    encoded = encode(model, prompts, images=True)
    if lens is not None and not isinstance(lens, Lens):
        raise TypeError(f"lens is a Lens, as fit_tuned_lens() returns it, not {lens!r:.80}.")
    if lens is not None:
        lens.require_last("logit_lens()")
        model.prepare(remote)
        lens.check(model)
        layers = (*lens.layers, model.num_layers - 1) if layers is None else layers
    chosen = layers_of(model, layers, images=all_images(model, encoded))
    last = max(layers_of(model, None, images=all_images(model, encoded))) if against_last else None
    read = sorted({*chosen} if last is None else {*chosen, last})  # `against_last` needs the last layer, shown or not
    maps: Maps = [None] * len(read) if lens is None else lens.maps_for(read)
    plain = plain_positions(positions)
    each = per_prompt(-1 if positions is None else plain, len(encoded))
    where = [resolve(model, row, own, f"prompt {i}") for i, (row, own) in enumerate(zip(encoded, each, strict=True))]
    reduced = targets is not None or top_k is not None or entropy or against_last
    if ranks and targets is None:
        raise ValueError("ranks=True asks for the ranks of targets, but no targets were given.")
    if top_k is not None:
        top_k = count(top_k, "top_k", 1, model.vocab_size)
    check_batch_size(batch_size)
    ids = None if targets is None else groups_per_prompt(model, targets, len(encoded), "targets")
    reduction = Reduction(not reduced, return_inv_logits, top_k, ids, ranks, entropy, against_last)
    if not reduced:
        whole = (1 + return_inv_logits, len(encoded), len(chosen), max(map(len, where)), model.vocab_size or 0)
        smaller = "Ask for targets=, top_k= or entropy= instead of all probabilities, or for fewer layers or positions."
        what = f"Probabilities of the whole vocabulary at {len(chosen)} layers of {len(encoded)} prompts"
        require_memory(size_of(whole, torch.float32), torch.device("cpu"), what, smaller)
    asked: dict[str, Any] = {"layers": chosen, "positions": plain, "targets": targets, "top_k": top_k}
    compared = {} if last is None else {"against_last": last}
    asked |= compared if lens is None else {"lens": lens.kind, "fitted_on": lens.origin.model} | compared
    settings = {"ranks": ranks, "entropy": entropy, "inverse": return_inv_logits, "read_at": where, "ids": ids}
    settings |= compared if lens is None else {"lens": lens} | compared
    call = Call(model, "logit_lens", {"prompts": ids_of(encoded), "layers": chosen, "top_k": top_k, **settings})
    found = LensRun(resumed(call, resume), prompt_labels(encoded, model), chosen)
    with call.keeping(lambda: found.partial(call, describe_run(model, "logit_lens", **asked))):
        _run(model, encoded, chosen, read, maps, where, reduction, remote, batch_size, progress, found)
    tensors = found.whole
    if positions is None:
        tensors = {name: tensor.squeeze(2) for name, tensor in tensors.items()}
    readings = [tensors] if not return_inv_logits else split_inverse(tensors)
    if not reduced or (top_k is None and not ranks and not entropy and not against_last):
        name = "target_probs" if reduced else "probs"
        return readings[0][name] if not return_inv_logits else (readings[0][name], readings[1][name])
    results = []
    for inverse, own in enumerate(readings):
        about = describe_run(model, "logit_lens", **asked, **({"inverse": True} if inverse else {}))
        results.append(_result(model, encoded, chosen, None if positions is None else where, own, ids, about))
    return (results[0], results[1]) if return_inv_logits else results[0]


logit_lens.reduces_targets = True  # type: ignore[attr-defined]  # read by nnterp.prompts: this lens takes `targets`


@takes_nnsight_models
def logit_lens_table(
    model: StandardizedTransformer,
    prompts: Any,
    top_k: int = 5,
    *,
    layers: Indices = None,
    lens: Lens | None = None,
    positions: Positions = None,
    targets: Any = None,
    remote: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    resume: Resume = None,
) -> LensResult:
    """The logit lens at every layer and position, reduced to the numbers that a table or a figure shows.

    Args:
        model, prompts, layers, lens, remote, batch_size, progress, resume: As in `logit_lens`.
        top_k: Most probable tokens to keep.
        positions: Where to read, over each prompt's own tokens; all if None.
        targets: Tokens whose probabilities and ranks to keep.

    Returns:
        `top_probs` and `top_ids` `[prompts, layers, positions, top]`; `entropy`, `last_ranks` and `kl` `[prompts,
        layers, positions]`, the last two against the model's last layer, which is read for them if `layers` leaves it
        out; `input_ids` `[prompts, positions]`; with targets also `target_probs` and `target_ranks` `[prompts, layers,
        positions, targets]`.

    Example:
        frame = logit_lens_table(model, prompts, top_k=3).to_dataframe()  # one row per layer, position and rank
    """
    result = logit_lens(
        model,
        prompts,
        remote,
        layers=layers,
        lens=lens,
        positions=slice(None) if positions is None else positions,
        targets=targets,
        top_k=top_k,
        ranks=targets is not None,
        entropy=True,
        against_last=True,
        batch_size=batch_size,
        progress=progress,
        resume=resume,
    )
    assert isinstance(result, LensResult)
    return result


def _run(
    model: StandardizedTransformer,
    prompts: list[Row],
    layers: list[int],
    order: list[int],
    maps: Maps,
    where: list[tuple[int, ...]],
    reduction: Reduction,
    remote: bool,
    batch_size: BatchSize,
    progress: bool | None,
    run: LensRun,
) -> None:
    """Fill in `[prompts, layers, positions, ...]` of the `layers` among those read in `order`; NaN or -1 in gaps."""
    model.prepare(remote)
    width = max(len(w) for w in where)
    maps = maps if remote else _placed(model, order, maps)
    back = None if order == layers else torch.tensor([order.index(layer) for layer in layers])
    whole, finished = run.whole, frozenset(run.done)

    def step(batch: Batch) -> None:
        spots = spots_of(batch, where)
        if finished.issuperset(batch.indices):
            return
        if not len(spots.row):
            run.done.update(batch.indices)
            return
        found = _read(model, batch, order, maps, spots, reduction, remote)
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
        run.done.update(batch.indices)

    in_batches(model, prompts, batch_size, step, "logit lens", progress)


def _placed(model: StandardizedTransformer, layers: list[int], maps: Maps) -> Maps:
    """The maps on the devices of their layers: copied once, and not for each batch."""
    found: Maps = []
    for layer, own in zip(layers, maps, strict=True):
        if own is not None:
            weight, bias = own
            device = device_of(model._module, [model._module.get_submodule(model.layer_paths[layer])])
            own = weight.to(device), None if bias is None else bias.to(device)
        found.append(own)
    return found


def _read(
    model: StandardizedTransformer,
    batch: Batch,
    layers: list[int],
    maps: Maps,
    spots: Spots,
    reduction: Reduction,
    remote: bool,
) -> dict[str, torch.Tensor]:
    """Run one batch up to the last of these layers; reduced tensors `[spots * layers, ...]`."""
    row, seq, prompt, size = spots.row, spots.seq, spots.prompt, batch.input_ids.shape
    # Computed here, because a remote worker does not know the size of the vocabulary.
    most = max(1, READOUT_NUMBERS // (model.vocab_size or 1 << 16))
    with model.trace(batch.encoding, remote=remote, **forward_flags(model)) as tracer:
        states = []
        for layer, own in zip(layers, maps, strict=True):
            stream = model.layers_output[layer]
            state = states_at(model, stream, row, seq, size)
            states.append(state if own is None else mapped(state, *own))
        hidden = torch.stack([state.to(states[-1].device) for state in states], dim=1)  # [spots, layers, ..., hidden]
        found = nnsight.save(_read_out(model, hidden, prompt, reduction, most))
        tracer.stop()
    return found


def _read_out(
    model: StandardizedTransformer, hidden: torch.Tensor, prompt: torch.Tensor, reduction: Reduction, most: int
) -> dict[str, torch.Tensor]:
    """Reduced logits of hidden states `[spots, layers, ..., hidden]`, `[spots * layers, ...]`, `most` at a time."""
    flat, layers = hidden.flatten(0, 1), hidden.shape[1]
    prompts = prompt.repeat_interleave(layers)
    step = max(most // layers, 1) * layers if reduction.against_last else most
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, flat.shape[0], step):
        some, own = flat[start : start + step], prompts[start : start + step]
        part = reduction(project(model, some).float(), own, layers)
        if reduction.inverse:
            inverse = reduction(inverse_logits(model, partial(project, model, some)).float(), own, layers)
            part.update({INVERSE + name: tensor for name, tensor in inverse.items()})
        parts.append({name: tensor.cpu() for name, tensor in part.items()})
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def project(model: StandardizedTransformer, states: torch.Tensor) -> torch.Tensor:
    """Logits `[spots, vocab]` of hidden states `[spots, hidden]`, or of several streams `[spots, streams, hidden]`."""
    if states.dim() == 2:
        return model.project_on_vocab(states)
    in_front = model.readout.layout.batch == 1
    given = states.transpose(0, 1)[:, :, None] if in_front else states[:, None]  # each a row of one position
    return model.project_on_vocab(given)[:, 0]


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
    order = ("top_probs", "top_ids", "target_probs", "target_ranks", "entropy", "last_ranks", "kl")
    kept = {name: tensors[name] for name in order if name in tensors}
    last = {"top_probs": "top", "top_ids": "top", "target_probs": "targets", "target_ranks": "targets"}
    axes = {name: (*lead, last[name]) if name in last else lead for name in kept}
    tokens: tuple[tuple[str | None, ...], ...] = ()
    if where is not None:
        tokens, labels["positions"] = _position_labels(model, prompts, where)
        kept["input_ids"], axes["input_ids"] = _input_ids(prompts, where), ("prompts", "positions")
    if "top_probs" in kept:
        labels["top"] = tuple(range(kept["top_probs"].shape[-1]))
    if target_ids is not None:
        labels["targets"] = tuple(range(target_ids.shape[1]))
        single = target_ids.shape[2] == 1
        kept["target_ids"] = target_ids[..., 0] if single else target_ids
        axes["target_ids"] = ("prompts", "targets") if single else ("prompts", "targets", "members")
        if not single:
            labels["members"] = tuple(range(target_ids.shape[2]))
    seen = [kept[name].flatten() for name in ("top_ids", "target_ids", "input_ids") if name in kept]
    vocabulary = vocabulary_of(model, torch.cat(seen)) if seen else {}
    return LensResult(kept, axes, labels, tokens, vocabulary, about, token_bytes_of(model, vocabulary))


def _input_ids(prompts: list[Row], where: list[tuple[int, ...]]) -> torch.Tensor:
    """The ids of each prompt's tokens at its positions, `[prompts, positions]`, -1 past their number."""
    ids = torch.full((len(prompts), max(len(own) for own in where)), -1)
    for row, prompt, own in zip(ids, prompts, where, strict=True):
        row[: len(own)] = torch.tensor([int(prompt.ids[p]) for p in own], dtype=ids.dtype)
    return ids


def _position_labels(
    model: StandardizedTransformer, prompts: list[Row], where: list[tuple[int, ...]]
) -> tuple[tuple[tuple[str | None, ...], ...], tuple[int, ...]]:
    """The tokens at each prompt's positions; and labels: the positions, or their numbers if prompts have others."""
    width = max(len(w) for w in where)
    tokens = tuple(
        tuple(exact_texts(model, [prompt.ids[p] for p in own])) + (None,) * (width - len(own))
        for prompt, own in zip(prompts, where, strict=True)
    )
    same = all(own == where[0] for own in where)
    return tokens, where[0] if same else tuple(range(width))
