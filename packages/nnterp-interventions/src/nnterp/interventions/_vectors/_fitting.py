"""Directions from hidden states: mean differences, principal components, and fitted classifiers."""

from __future__ import annotations

import warnings
from typing import Any

import torch

METHODS = ("mean", "pca", "pca_center", "probe")


def direction(method: str, positive: torch.Tensor, negative: torch.Tensor, layer: int, seed: int) -> torch.Tensor:
    """The direction from negative to positive states of one layer, `[hidden]`, float64.

    Args:
        method: One of `METHODS`.
        positive, negative: `[examples, hidden]`, float64 on the CPU.
        layer: For errors.
        seed: For the classifier.

    Raises:
        ValueError: The states give no direction.
    """
    if method == "mean":
        found = positive.mean(0) - negative.mean(0)
    elif method == "probe":
        labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).bool()
        found, _ = fit_classifier(torch.cat([positive, negative]), labels, seed)
    else:
        found = principal(positive - negative, positive, negative, centered=method == "pca")
    if not torch.isfinite(found).all() or not found.any():
        raise ValueError(
            f"The states of layer {layer} give no direction by method={method!r}: positive and negative ones do not "
            "differ there, or (for 'pca') all pairs differ alike; or they are not finite in the model's dtype."
        )
    return found


def principal(
    differences: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, centered: bool
) -> torch.Tensor:
    """The first principal component of paired differences, unit length, towards the positive in most pairs."""
    spread = differences - differences.mean(0) if centered else differences
    scale = differences.abs().max()
    if not spread.abs().max() > 1e-12 * scale:
        return torch.zeros_like(differences[0])
    found = torch.linalg.svd(spread, full_matrices=False)[2][0]
    higher = ((positive @ found) > (negative @ found)).sum()
    lower = ((positive @ found) < (negative @ found)).sum()
    if higher == lower:  # a tie: by the mean
        return found if (differences @ found).mean() >= 0 else -found
    return found if higher > lower else -found


def fit_classifier(states: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
    """Logistic regression on standardised states: a unit direction `[hidden]` and the threshold on it.

    `states @ direction > threshold` is the classifier's answer. Regularised with scikit-learn's default, C=1.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    linear = require_sklearn("sklearn.linear_model")
    states = states.double()
    mean, spread = states.mean(0), states.std(0, unbiased=False)
    spread = torch.where(spread > 0, spread, 1.0)
    scaled = ((states - mean) / spread).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence: the held-out accuracy says how good it is
        model = linear.LogisticRegression(max_iter=1000, random_state=seed).fit(scaled, labels.numpy())
    weights = torch.from_numpy(model.coef_[0].copy()).double() / spread
    length = weights.norm()
    if length == 0:
        return weights, 0.0
    intercept = float(model.intercept_[0]) - float(weights @ mean)
    return weights / length, -intercept / float(length)


def require_sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        ModuleNotFoundError: It is not installed; says how to.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Probes are fitted by scikit-learn, which is not installed: pip install 'nnterp-interventions[probe]'"
        ) from error
