"""The Jacobian lens: the average derivative of the stream after the last layer, or a given one, by an earlier one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices, read_index
from nnterp.inputs import Batch, batches, left_padded
from nnterp.interventions._fitted._belonging import Origin
from nnterp.interventions._fitted._checkpoint import Checkpoint
from nnterp.interventions._fitted._evaluation import report_of
from nnterp.interventions._fitted._lens import Lens
from nnterp.interventions._fitted._streams import (
    graph_of,
    require_one_stream,
    require_unsteered,
    states_of,
)
from nnterp.interventions._fitted._texts import SKIP_FIRST, digests_of, read_limits, rows_of, sources_of, split
from nnterp.interventions._running import weights_at_rest
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.progress import bar
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

TOKENS = 4096  # tokens of a backward pass, if nothing else is asked for
_TEXTS = 8  # texts of one batch


@takes_nnsight_models
@plain_defaults()
def fit_jacobian_lens(
    model: StandardizedTransformer,
    texts: Any,
    layers: Indices = None,
    *,
    to_layer: int = -1,
    skip_first: int = SKIP_FIRST,
    max_length: int = 128,
    rank: int | None = None,
    offset: bool = False,
    held_out: Any = 0.1,
    max_tokens: int = TOKENS,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> Lens:
    """Fit a Jacobian lens: for each layer, how the stream after the last layer moves when that layer's stream does.

    The map of layer l is the mean over texts, and over source positions t, of the sum over positions t' ≥ t of
    ∂h_last[t'] / ∂h_l[t]. Positions count from `skip_first` to the last but one of each text. (Gurnee et al., 2026;
    their estimator.) A batch of texts costs one forward, and `hidden` vector-Jacobian products, many of which are
    computed in one backward pass. Each serves all layers and all texts of the batch.

    A derivative says how the last stream changes, and not where it stands: what the layers between add to every text
    alike is lost. Where most of the stream is its own mean (Gemma 3), the lens is then worse than the logit lens.
    `offset=True` adds the constant that sends the mean stream to the mean stream. It does not help on every model:
    `lens.report` and `evaluate_lens` say what a lens is worth.

    Args:
        model: The model, with its weights here: this does not run remotely.
        texts: Texts, token ids, or a list of these; about a hundred of 128 tokens are customary.
        layers: The layer or layers; all before `to_layer` if None.
        to_layer: The layer whose stream is derived, in place of h_last. The head reads the last one only: a lens to an
            earlier layer is for `patchscope_lens(lens=...)`; it has no report, and no text is held out for one.
        skip_first: How many first positions of a text do not count.
        max_length: Tokens of a text that are used.
        rank: Fit only the part of the maps that leads into the `rank` leading principal directions of the stream after
            that layer, at `rank / hidden` of the cost; None for all of it.
        offset: Give each map the bias E[h_last] − J E[h_l], the mean over the same texts and positions: the expansion
            to first order about the mean. The lens of the paper has none. (Hernandez et al., 2024, section 3, add an
            offset to an averaged Jacobian too.) Costs another forward of each text.
        held_out: The share of the texts, drawn by `seed`, that is kept for `lens.report`; or texts for it; 0 for none.
        max_tokens: Most tokens in one backward pass, counting copies; lower it if memory runs out. A single text may
            have more.
        seed: Of the texts held out.
        checkpoint: A file in which the fit is kept after each batch, and from which a killed fit goes on, to the same
            lens bit for bit (on one thread; with several, rounding varies from run to run). Removed at the end.
        progress: Show a progress bar; None: after two seconds.

    Returns:
        A `Lens` of kind "jacobian", float32 on the CPU, whatever the model computes in. `lens.report` says what it is
        worth beside the logit lens.

    Raises:
        ValueError: A text is too short, nothing is left to fit on, the derivatives of a text are not finite, a layer
            is not before `to_layer`, `checkpoint` is of another fit, or the model is steered (`model.steering`).
        TypeError, IndexError: An argument is of another type, or there is no such layer.
        OSError: `checkpoint` cannot be written.
        Unavailable: The model has several streams side by side.
        InsideTraceError: Called inside a trace of this model.

        An error in the middle, KeyboardInterrupt included, carries the lens of the texts so far as `error.partial`.

    Example:
        lens = fit_jacobian_lens(model, ["The capital of France is Paris."], skip_first=0, held_out=0)
        probabilities = logit_lens(model, "The capital of France is", lens=lens)  # [prompts, layers, vocab]
    """
    model.require_no_trace("fit_jacobian_lens()")
    width = require_one_stream(model, "A Jacobian lens")
    target = read_index(to_layer, model.num_layers, "to_layer", "layers")
    chosen = sources_of(model, layers, target)
    most = count(max_tokens, "max_tokens")
    skip_first, limit = read_limits(skip_first, max_length)
    require_unsteered(model, "fit_jacobian_lens()")
    model.prepare()
    settings = (limit, skip_first)
    rows = rows_of(model, texts, *settings, "texts")
    fitted, kept = split(rows, held_out if target == model.num_layers - 1 else 0, seed, model, settings)
    if not isinstance(offset, bool):
        raise TypeError(f"offset is True or False, not {offset!r:.80}.")
    number = width if rank is None else count(rank, "rank", 1, width)
    arguments = {"texts": [row.ids for row in fitted], "layers": chosen, "skip_first": skip_first, "rank": number}
    size = max(1, min(_TEXTS, most // max(len(row) for row in fitted)))
    arguments |= {"max_tokens": most, "held_out": [row.ids for row in kept], "to_layer": target}
    with left_padded(model.tokenizer):
        parts = list(batches(model, fitted, size))
    arguments |= {"batches": [batch.indices for batch in parts]}
    arguments |= {"offset": True} if offset else {}
    call = Call(model, "fit_jacobian_lens", arguments)
    fit = _Fit(torch.zeros(len(chosen), number, width), torch.zeros(len(chosen) + 1, width), torch.empty(0), set())
    file = Checkpoint(checkpoint, call)
    if earlier := file.read():
        fit = _Fit(earlier["sums"], earlier["means"], earlier["basis"], set(earlier["done"].tolist()))

    def lens(report: dict[str, Any] | None = None) -> Lens:
        mean = fit.sums / len(fit.done)
        maps = {layer: mean[k] if rank is None else fit.basis.T @ mean[k] for k, layer in enumerate(chosen)}
        details: dict[str, Any] = {"prompts": len(fit.done), "skip_first": skip_first, "max_length": limit}
        details |= {"rank": None if rank is None else number, "fitted": digests_of(fitted)}
        details |= {"maps_to": target, "offset": offset, **({"report": report} if report else {})}
        *means, last = fit.means / len(fit.done)
        biases = {layer: last - maps[layer] @ own for layer, own in zip(chosen, means, strict=True)} if offset else {}
        return Lens("jacobian", maps, biases, origin, details)

    origin = Origin.of(model)

    with torch.inference_mode(False), torch.enable_grad(), weights_at_rest(model._module), left_padded(model.tokenizer):
        try:
            with bar(len(fitted), "Jacobian lens", progress, "text") as shown:
                if not len(fit.basis):
                    fit.basis = (
                        torch.eye(width) if rank is None else _principal(model, fitted, number, target, skip_first)
                    )
                shown.update(len(fit.done))
                for batch in parts:
                    if not fit.done.issuperset(batch.indices):
                        assert fit.done.isdisjoint(batch.indices)
                        products = _products(model, batch, chosen, target, fit.basis, skip_first, most)
                        means = _means(model, batch, [*chosen, target], skip_first) if offset else 0
                        fit.sums += products
                        fit.means += means
                        fit.done.update(batch.indices)
                        file.write(fit.state())
                        shown.update(len(batch))
            found = lens()
            if kept:
                found = lens(report_of(model, found, kept, skip_first, size))
        except BaseException as error:
            if fit.done:
                error.partial = lens()  # type: ignore[attr-defined]
                error.add_note(
                    f"{len(fit.done)} of {len(fitted)} texts are done: their lens is error.partial.{file.hint}"
                )
            raise
    file.remove()
    return found


@dataclass
class _Fit:
    """What a fit has so far.

    Attributes:
        sums: `[layers, basis, hidden]`, the sum over texts.
        means: `[layers + 1, hidden]`, the sum over texts of the mean stream, of the one that is derived last; zero
            without an offset.
        basis: `[basis, hidden]`, orthonormal directions of the stream that is derived.
        done: Indices of the texts that are in the sum.
    """

    sums: torch.Tensor
    means: torch.Tensor
    basis: torch.Tensor
    done: set[int]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that going on needs."""
        done = torch.tensor(sorted(self.done))
        return {"sums": self.sums, "means": self.means, "basis": self.basis, "done": done}


@torch.no_grad()
def _means(model: StandardizedTransformer, batch: Batch, layers: list[int], skip_first: int) -> torch.Tensor:
    """The mean stream of each text over the positions that count, summed over texts: `[layers, hidden]`."""
    states, _, row = states_of(model, batch, layers, skip_first)
    each = [states[row == i].float().mean(0) for i in range(len(batch))]
    return torch.stack(each).sum(0).cpu()


@torch.no_grad()
def _principal(model: StandardizedTransformer, rows: list, rank: int, layer: int, skip_first: int) -> torch.Tensor:
    """The leading principal directions (about zero) of the stream after `layer`, `[rank, hidden]`."""
    moment: Any = 0
    for batch in batches(model, rows, 16):
        states = states_of(model, batch, [layer], skip_first)[0][:, 0].cpu().double()
        moment = moment + states.T @ states
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank].T.float().contiguous()


def _products(
    model: StandardizedTransformer,
    batch: Batch,
    layers: list[int],
    target: int,
    basis: torch.Tensor,
    skip_first: int,
    most: int,
) -> torch.Tensor:
    """`basis @ J` of each layer, from it to `target`, summed over the batch's texts.

    Each text stands in the batch as many times as there are directions in one backward pass.

    Returns:
        `[layers, basis, hidden]`, float32 on the CPU.
    """
    texts, seq = batch.input_ids.shape
    copies = max(1, min(len(basis), most // (texts * seq)))
    inputs = {name: tensor.repeat_interleave(copies, 0) for name, tensor in batch.encoding.items()}
    graph = graph_of(model, inputs, layers, target)
    counts = torch.zeros(texts, seq)
    for row, (start, own) in enumerate(zip(batch.starts, batch.rows, strict=True)):
        counts[row, start + skip_first : start + len(own) - 1] = 1
    mean = (counts / counts.sum(1, keepdim=True)).repeat_interleave(copies, 0)
    last = graph.last
    valid = counts.repeat_interleave(copies, 0).to(last)
    products: list[list[torch.Tensor]] = [[] for _ in layers]  # on the layers' devices
    for start in range(0, len(basis), copies):
        some = basis[start : start + copies]
        rows = torch.zeros(copies, basis.shape[1])
        rows[: len(some)] = some
        cotangent = rows.repeat(texts, 1).to(last)[:, None] * valid[..., None]
        for rows_of_layer, pulled in zip(
            products, graph.pulled(cotangent, keep=start + copies < len(basis)), strict=True
        ):
            own = torch.einsum(
                "tcsh,tcs->ch", *(x.unflatten(0, (texts, copies)) for x in (pulled.float(), mean.to(pulled.device)))
            )
            rows_of_layer.append(own[: len(some)])
    found = torch.stack([torch.cat(rows_of_layer).cpu() for rows_of_layer in products])
    if not found.isfinite().all():
        raise ValueError(
            f"The derivatives of texts {list(batch.indices)} are not finite: leave them out, or load the model in "
            "float32."
        )
    return found
