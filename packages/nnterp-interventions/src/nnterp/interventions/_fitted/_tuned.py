"""The tuned lens: for each layer an affine map, learnt so that the head predicts what the whole model does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.inputs import Row, batches, left_padded
from nnterp.interventions._fitted._belonging import Origin
from nnterp.interventions._fitted._checkpoint import Checkpoint
from nnterp.interventions._fitted._evaluation import NUMBERS, divergence, measured, report_of
from nnterp.interventions._fitted._lens import Lens
from nnterp.interventions._fitted._streams import (
    require_one_stream,
    require_unsteered,
    states_of,
)
from nnterp.interventions._fitted._texts import digests_of, read_limits, rows_of, sources_of, split
from nnterp.interventions._running import weights_at_rest
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.progress import bar
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@takes_nnsight_models
@plain_defaults()
def fit_tuned_lens(
    model: StandardizedTransformer,
    texts: Any,
    layers: Indices = None,
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    batch_size: int = 8,
    skip_first: int = 0,
    max_length: int = 128,
    held_out: Any = 0.1,
    patience: int = 2,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> Lens:
    """Fit a tuned lens: for each layer an affine map of its stream, so that the head reads the model's own prediction.

    The maps minimise KL(model ‖ lens), the mean over positions, with Adam, from the identity, and the learning rate
    falls to zero linearly. (Belrose et al., 2023, section 3, who use SGD with momentum.) After each epoch every layer
    is measured on half of the text that is held out, and keeps the map that was best there: at worst the identity,
    which is the logit lens. The other half is for the report. An epoch costs a forward of all texts, and for each
    layer the head forwards and backwards.

    Args:
        model: The model, with its weights here: this does not run remotely.
        texts: Texts, token ids, or a list of these.
        layers: The layer or layers; all but the last if None.
        epochs: How often all texts are seen at most.
        lr: The learning rate at the beginning.
        weight_decay: Pulls the maps towards the identity, as in AdamW.
        batch_size: Texts of one step.
        skip_first: How many first positions of a text do not count. The last position does not either.
        max_length: Tokens of a text that are used.
        held_out: The share of the texts, drawn by `seed`, that is kept for choosing maps and for `lens.report`; or
            texts for it.
        patience: Stop after so many epochs in which no layer got better on the text held out.
        seed: Of the texts held out and of the order of texts.
        checkpoint: A file in which the fit is kept after each epoch, and from which a killed fit goes on, to the same
            lens bit for bit (on one thread; with several, rounding varies from run to run). Removed at the end.
        progress: Show a progress bar; None: after two seconds.

    Returns:
        A `Lens` of kind "tuned", fitted in float32 whatever the model computes in, on the CPU. `lens.report` says what
        it is worth beside the logit lens; `lens.details["history"]` has the KL of each layer after each epoch.

    Raises:
        ValueError: A text is too short, nothing is left to fit on or held out, the loss is not finite, `checkpoint` is
            of another fit, or the model is steered (`model.steering`).
        TypeError, IndexError: An argument is of another type, or there is no such layer.
        OSError: `checkpoint` cannot be written.
        Unavailable: The model has several streams side by side.
        InsideTraceError: Called inside a trace of this model.

        An error after the first epoch, KeyboardInterrupt included, carries the best lens so far as `error.partial`.

    Example:
        lens = fit_tuned_lens(model, ["The capital of France is Paris.", "The capital of Japan is Tokyo."], epochs=2)
        print(evaluate_lens(model, lens, ["The capital of Spain is Madrid."]).summary())
    """
    model.require_no_trace("fit_tuned_lens()")
    width = require_one_stream(model, "A tuned lens")
    chosen = sources_of(model, layers)
    numbers = {"epochs": count(epochs, "epochs"), "batch_size": count(batch_size, "batch_size")}
    numbers["patience"] = count(patience, "patience")
    for name, given, least in (("lr", lr, "positive"), ("weight_decay", weight_decay, "not negative")):
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not number or not (given > 0 if name == "lr" else given >= 0) or not given < float("inf"):
            raise ValueError(f"{name} is a number, and {least}; it is {given!r}.")
    skip_first, limit = read_limits(skip_first, max_length)
    require_unsteered(model, "fit_tuned_lens()")
    model.prepare()
    settings = (limit, skip_first)
    fitted, kept = split(rows_of(model, texts, *settings, "texts"), held_out, seed, model, settings)
    judging, telling = kept[::2], kept[1::2] or kept
    if not kept:
        raise ValueError("held_out leaves no text to choose maps by: give a share above 0, or texts.")
    arguments = {
        "texts": [row.ids for row in fitted],
        "held_out": [row.ids for row in kept],
        "layers": chosen,
        **numbers,
    }
    arguments |= {"lr": lr, "weight_decay": weight_decay, "skip_first": skip_first, "seed": seed}
    arguments |= {"batches": [batch.indices for batch in batches(model, fitted, numbers["batch_size"])]}
    call = Call(model, "fit_tuned_lens", arguments)
    file = Checkpoint(checkpoint, call)
    fit = _Fit(len(chosen), width, lr, weight_decay)
    if earlier := file.read():
        fit.restore(earlier)

    def lens(report: dict[str, Any] | None = None, best: bool = True) -> Lens:
        weights, biases = (fit.best_weights, fit.best_biases) if best else (fit.weights, fit.biases)
        maps = {layer: torch.eye(width) + weights[k].detach() for k, layer in enumerate(chosen)}
        details: dict[str, Any] = {"prompts": len(fitted), "skip_first": skip_first, "max_length": limit}
        details |= {"epochs": fit.epoch, "fitted": digests_of(fitted)}
        details |= {"maps_to": model.num_layers - 1, "history": fit.history.tolist()}
        details |= {"report": report} if report else {}
        return Lens("tuned", maps, {layer: biases[k].detach() for k, layer in enumerate(chosen)}, origin, details)

    origin = Origin.of(model)
    with torch.inference_mode(False), weights_at_rest(model._module), left_padded(model.tokenizer):
        try:
            if not len(fit.history):
                fit.judge(measured(model, lens(), judging, chosen, skip_first, batch_size, False)[0].mean(0))
            with bar(epochs, "tuned lens", progress, "epoch") as shown:
                shown.update(fit.epoch)
                while fit.epoch < epochs and fit.idle < patience:
                    _epoch(model, fit, fitted, chosen, numbers, skip_first, seed)
                    fit.epoch += 1
                    fit.judge(
                        measured(model, lens(best=False), judging, chosen, skip_first, batch_size, False)[0].mean(0)
                    )
                    file.write(fit.state())
                    shown.update(1)
            found = lens(report_of(model, lens(), telling, skip_first, numbers["batch_size"]))
        except BaseException as error:
            if fit.epoch:
                error.partial = lens()  # type: ignore[attr-defined]
                error.add_note(
                    f"{fit.epoch} of {epochs} epochs are done: the best lens so far is error.partial.{file.hint}"
                )
            raise
    file.remove()
    return found


class _Fit:
    """Maps while they are being learnt: `weights` are added to the identity.

    Attributes:
        weights, biases: `[layers, hidden, hidden]` and `[layers, hidden]`, float32.
        best_weights, best_biases: For each layer, those that were best on the text held out.
        history: `[epochs + 1, layers]`, KL on the text held out, of the identity first.
        epoch, idle: Epochs done, and how many of the last ones brought no layer anything.
    """

    def __init__(self, layers: int, width: int, lr: float, weight_decay: float) -> None:
        self.lr = lr
        self.weights = torch.zeros(layers, width, width, requires_grad=True)
        self.biases = torch.zeros(layers, width, requires_grad=True)
        self.best_weights, self.best_biases = torch.zeros(layers, width, width), torch.zeros(layers, width)
        self.history = torch.zeros(0, layers)
        self.epoch = self.idle = 0
        self.adam = torch.optim.AdamW([self.weights, self.biases], lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def judge(self, kl: torch.Tensor) -> None:
        """Keep the maps of the layers that are better than ever.

        Raises:
            ValueError: The logit lens itself is not finite.
        """
        if not len(self.history) and not kl.isfinite().all():
            raise ValueError("The model's own predictions are not finite on the text held out: load it in float32.")
        if len(self.history):
            better = kl < self.history.min(0).values
            self.best_weights[better], self.best_biases[better] = self.weights[better], self.biases[better]
            self.idle = 0 if bool(better.any()) else self.idle + 1
        self.history = torch.cat([self.history, kl[None]])

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that going on needs."""
        own = {
            name: getattr(self, name).detach()
            for name in ("weights", "biases", "best_weights", "best_biases", "history")
        }
        inner = self.adam.state_dict()["state"]
        adam = {f"adam.{i}.{name}": torch.as_tensor(value) for i, part in inner.items() for name, value in part.items()}
        return {**own, **adam, "counts": torch.tensor([self.epoch, self.idle])}

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        self.weights.copy_(state["weights"])
        self.biases.copy_(state["biases"])
        self.best_weights, self.best_biases, self.history = (
            state[n] for n in ("best_weights", "best_biases", "history")
        )
        self.epoch, self.idle = state["counts"].tolist()
        whole = self.adam.state_dict()
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                whole["state"].setdefault(int(index), {})[key] = value
        self.adam.load_state_dict(whole)


def _epoch(
    model: StandardizedTransformer,
    fit: _Fit,
    rows: Sequence[Row],
    layers: Sequence[int],
    numbers: dict[str, int],
    skip_first: int,
    seed: int,
) -> None:
    """One pass over all texts, in an order of its own; a step for each batch."""
    parts = list(batches(model, rows, numbers["batch_size"]))
    random.Random(seed * 10_007 + fit.epoch).shuffle(parts)
    steps = numbers["epochs"] * len(parts)
    for i, batch in enumerate(parts):
        states, final, _ = states_of(model, batch, layers, skip_first)
        fit.adam.zero_grad()
        loss = tuned_loss(model, states, final, fit.weights, fit.biases)
        if not loss < float("inf"):
            raise ValueError("The loss is not finite: lower lr, or load the model in float32.")
        for group in fit.adam.param_groups:
            group["lr"] = fit.lr * (1 - (fit.epoch * len(parts) + i) / steps)
        fit.adam.step()


def tuned_loss(
    model: StandardizedTransformer,
    states: torch.Tensor,
    final: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
) -> float:
    """The mean over positions of KL(model ‖ lens), summed over layers; its gradients are put into the maps' `.grad`.

    Args:
        model: The model.
        states: `[spots, layers, hidden]`.
        final: `[spots, hidden]`, after the last layer.
        weights, biases: `[layers, hidden, hidden]`, added to the identity, and `[layers, hidden]`.
    """
    spots, total = len(final), 0.0
    most = max(1, NUMBERS // (model.vocab_size or 1 << 16))
    for start in range(0, spots, most):
        own = slice(start, start + most)
        with torch.no_grad():
            logs = model.project_on_vocab(final[own]).float().log_softmax(-1)
        for k in range(states.shape[1]):
            with torch.enable_grad():
                state = states[own, k].float()
                weight, bias = weights[k].to(state.device), biases[k].to(state.device)
                read = (state + state @ weight.T + bias).to(states.dtype)
                loss = divergence(model, logs, read).sum()
            loss.backward()
            total += float(loss.detach())
    for maps in (weights, biases):
        assert maps.grad is not None
        maps.grad /= spots  # at the end: in half precision, the gradients of logits would vanish
    return total / spots
