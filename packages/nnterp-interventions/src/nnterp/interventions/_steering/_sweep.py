"""A steering at every layer with every factor: what it does, and what it breaks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.inputs import encode
from nnterp.interventions._layers import layers_of
from nnterp.interventions._metrics import bind_metric, by_prompt, metric_name
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import bar
from nnterp.interventions._steering._damage import NAMES, read_damage
from nnterp.interventions._steering._measuring import Measuring
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep(Result):
    """Effect and damage of a steering, by layer and factor.

    Its tensors are float32 on the CPU. `effect` `[layers, factors]` is the mean over prompts of the metric, minus its
    mean without steering. `scores` `[layers, factors, prompts]` are the metric's values, `baseline` `[prompts]` those
    without steering. Beside them the measures of damage that were asked for, each `[layers, factors]`, and what they
    are without steering as `plain_perplexity`, `plain_repetition`, `plain_length`. A sweep that was cut short has NaN
    where it did not get to.

    Example:
        vector = steering_vectors(model, ["I am happy. I feel"], ["I am sad. I feel"])
        metric = logit_difference(" lovely", " awful")
        sweep = steering_sweep(model, vector, ["I feel"], metric, layers=4, factors=[1, 2])
        sweep.best(max_damage=10)  # layer, factor, effect and damage
    """

    figure: ClassVar[str] = "steering"

    def best(self, max_damage: float | Mapping[str, float], damage: str | None = None) -> dict[str, Any]:
        """The setting with the largest effect among those whose damage is within a limit.

        Args:
            max_damage: The limit; or measure → limit, all of which hold.
            damage: Which measure the limit is for: "kl", in nats, "perplexity" or "repetition". By default the first
                of these that the sweep has.

        Returns:
            A dict with `layer`, `factor`, `effect`, and every measure of damage there.

        Raises:
            ValueError: The sweep has no such measure, or no setting is within the limit; says which comes closest.
        """
        limits = self._limits(max_damage, damage)
        effect, within = self["effect"], ~self["effect"].isnan()
        for name, limit in limits.items():
            within &= self[name] <= limit  # NaN is not
        if not within.any():
            name, limit = next(iter(limits.items()))
            least = self[name].nan_to_num(nan=torch.inf)
            layer, factor = (int(i) for i in torch.unravel_index(least.argmin(), least.shape))
            where = f"layer {self.labels['layers'][layer]} with factor {self.labels['factors'][factor]}"
            raise ValueError(
                f"No setting has {' and '.join(f'{n} ≤ {x:g}' for n, x in limits.items())}; the least {name} is "
                f"{least.min():.3g}, at {where}."
            )
        found = effect.masked_fill(~within, -torch.inf).argmax()
        layer, factor = (int(i) for i in torch.unravel_index(found, effect.shape))
        measures = [name for name in NAMES if name in self.tensors]
        return {
            "layer": self.labels["layers"][layer],
            "factor": self.labels["factors"][factor],
            **{name: self[name][layer, factor].item() for name in ("effect", *measures)},
        }

    def _limits(self, max_damage: float | Mapping[str, float], damage: str | None) -> dict[str, float]:
        ordered = [name for name in NAMES if name in self.tensors and name != "length"]
        if isinstance(max_damage, Mapping):
            limits = dict(max_damage)
        else:
            name = damage if damage is not None else next(iter(ordered), "kl")
            limits = {name: max_damage}
        missing = [name for name in limits if name not in ordered]
        if missing or not limits:
            raise ValueError(
                f"The damage {missing[0] if missing else ''!r} cannot be limited; this sweep measured "
                f"{', '.join(ordered) or 'none'}. Length is no damage by itself: read it from the result."
            )
        return limits


@torch.no_grad()
def steering_sweep(
    model: StandardizedTransformer,
    vector: Any,
    prompts: Any,
    metric: Any,
    layers: int | Sequence[int] | None = None,
    factors: float | Iterable[float] = (0.5, 1.0, 2.0, 4.0),
    damage: Any = "kl",
    *,
    max_new_tokens: int = 20,
    batch_size: int = 16,
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
    **steering: Any,
) -> SteeringSweep:
    """Steer at each layer with each factor, and measure what it does to a metric and what else it breaks.

    One setting is one layer and one factor, run under `model.steering(vector, layer, factor)`. It costs the forwards of
    the prompts, the neutral prompts and the texts, which share batches; the unsteered model is run once. With
    "repetition" or "length", a setting also costs a greedy generation.

    Args:
        model: The model.
        vector: A `SteeringVector`, a mapping from layer to `[hidden]`, or one `[hidden]` for all layers.
        prompts: Texts, token ids or chats whose next token the metric is taken of.
        metric: `logit_difference`, `target_probability`, `kl_divergence`, or a function from next-token logits
            `[runs, vocab]` to one number for each run. A larger number is a larger effect.
        layers: The layers, each by itself; by default those of the vector, or all.
        factors: The factors.
        damage: What to measure beside the metric: one name, several, or name → prompts.
            "kl": KL(plain ‖ steered) of the next token in nats, the mean over all positions of neutral prompts.
            "perplexity": of texts, over all tokens but the first of each. "repetition": the share of bigrams of what is
            generated that occurred before (1 − distinct-2). "length": the mean number of tokens that are generated.
            By default the first two are taken on eight short English sentences, the others on the prompts.
        max_new_tokens: The longest generation, for "repetition" and "length".
        batch_size: Prompts that share a forward pass.
        progress: Show a progress bar over settings; None: after two seconds.
        remote: Run on the remote service. With "kl" each request carries the plain log-probabilities,
            `[tokens, vocab]` in float32.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: settings that are `done` in it are not run again.
        **steering: Further arguments of `model.steering`: `mode`, `token_positions`, `keep_norm`, ...

    Returns:
        A `SteeringSweep`, with `.best(max_damage=...)` and `.plot()`.

    Raises:
        ValueError: There are no factors, there is no such measure, or the metric returns another shape.
        InsideTraceError: Called inside a trace of this model.

        An error in a later setting, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where
        its `done`, `[layers, factors]`, is False.

    Example:
        vector = steering_vectors(model, ["I am happy. I feel"], ["I am sad. I feel"])
        metric = logit_difference(" lovely", " awful")
        sweep = steering_sweep(model, vector, ["I feel"], metric, layers=4, factors=[1, 2])
        sweep["effect"], sweep["kl"]  # [layers, factors] each
    """
    model.require_no_trace("steering_sweep()")
    model.prepare(remote)
    numbers = _factors(factors)
    wanted = _layers(model, vector, layers)
    if hasattr(vector, "check"):
        vector.check(model)
    for layer in wanted:  # what cannot be steered is refused before anything runs
        model.steering(vector, layer, numbers[0], **steering)
    rows = encode(model, prompts)
    measured = read_damage(model, damage, rows)
    measuring = Measuring(model, rows, measured, max_new_tokens, batch_size, remote)
    plain = measuring.run()
    bound = bind_metric(metric, model, len(rows), plain["last"])

    def scores(found: dict[str, Any]) -> torch.Tensor:
        return by_prompt(bound, found["last"], list(range(len(rows)))).float().cpu()

    labels = {"layers": tuple(wanted), "factors": tuple(numbers), "prompts": prompt_labels(rows, model)}
    told = {"metric": metric_name(metric), "damage": list(measured), "vector": repr(vector), **steering}
    about = describe_run(model, "steering_sweep", **told)
    result = _empty(list(measured), labels, scores(plain), plain, about)
    given = getattr(vector, "directions", vector)
    asked = {
        "prompts": ids_of(rows, *measured.values()),
        "vector": dict(given) if isinstance(given, Mapping) else given,
        **{name: told[name] for name in ("damage", *steering)},
        "layers": wanted,
        "factors": numbers,
        "max_new_tokens": max_new_tokens,
    }
    call = Call(model, "steering_sweep", asked, {"metric": metric})
    done = torch.zeros(len(wanted), len(numbers), dtype=torch.bool)
    if (earlier := resumed(call, resume)) is not None:
        done = earlier[DONE].clone()
        for name in ("scores", "effect", *measured):
            result[name][done] = earlier[name][done]

    def partial() -> SteeringSweep | None:
        return unfinished(call, lambda: result, done, ("layers", "factors"))

    with bar(done.numel(), "steering_sweep", progress) as shown, call.keeping(partial):
        for i, j in itertools.product(range(len(wanted)), range(len(numbers))):
            if not done[i, j]:
                with model.steering(vector, wanted[i], numbers[j], **steering):
                    found = measuring.run()
                _fill(result, i, j, scores(found), found)
                done[i, j] = True
            shown.update(1)
    return result


def _empty(
    measures: list[str],
    labels: dict[str, tuple[Any, ...]],
    baseline: torch.Tensor,
    plain: dict[str, Any],
    about: dict[str, Any],
) -> SteeringSweep:
    """A sweep in which no setting is done."""
    by_setting = ("layers", "factors")
    axes: dict[str, tuple[str, ...]] = dict.fromkeys(("effect", *measures), by_setting)
    axes |= {"scores": (*by_setting, "prompts"), "baseline": ("prompts",)}
    tensors = {name: torch.full([len(labels[axis]) for axis in own], torch.nan) for name, own in axes.items()}
    tensors["baseline"] = baseline
    for name in measures:
        if name in plain:
            tensors[f"plain_{name}"], axes[f"plain_{name}"] = torch.tensor(plain[name]), ()
    return SteeringSweep(tensors, axes, labels, about=about)


def _fill(sweep: SteeringSweep, layer: int, factor: int, scores: torch.Tensor, found: dict[str, Any]) -> None:
    """Write one setting, by the places of its layer and factor."""
    sweep["scores"][layer, factor] = scores
    sweep["effect"][layer, factor] = (scores.double() - sweep["baseline"].double()).mean()
    for name, value in found.items():
        if name != "last":
            sweep[name][layer, factor] = value


def _factors(factors: Any) -> list[float]:
    """The factors, finite and different.

    Raises:
        ValueError: There are none, one is not finite, or one is given twice.
    """
    listed = [float(factor) for factor in (factors if isinstance(factors, Iterable) else [factors])]
    if not listed or not all(abs(factor) < float("inf") for factor in listed) or len(set(listed)) < len(listed):
        raise ValueError(f"factors={factors!r}; give at least one, finite and each once.")
    return listed


def _layers(model: StandardizedTransformer, vector: Any, layers: Any) -> list[int]:
    """The layers asked for, each once; by default those that the vector has directions for."""
    given = getattr(vector, "directions", vector)
    if layers is None and isinstance(given, Mapping):
        layers = sorted(given)
    return list(dict.fromkeys(layers_of(model, layers)))
