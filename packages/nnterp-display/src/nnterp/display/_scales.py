"""Scales on which probabilities near 0 and 1 stay apart: logarithm and log-odds, with ticks that say probabilities."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np

Scale = Literal["linear", "log", "logodds"]

_MOST_TICKS = 9
_CLOSE = 1e-6  # decades: float32 has no exact 1e-12


def check_scale(scale: Any) -> None:
    """Check that this is a scale.

    Raises:
        ValueError: It is none.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be 'linear', 'log' or 'logodds', not {scale!r}.")


class Ruler:
    """The places of probabilities on a scale: from 0 to 1 for "linear", log10 p for "log", log10 of p / (1 − p) else.

    Args:
        values: All probabilities that will be drawn, of any shape; they say how far the scale reaches.
        scale: Which scale.

    Attributes:
        low, high: The ends of the scale, as places. What lies beyond, such as a probability of exactly 0, is put there.
    """

    def __init__(self, values: np.ndarray, scale: Scale) -> None:
        self.scale = scale
        places = _raw(values, scale)
        there = places[np.isfinite(places)]
        self.low, self.high = 0.0, 1.0
        if scale == "log":
            self.low, self.high = min(np.floor(there.min() + _CLOSE) if there.size else -1.0, -1.0), 0.0
        elif scale == "logodds":
            self.low = min(np.floor(there.min() + _CLOSE) if there.size else -1.0, -1.0)
            self.high = max(np.ceil(there.max() - _CLOSE) if there.size else 1.0, 1.0)
        outside = (places < self.low - _CLOSE) | (places > self.high + _CLOSE)  # NaN is neither
        self.beyond = scale != "linear" and bool(outside.any())

    def places(self, values: Any) -> np.ndarray:
        """Where these probabilities are; NaN stays NaN, and on "linear" every number stays as it is."""
        if self.scale == "linear":
            return np.asarray(values, dtype=float)
        return np.clip(_raw(values, self.scale), self.low, self.high)

    def levels(self, values: Any) -> np.ndarray:
        """The same from 0 at the lower end to 1 at the upper one."""
        return (self.places(values) - self.low) / (self.high - self.low)

    def ticks(self) -> dict[str, Any]:
        """Settings of an axis or a colour bar: ticks that say probabilities; none for "linear"."""
        if self.scale == "linear":
            return {}
        whole = np.arange(self.low, self.high + 1)
        step = int(np.ceil(len(whole) / _MOST_TICKS))
        at = whole[whole % step == 0] if step > 1 else whole
        if self.scale == "log":
            return {"tickmode": "array", "tickvals": at.tolist(), "ticktext": [_power(int(place)) for place in at]}
        round_ones = [_round_odds(int(place)) for place in at]
        kept = [(place, text) for place, text in round_ones if self.low <= place <= self.high]
        return {"tickmode": "array", "tickvals": [place for place, _ in kept], "ticktext": [text for _, text in kept]}

    def note(self) -> str:
        """What is drawn at the end of the scale instead of beyond it; "" if nothing is."""
        if not self.beyond:
            return ""
        ends = _power(int(self.low)) if self.scale == "log" else f"{_odds(self.low)} or {_odds(self.high)}"
        return f"probabilities beyond the scale, such as exactly 0, are drawn at {ends}"


def _raw(values: Any, scale: Scale) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if scale == "linear":
        return numbers
    with np.errstate(divide="ignore", invalid="ignore"):
        if scale == "log":
            return np.log10(np.clip(numbers, 0.0, None))
        inside = np.clip(numbers, 0.0, 1.0)
        return np.log10(inside) - np.log10(1.0 - inside)


def _power(place: int) -> str:
    return f"{10.0**place:g}" if place >= -4 else f"1e{place}"


def _round_odds(decade: int) -> tuple[float, str]:
    """The place of a round probability and its text: 0.1, 0.01, … for −1, −2, …, 0.5 for 0, 0.9, 0.99, … above."""
    if decade == 0:
        return 0.0, "0.5"
    share = 10.0 ** -abs(decade)
    place = math.log10(share / (1.0 - share))
    if decade < 0:
        return place, _power(decade)
    return -place, f"{1 - share:.{decade}f}" if decade <= 4 else f"1−1e-{decade}"


def _odds(place: float) -> str:
    """The probability at this log-odds."""
    share = 10.0 ** -abs(place) / (1 + 10.0 ** -abs(place))
    if place < 0:
        return f"{share:.2g}"
    return f"{1 - share:.4g}" if place <= 4 else f"1−{share:.2g}"
