"""What a lens is worth: how far its predictions are from the model's own, beside the logit lens's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.inputs import Row, batches, left_padded
from nnterp.interventions._fitted._streams import states_of
from nnterp.interventions._fitted._texts import SKIP_FIRST, digests_of, read_limits, rows_of
from nnterp.interventions._layers import layers_of
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.progress import bar
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer
    from nnterp.interventions._fitted._lens import Lens

NUMBERS = 1 << 23  # logits that are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class LensEvaluation(Result):
    """`kl` and `logit_lens_kl`, `[prompts, layers]`: nats from the model's own prediction, means over positions.

    Example:
        lens = fit_tuned_lens(model, ["The capital of France is Paris.", "The capital of Japan is Tokyo."], epochs=1)
        print(evaluate_lens(model, lens, ["The capital of Spain is Madrid."]).summary())
    """

    @property
    def worse(self) -> tuple[int, ...]:
        """Layers at which the logit lens is better, by the mean over texts."""
        ours, theirs = self["kl"].mean(0), self["logit_lens_kl"].mean(0)
        return tuple(layer for layer, a, b in zip(self.labels["layers"], ours, theirs, strict=True) if not a < b)

    def summary(self) -> str:
        """Write the evaluation as text.

        Returns:
            A table with a line for each layer: mean and standard deviation over texts, in nats, and where the lens is
            worse.
        """
        lines = [f"{'layer':>5}  {'lens':>16}  {'logit lens':>16}   KL to the model's own prediction, nats"]
        for k, layer in enumerate(self.labels["layers"]):
            cells = [
                f"{own.mean():.3f} ± {own.std(unbiased=False):.3f}"
                for own in (self["kl"][:, k], self["logit_lens_kl"][:, k])
            ]
            note = "   worse than the logit lens" if layer in self.worse else ""
            lines.append(f"{layer:>5}  {cells[0]:>16}  {cells[1]:>16}{note}")
        return "\n".join(lines)


@takes_nnsight_models
@plain_defaults()
def evaluate_lens(
    model: StandardizedTransformer,
    lens: Lens,
    texts: Any,
    layers: Indices = None,
    *,
    skip_first: int | None = None,
    max_length: int | None = 128,
    batch_size: int = 8,
    progress: bool | None = None,
) -> LensEvaluation:
    """How far the lens's predictions, and the logit lens's, are from the model's own: KL(model ‖ lens), in nats.

    Args:
        model: The model.
        lens: The lens.
        texts: Texts that it was not fitted on.
        layers: The layer or layers; all of the lens if None.
        skip_first: How many first positions of a text do not count; as in the fit if None.
        max_length: Tokens of a text that are used.
        batch_size: Texts in one forward pass.
        progress: Show a progress bar; None: after two seconds.

    Returns:
        A `LensEvaluation`: `kl` and `logit_lens_kl`, `[prompts, layers]`, float32, on the CPU; `summary()` shows them.

    Raises:
        ValueError: The lens is of another model, or does not lead to the last layer, or a text is too short.
        KeyError: The lens has no map for a layer.
        TypeError: `lens` is no lens.
        Unavailable: The model has several streams side by side.
        InsideTraceError: Called inside a trace of this model.

    Warns:
        UserWarning: The lens was fitted on some of the texts.

    Example:
        lens = fit_tuned_lens(model, ["The capital of France is Paris.", "The capital of Japan is Tokyo."], epochs=1)
        evaluation = evaluate_lens(model, lens, ["The capital of Spain is Madrid."])
        evaluation["kl"], evaluation["logit_lens_kl"]  # [prompts, layers] each
    """
    model.require_no_trace("evaluate_lens()")
    if not hasattr(lens, "maps_for"):
        raise TypeError(f"lens is a Lens, as fit_tuned_lens() returns it, not {lens!r:.80}.")
    lens.require_last("evaluate_lens()")
    model.prepare()
    lens.check(model)
    skip, _ = read_limits(lens.details.get("skip_first", SKIP_FIRST) if skip_first is None else skip_first, max_length)
    rows = rows_of(model, texts, max_length, skip, "texts")
    if known := set(digests_of(rows)) & set(lens.details.get("fitted", ())):
        warn(f"The lens was fitted on {len(known)} of these {len(rows)} texts.")
    chosen = list(lens.layers) if layers is None else layers_of(model, layers)
    lens.maps_for(chosen)
    kl, plain = measured(model, lens, rows, chosen, skip, batch_size, progress)
    about = describe_run(model, "evaluate_lens", lens=lens.kind, fitted_on=lens.origin.model, skip_first=skip)
    labels = {"prompts": prompt_labels(rows, model), "layers": tuple(chosen)}
    axes: dict[str, tuple[str, ...]] = dict.fromkeys(("kl", "logit_lens_kl"), ("prompts", "layers"))
    return LensEvaluation({"kl": kl, "logit_lens_kl": plain}, axes, labels, about=about)


def measured(
    model: StandardizedTransformer,
    lens: Lens,
    rows: Sequence[Row],
    layers: Sequence[int],
    skip_first: int,
    batch_size: int,
    progress: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of the lens and of the logit lens, each `[rows, layers]`."""
    sums = torch.zeros(2, len(rows), len(layers), dtype=torch.float64)
    with bar(len(rows), "lens evaluation", progress, "text") as shown, left_padded(model.tokenizer), torch.no_grad():
        for batch in batches(model, rows, batch_size):
            states, final, row = states_of(model, batch, layers, skip_first)
            most = max(1, NUMBERS // (model.vocab_size or 1 << 16))
            for start in range(0, len(final), most):
                own = slice(start, start + most)
                logs = model.project_on_vocab(final[own]).float().log_softmax(-1)
                where = torch.tensor(batch.indices)[row[own]]
                for k, layer in enumerate(layers):
                    for which, state in enumerate((lens.to_last_layer(states[own, k], layer), states[own, k])):
                        sums[which, :, k].index_add_(0, where, divergence(model, logs, state).cpu().double())
            shown.update(len(batch))
    counts = torch.tensor([len(row) - 1 - skip_first for row in rows]).double()
    means = (sums / counts[:, None]).float()
    return means[0], means[1]


def divergence(model: StandardizedTransformer, logs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """KL from the model's own log-probabilities `[spots, vocab]` to those read from `[spots, hidden]`: `[spots]`."""
    read = model.project_on_vocab(states).float().log_softmax(-1).to(logs.device)
    return torch.nn.functional.kl_div(read, logs, reduction="none", log_target=True).sum(-1)


def report_of(
    model: StandardizedTransformer, lens: Lens, rows: Sequence[Row], skip_first: int, batch_size: int
) -> dict[str, Any]:
    """See `Lens.report`."""
    kl, plain = measured(model, lens, rows, lens.layers, skip_first, batch_size, False)
    layers = {}
    for k, layer in enumerate(lens.layers):
        ours, theirs = kl[:, k], plain[:, k]
        layers[str(layer)] = {
            "lens": ours.mean().item(),
            "lens_sd": ours.std(unbiased=False).item(),
            "logit_lens": theirs.mean().item(),
            "logit_lens_sd": theirs.std(unbiased=False).item(),
        }
    return {"layers": layers, "texts": len(rows)}
