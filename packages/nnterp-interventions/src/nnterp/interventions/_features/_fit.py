"""`dictionary_fit`: what of the activations a dictionary explains, and what of the loss is left with it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp import Dictionary
from nnterp.defaults import plain_defaults
from nnterp.inputs import Batch, forward_flags
from nnterp.interventions._features._site import (
    DictionaryMismatch,
    Places,
    own_positions,
    shown,
    warn_of_beginnings,
)
from nnterp.interventions._fitted._texts import rows_of
from nnterp.interventions._results import Result, describe_run
from nnterp.interventions._running import BatchSize, in_batches
from nnterp.values import get_label, write_value
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

LITTLE = 0.5  # a dictionary that explains less of the variance is taken for one of other activations
COSTLY = 0.1  # nats per token that a dictionary in place adds to the loss, below which noise may be all
_RUNS = ("clean", "spliced", "zero", "mean")


@dataclass(frozen=True, eq=False, repr=False)
class DictionaryFit(Result):
    """How well a dictionary fits a model on some texts. Made by `dictionary_fit`.

    `tensors["density"]` and `tensors["mean_activation"]` are `[features]`: the share of positions at which a feature is
    active, and its mean where it is (NaN if it never is). `tensors["losses"]` is `[runs]`, nats per token.

    Example:
        fit = dictionary_fit(model, nnterp.toy_dictionary("residual_4"), ["The capital of France is Paris."])
        print(fit.explained_variance > 0.9)  # → True
    """

    @property
    def explained_variance(self) -> float:
        """1 minus the squared error over the squared distance from the mean activation, over all positions."""
        return float(self["measures"][0])

    @property
    def cosine(self) -> float:
        """Mean cosine of what is decoded with what it stands for."""
        return float(self["measures"][1])

    @property
    def l0(self) -> float:
        """Mean number of active features at a position."""
        return float(self["measures"][2])

    @property
    def dead(self) -> int:
        """How many features are never active on these texts."""
        return int((self["density"] == 0).sum())

    @property
    def losses(self) -> dict[str, float]:
        """Nats per token: "clean", unedited; "spliced", with what is decoded in place; "zero" and "mean", ablated."""
        return dict(zip(_RUNS, self["losses"].tolist(), strict=True))

    @property
    def loss_recovered(self) -> float:
        """1 if the dictionary in place leaves the loss unchanged, 0 if it is as bad as zeros."""
        return self._recovered("zero")

    @property
    def loss_recovered_from_mean(self) -> float:
        """1 if the dictionary in place leaves the loss unchanged, 0 if it is as bad as the mean activation."""
        return self._recovered("mean")

    def _recovered(self, ablation: str) -> float:
        losses = self.losses
        return (losses[ablation] - losses["spliced"]) / (losses[ablation] - losses["clean"])

    def __repr__(self) -> str:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        return (
            f"DictionaryFit({self.about['arguments']['at']}; explained variance {self.explained_variance:.3f}, cosine "
            f"{self.cosine:.3f}, L0 {self.l0:.1f}, {self.dead} of {len(self['density'])} features never active; loss "
            f"{losses}; recovered {self.loss_recovered:.3f} of zeros', {self.loss_recovered_from_mean:.3f} of means')"
        )


@plain_defaults()
@torch.no_grad()
def dictionary_fit(
    model: StandardizedTransformer,
    dictionary: Dictionary,
    texts: Any,
    at: str | None = None,
    *,
    skip_first: int | None = None,
    max_length: int | None = None,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> DictionaryFit:
    """How much of a model's activations a dictionary explains, and what its reconstruction does to the loss.

    The measures are the usual ones (Karvonen et al. 2025, SAEBench, 3.1; Gao et al. 2024, 4.1). Costs four forward
    passes of each text. Activations of a batch are held, and nothing that grows with the number of texts.

    Args:
        model: The model.
        dictionary: A dictionary, as `nnterp.load_dictionary` returns one.
        texts: Texts, or token ids; text that it was not trained on.
        at: The value that it encodes, such as `"layers_output[12]"`; as the dictionary says if None.
        skip_first: How many positions at the start of each text are neither edited nor measured. None means 1 if the
            dictionary was trained with a beginning-of-sequence token, whose activations are unlike all others, else 0.
        max_length: Tokens of a text that are used; all if None.
        batch_size: Texts in a forward pass.
        progress: Whether to show a bar; None if it takes long.

    Returns:
        A `DictionaryFit`, on the CPU, float32: `density` and `mean_activation` `[features]`, the latter NaN for
            features that are never active; `losses` `[4]`, in nats per token; `measures` `[3]`.

    Raises:
        ValueError: The dictionary does not say where it belongs, has another width than the value, or a text is too
            short.
        Unavailable: The model has no such value, or it cannot be written.

    Warns:
        DictionaryMismatch: It explains less than half of the variance; or its reconstruction raises the loss by more
            than 0.1 nats per token and by more than the mean does; or it was trained on texts that begin differently.

    Example:
        fit = dictionary_fit(model, nnterp.toy_dictionary("residual_4"), prompts)
        print(fit.explained_variance > 0.9)  # → True
    """
    model.require_no_trace("dictionary_fit()")
    model.dispatch()
    places = Places(model, dictionary, at)
    skip = int(bool(dictionary.prepend_bos)) if skip_first is None else skip_first
    rows = rows_of(model, texts, max_length, skip, "texts")
    places.check(model, rows[0])
    warn_of_beginnings(model, dictionary, rows)
    sums = _Sums(dictionary)

    def first(batch: Batch) -> None:
        mask = own_positions(batch, skip)
        x, y, loss = _clean(model, batch, places, mask)
        decoded = sums.add(places, x, y)
        sums.losses[:, 0] += loss
        sums.losses[:, 1] += _edited(model, batch, places, mask, decoded)
        sums.losses[:, 2] += _edited(model, batch, places, mask, torch.zeros_like(y[:1]))

    in_batches(model, rows, batch_size, first, "dictionary_fit", progress)
    mean = (sums.total / sums.positions).float()[None]

    def second(batch: Batch) -> None:
        sums.losses[:, 3] += _edited(model, batch, places, own_positions(batch, skip), mean)

    in_batches(model, rows, batch_size, second, "dictionary_fit", progress)
    tensors = sums.tensors()
    axes: dict[str, tuple[str, ...]] = {
        "density": ("features",),
        "mean_activation": ("features",),
        "losses": ("runs",),
        "measures": ("measures",),
    }
    labels = {"features": tuple(range(dictionary.num_features)), "runs": _RUNS}
    labels["measures"] = ("explained_variance", "cosine", "l0")
    about = describe_run(
        model, "dictionary_fit", at=shown(places.reads), dictionary=dictionary.source, texts=len(rows), skip_first=skip
    )
    found = DictionaryFit(tensors, axes, labels, about=about)
    _warn(found, model, dictionary, shown(places.reads))
    return found


class _Sums:
    """Sums over positions."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.active = torch.zeros(dictionary.num_features, dtype=torch.double)
        self.activation = torch.zeros(dictionary.num_features, dtype=torch.double)
        self.total = torch.zeros(dictionary.output_width, dtype=torch.double)
        self.squares = self.errors = self.cosines = 0.0
        self.positions = 0
        self.losses = torch.zeros(2, 4, dtype=torch.double)  # sums, and how many predictions

    def add(self, places: Places, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Count positions `[positions, width]`; what is decoded of each, `[positions, output width]`."""
        dictionary, decoded = places.dictionary, []
        for _, given, features in places.encoded(x):
            active = features != 0
            self.active += active.sum(0).double().cpu()
            self.activation += features.double().sum(0).cpu()
            decoded.append(dictionary.decode(features, given).float().to(y.device))
        whole = torch.cat(decoded)
        self.total += y.double().sum(0).cpu()
        self.squares += float(y.double().square().sum())
        self.errors += float((y.double() - whole.double()).square().sum())
        self.cosines += float(torch.nn.functional.cosine_similarity(y, whole, dim=-1).double().sum())
        self.positions += len(y)
        return whole

    def tensors(self) -> dict[str, torch.Tensor]:
        """Means."""
        spread = self.squares - float(self.total.square().sum()) / self.positions
        measures = [1 - self.errors / spread, self.cosines / self.positions, float(self.active.sum()) / self.positions]
        return {
            "density": (self.active / self.positions).float(),
            "mean_activation": (self.activation / self.active).float(),
            "losses": (self.losses[0] / self.losses[1]).float(),
            "measures": torch.tensor(measures),
        }


def _clean(
    model: StandardizedTransformer, batch: Batch, places: Places, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is encoded and what that stands for, `[positions, width]` float32, and the loss of the unedited run."""
    with model.trace(batch.encoding, **forward_flags(model)):
        x = places.read(model, places.reads).save()
        y = x if places.reads == places.writes else places.read(model, places.writes).save()
        logits = model.logits.save()
    flat_x, flat_y = (t.flatten(2)[mask.to(t.device)].float() for t in (x, y))
    return flat_x, flat_y, _loss(logits, batch, mask)


def _edited(
    model: StandardizedTransformer, batch: Batch, places: Places, mask: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The loss of a run with these values at the positions of `mask`, `[positions or 1, output width]`."""
    place = places.writes
    with model.trace(batch.encoding, **forward_flags(model)):
        own = places.read(model, place)
        whole = own.flatten(2).clone()
        whole[mask.to(whole.device)] = values.to(whole)
        write_value(model, get_label(place[0]), whole.reshape(own.shape), place[1])
        logits = model.logits.save()
    return _loss(logits, batch, mask)


def _loss(logits: torch.Tensor, batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the nats of tokens that follow a position of `mask`, and how many they are."""
    followed = mask[:, :-1] & batch.attention_mask[:, 1:].bool()
    wanted = batch.input_ids[:, 1:][followed]
    given = logits[:, :-1][followed.to(logits.device)].float()
    nats = torch.nn.functional.cross_entropy(given, wanted.to(given.device), reduction="sum")
    return torch.tensor([float(nats), float(len(wanted))], dtype=torch.double)


def _warn(found: DictionaryFit, model: StandardizedTransformer, dictionary: Dictionary, at: str) -> None:
    little = not found.explained_variance >= LITTLE
    losses = found.losses
    worse = losses["spliced"] > losses["mean"] and losses["spliced"] - losses["clean"] > COSTLY
    if not little and not worse:
        return
    of = f", of {dictionary.model_name}" if dictionary.model_name else ""
    why = [f"it explains {found.explained_variance:.2f} of their variance"] if little else []
    why += ["in their place it is worse than their mean"] if worse else []
    warn(
        f"The dictionary {dictionary.source} ({dictionary.reads}{of}) does not seem to belong to {at} of "
        f"{model.repo_id or model.model_class} on these texts: {' and '.join(why)}. Look at the site, the layer, the "
        "model, and how texts begin.",
        DictionaryMismatch,
    )
