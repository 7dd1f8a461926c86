"""Linear probes: how well a classifier tells two classes apart at each layer, on texts that it was not fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp import Condition
from nnterp.deprecation import renamed
from nnterp.interventions._results import Result, describe_run
from nnterp.interventions._running import bar
from nnterp.interventions._vectors._belonging import MODEL_FIELDS, identity_of
from nnterp.interventions._vectors._directions import hash_of
from nnterp.interventions._vectors._examples import read_labels, states_at
from nnterp.interventions._vectors._fitting import fit_classifier, require_sklearn
from nnterp.interventions._vectors._vector import SteeringVector
from nnterp.positions import TextSelector

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

CONTROLS = ("shuffled", "random")
Split = tuple[torch.Tensor, torch.Tensor]  # indices to fit on, and held out


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult(Result):
    """Held-out accuracy of a linear probe at each layer, beside what chance gives.

    Its tensors are float32: `accuracy` `[layers]`, the share of held-out texts that are classified rightly;
    `fold_accuracy` `[layers, folds]`; the null controls `shuffled` and `random`, `[layers, repeats]`; `majority`, the
    share of the larger class; and, fitted on all texts, `unit_directions` `[layers, hidden]` and `thresholds`
    `[layers]`: a text is called positive if its state along the direction is above the threshold.

    Example:
        texts = ["I am happy.", "I love it.", "I am sad.", "I hate it."]
        probed = probe(model, texts, [1, 1, 0, 0], [4], folds=2, repeats=2)
        directions = probed.vector()  # a SteeringVector
    """

    figure = "probe"

    @property
    def directions(self) -> dict[int, torch.Tensor]:
        """Layer → the unit direction of the probe that was fitted on all texts, `[hidden]`, float32 on the CPU."""
        return dict(zip(self.labels["layers"], self["unit_directions"], strict=True))

    def vector(self) -> SteeringVector:
        """Make a steering vector of the directions.

        Returns:
            A vector with the layers of the probe; each direction has length 1.
        """
        known = {name: self.about["vector"][name] for name in (*MODEL_FIELDS, "prompts")}
        return SteeringVector(self.directions, **known, method="probe")

    def best(self) -> int:
        """Choose the layer with the highest held-out accuracy.

        Returns:
            Its index, from 0; the first of several.
        """
        return self.labels["layers"][int(self["accuracy"].argmax())]

    def condition(self, layer: int | None = None, below: bool = False) -> Condition:
        """Make the probe of a layer a condition for `model.steering(..., when=)`.

        Args:
            layer: The layer; the best if None.
            below: Rows that it calls negative instead.

        Returns:
            A condition that rows fulfil which the probe calls positive (or negative, with `below`).

        Raises:
            KeyError: There is no probe at this layer.
        """
        chosen = self.best() if layer is None else layer
        layers = self.labels["layers"]
        chosen = chosen + self.about["vector"]["num_layers"] if chosen < 0 else chosen
        if chosen not in layers:
            raise KeyError(f"There is no probe at layer {layer}; there are: {', '.join(map(str, layers))}.")
        threshold = float(self["thresholds"][layers.index(chosen)])
        return Condition(chosen, self.directions[chosen], threshold, _position_of(self.about["position"]), below)


@renamed(removed_in="3.0", texts="prompts")
def probe(
    model: StandardizedTransformer,
    prompts: Any,
    labels: Any,
    layers: int | Iterable[int] | None = None,
    position: Any = -1,
    *,
    folds: int = 5,
    test_size: float | None = None,
    seed: int = 0,
    controls: Sequence[str] = CONTROLS,
    repeats: int = 5,
    batch_size: int = 16,
    progress: bool | None = None,
    remote: Any = False,
) -> ProbeResult:
    """Fit a linear probe for two classes at each layer, and measure it on texts that it was not fitted on.

    The probe is a logistic regression on standardised states (Alain and Bengio, [Understanding intermediate layers
    using linear classifier probes](https://arxiv.org/abs/1610.01644), 2016; needs scikit-learn). A high accuracy says
    little by itself, so two null controls are run: the same with shuffled labels, and random directions in place of the
    fitted one, with a fitted threshold (compare Hewitt and Liang, [Designing and interpreting probes with control
    tasks](https://arxiv.org/abs/1909.03368), 2019). Costs one forward pass for each text.

    Args:
        model: The model.
        prompts: Texts, token ids or chats of both classes. The name that it had, `texts=`, works with a warning.
        labels: True or False (or 1 and 0, or 1 and -1) for each.
        layers: The layers whose output is read; all if None.
        position: Over each text's own tokens: an index, or `nnterp.positions.last_of(...)`; the mean over all if None.
        folds: Folds of the cross-validation, stratified by class: every text is held out once.
        test_size: Instead of folds, one split with this share of the texts held out.
        seed: Of the folds, the shuffles and the random directions.
        controls: Which null controls to run: "shuffled", "random", or none.
        repeats: How many shuffles, and how many random directions.
        batch_size: Texts that share a forward pass. The result does not depend on it.
        progress: Show a progress bar over layers; None: after two seconds.
        remote: Run the model on the remote service; classifiers are fitted here.

    Returns:
        A `ProbeResult`; also `.directions`, `.vector()` and `.condition(layer)`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed: `pip install 'nnterp-interventions[probe]'`.
        ValueError: Labels are not of two classes, or a class has fewer texts than there are folds.
        InsideTraceError: Called inside a trace of this model.

    Example:
        texts = ["I am happy.", "I love it.", "I am sad.", "I hate it."]
        accuracy = probe(model, texts, [1, 1, 0, 0], [4], folds=2, repeats=2)["accuracy"]  # [layers]
    """
    require_sklearn("sklearn.linear_model")
    unknown = [name for name in controls if name not in CONTROLS]
    if isinstance(controls, str) or unknown:
        raise ValueError(f"controls={controls!r}; give a list of {' and '.join(map(repr, CONTROLS))}, or an empty one.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r}; give at least 1.")
    stored = _stored(position)
    quiet = progress if progress is not None else False
    states, rows = states_at(model, prompts, layers, position, batch_size, quiet, remote)
    chosen = torch.tensor(read_labels(labels, len(rows)))
    splits = _splits(chosen, folds, test_size, seed)
    found: dict[str, list[Any]] = {name: [] for name in ("accuracy", "fold_accuracy", *controls)}
    fitted = []
    with bar(len(states), "probe", progress) as shown:
        for layer, state in states.items():
            if not torch.isfinite(state).all():
                raise ValueError(
                    f"The states of layer {layer} are not finite in the model's dtype; load it in float32."
                )
            accuracy, by_fold = _held_out(state, chosen, splits, seed)
            found["accuracy"].append(accuracy)
            found["fold_accuracy"].append(by_fold)
            for name in controls:
                found[name].append(_control(name, state, chosen, splits, seed, repeats))
            fitted.append(fit_classifier(state, chosen, seed))
            shown.update(1)
    return _result(
        model, states, rows, chosen, found, fitted, stored, {"folds": folds, "test_size": test_size, "seed": seed}
    )


def _result(
    model: StandardizedTransformer,
    states: dict[int, torch.Tensor],
    rows: Sequence[Any],
    chosen: torch.Tensor,
    found: dict[str, list[Any]],
    fitted: list[tuple[torch.Tensor, float]],
    position: Any,
    arguments: dict[str, Any],
) -> ProbeResult:
    share = chosen.double().mean().item()
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}
    tensors["majority"] = torch.tensor(max(share, 1 - share), dtype=torch.float32)
    tensors["unit_directions"] = torch.stack([direction for direction, _ in fitted]).float()
    tensors["thresholds"] = torch.tensor([threshold for _, threshold in fitted], dtype=torch.float32)
    second = {"fold_accuracy": "folds", "shuffled": "repeats", "random": "repeats", "unit_directions": "hidden"}
    axes: dict[str, tuple[str, ...]] = {
        name: ("layers", second[name]) if name in second else ("layers",) for name in tensors
    }
    axes["majority"] = ()
    sizes = {second[name]: tensors[name].shape[1] for name in second if name in tensors}
    labels = {"layers": tuple(states), **{axis: tuple(range(size)) for axis, size in sizes.items()}}
    sides = [[row for row, own in zip(rows, chosen.tolist(), strict=True) if own is side] for side in (True, False)]
    about = describe_run(model, "probe", position=position, **arguments)
    about |= {"position": position, "vector": {**identity_of(model), "prompts": hash_of(*sides)}}
    return ProbeResult(tensors, axes, labels, about=about)


def _splits(chosen: torch.Tensor, folds: int, test_size: float | None, seed: int) -> list[Split]:
    """The indices to fit on and those held out, of each fold.

    Raises:
        ValueError: A class has too few texts.
    """
    selection = require_sklearn("sklearn.model_selection")
    fewest = int(min(chosen.sum(), (~chosen).sum()))
    if test_size is not None:
        if not 0 < test_size < 1 or fewest < 2:
            raise ValueError(
                f"test_size={test_size!r}: give a share between 0 and 1, and at least 2 texts of each class."
            )
        maker = selection.StratifiedShuffleSplit(1, test_size=test_size, random_state=seed)
    else:
        if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= fewest:
            raise ValueError(
                f"folds={folds!r}: give at least 2 and at most as many as the smaller class has texts, {fewest}."
            )
        maker = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    parts = maker.split(torch.zeros(len(chosen), 1).numpy(), chosen.numpy())
    return [(torch.from_numpy(fit), torch.from_numpy(held)) for fit, held in parts]


def _held_out(state: torch.Tensor, chosen: torch.Tensor, splits: list[Split], seed: int) -> tuple[float, list[float]]:
    """Accuracy over all held-out texts, and in each fold."""
    right, total, by_fold = 0, 0, []
    for fit, held in splits:
        if chosen[fit].unique().numel() < 2:  # shuffled labels in tiny sets
            called = chosen[fit][:1].expand(len(held))
        else:
            direction, threshold = fit_classifier(state[fit], chosen[fit], seed)
            called = state[held] @ direction > threshold
        hits = int((called == chosen[held]).sum())
        by_fold.append(hits / len(held))
        right, total = right + hits, total + len(held)
    return right / total, by_fold


def _control(
    name: str, state: torch.Tensor, chosen: torch.Tensor, splits: list[Split], seed: int, repeats: int
) -> list[float]:
    """Held-out accuracies with shuffled labels, or along random directions."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        if name == "shuffled":
            labels, seen = chosen[torch.randperm(len(chosen), generator=generator)], state
        else:
            noise = torch.randn(state.shape[1], 1, generator=generator, dtype=torch.float64)
            labels, seen = chosen, state @ noise
        found.append(_held_out(seen, labels, splits, seed)[0])
    return found


def _stored(position: Any) -> Any:
    """A position as JSON holds it.

    Raises:
        ValueError: It is not one position, and not None.
    """
    if position is None:
        return None
    if isinstance(position, TextSelector) and position.which == "last_of":
        return [position.text, position.which, position.occurrence]
    if hasattr(position, "__index__") and not isinstance(position, bool):
        return position.__index__()
    raise ValueError(
        f"position={position!r}; give one index, nnterp.positions.last_of('text'), or None for the mean over all."
    )


def _position_of(stored: Any) -> Any:
    return TextSelector(*stored) if isinstance(stored, (list, tuple)) else stored
