"""`feature_report`: the texts that activate features most, the tokens they promote, and how often they are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp import Dictionary
from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices, read_indices
from nnterp.inputs import Batch, Row, forward_flags
from nnterp.interventions._features._site import Places, own_positions, shown, warn_of_beginnings
from nnterp.interventions._fitted._texts import rows_of
from nnterp.interventions._results import Result, describe_run, token_bytes_of, vocabulary_of
from nnterp.interventions._running import BatchSize, in_batches

if TYPE_CHECKING:
    import pandas

    from nnterp import StandardizedTransformer

_DIRECTIONS = 2**26  # logits that are held at once


@dataclass(frozen=True, eq=False, repr=False)
class FeatureReport(Result):
    """What features of a dictionary are active on, and what they promote. Made by `feature_report`.

    Tensors: `peaks` `[features, rank]`, the largest activation in each of the texts that activate a feature most, NaN
    where fewer texts do; `texts` and `positions`, which text and where, -1 there; `activations` and `token_ids`
    `[features, rank, offset]`, the tokens around the peak (offset 0), NaN and -1 past a text's ends; `density` and
    `mean_activation` `[features]`, the share of positions at which it is active, and its mean where it is; `promoted`,
    `promoted_ids`, `suppressed`, `suppressed_ids` `[features, tokens]`, the logits that its decoder's direction adds
    when it is read out directly, if it has the width of the stream.

    Example:
        texts = ["The capital of Japan is Tokyo.", "Kyoto is a city in Japan."]
        report = feature_report(model, nnterp.toy_dictionary("transcoder_0"), texts, features=[206])
        strongest = report.contexts(206)  # the texts that activate feature 206 most
    """

    figure: ClassVar[str] = "features"

    def contexts(self, feature: int) -> list[dict[str, Any]]:
        """List the contexts of a feature.

        Returns:
            The contexts, strongest first, each a dict: `peak`, `text`, `position`, `tokens` and their `activations`.

        Raises:
            ValueError: The report does not hold the feature.
        """
        at = self._row(feature)
        found = []
        for rank, text in enumerate(self["texts"][at].tolist()):
            if text < 0:
                break
            ids = self["token_ids"][at, rank]
            there = ids >= 0
            found.append(
                {
                    "peak": float(self["peaks"][at, rank]),
                    "text": text,
                    "position": int(self["positions"][at, rank]),
                    "tokens": [self.vocabulary[i] for i in ids[there].tolist()],
                    "activations": self["activations"][at, rank][there].tolist(),
                }
            )
        return found

    def table(self, tokens: int = 5) -> pandas.DataFrame:
        """Make a table of the features.

        Returns:
            A row for each feature: density, mean activation, peak, the strongest context, and the tokens it promotes.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame([self._summary(feature, tokens) for feature in self.labels["features"]])

    def _summary(self, feature: int, tokens: int) -> dict[str, Any]:
        at = self._row(feature)
        contexts = self.contexts(feature)
        row: dict[str, Any] = {"feature": feature, "density": float(self["density"][at])}
        row["mean_activation"] = float(self["mean_activation"][at])
        row["peak"] = contexts[0]["peak"] if contexts else float("nan")
        row["context"] = "".join(contexts[0]["tokens"]) if contexts else ""
        for name in ("promoted", "suppressed"):
            if name in self.tensors:
                ids = self[f"{name}_ids"][at, :tokens].tolist()
                row[name] = " ".join(repr(self.vocabulary[i]) for i in ids)
        return row

    def _row(self, feature: int) -> int:
        try:
            return self.labels["features"].index(feature)
        except ValueError:
            raise ValueError(f"The report holds no feature {feature!r}; it holds {len(self['density'])}.") from None

    def __repr__(self) -> str:
        features, texts = self.labels["features"], self.about["arguments"]["texts"]
        return f"FeatureReport({len(features)} features of {self.about['arguments']['at']}, on {texts} texts)"


@plain_defaults()
@torch.no_grad()
def feature_report(
    model: StandardizedTransformer,
    dictionary: Dictionary,
    texts: Any,
    features: Indices | None = None,
    *,
    top: int = 10,
    at: str | None = None,
    context: tuple[int, int] = (12, 4),
    tokens: int = 10,
    skip_first: int | None = None,
    max_length: int | None = None,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> FeatureReport:
    """What features are active on, and which tokens they promote.

    Costs a forward pass of each text up to the value, and a second one of the texts that are shown. Activations of a
    batch are held, and tensors that grow with the number of features, not with the number of texts.

    A feature's decoder direction d is read out as in `SteeringVector.logits`: `(logits(d) - logits(-d)) / 2`, where
    `logits` applies the final norm and the head.

    Args:
        model: The model.
        dictionary: A dictionary, as `nnterp.load_dictionary` returns one.
        texts: Texts, or token ids.
        features: Which features; all if None.
        top: How many texts are kept for each feature: those with its largest activations.
        at: The value that is encoded, as in `dictionary_fit`.
        context: Tokens before the peak, and after it.
        tokens: How many tokens are kept that a feature promotes, and how many that it suppresses.
        skip_first, max_length, batch_size, progress: As in `dictionary_fit`.

    Returns:
        A `FeatureReport`, on the CPU, float32 (int64 for texts, positions and token ids): `peaks`, `texts` and
            `positions` `[features, top]`, `activations` and `token_ids` `[features, top, before + 1 + after]`,
            `density` and `mean_activation` `[features]`, `promoted` and `suppressed` `[features, tokens]`; see
            `FeatureReport`. Also `report.table()`, `report.contexts(feature)`, `report.plot(feature=...)`.

    Raises:
        ValueError, Unavailable: As `dictionary_fit`.
        IndexError: There is no such feature.

    Warns:
        DictionaryMismatch: The dictionary was trained on texts that begin differently.

    Example:
        texts = ["The capital of Japan is Tokyo.", "Kyoto is a city in Japan."]
        report = feature_report(model, nnterp.toy_dictionary("transcoder_0"), texts, features=[206])
        print(report.table())
    """
    model.require_no_trace("feature_report()")
    model.dispatch()
    places = Places(model, dictionary, at)
    number = dictionary.num_features
    chosen = list(range(number)) if features is None else read_indices(features, number, "features", "features")
    before, after = (count(n, "context", 0) for n in context)
    top, shown_tokens = count(top, "top"), count(tokens, "tokens", most=len(model.tokenizer))
    skip = int(bool(dictionary.prepend_bos)) if skip_first is None else skip_first
    rows = rows_of(model, texts, max_length, skip, "texts")
    places.check(model, rows[0])
    warn_of_beginnings(model, dictionary, rows)
    best = _Best(chosen, top)
    in_batches(model, rows, batch_size, lambda b: best.add(model, b, places, skip), "feature_report", progress)
    tensors, axes = best.tensors()
    windows = _Windows(best, before, after)
    wanted = sorted({i for i in best.texts.flatten().tolist() if i >= 0})

    def second(batch: Batch) -> None:
        windows.add(model, batch, places, [wanted[i] for i in batch.indices])

    if wanted:
        in_batches(model, [rows[i] for i in wanted], batch_size, second, "feature_report", progress)
    tensors |= {"activations": windows.activations, "token_ids": windows.ids}
    axes |= dict.fromkeys(("activations", "token_ids"), ("features", "rank", "offset"))
    labels = {"features": tuple(chosen), "rank": tuple(range(top)), "offset": tuple(range(-before, after + 1))}
    ids = [windows.ids.flatten()]
    if dictionary.output_width == model.hidden_size:
        pushed = _promoted(model, dictionary.decoder[chosen], shown_tokens)
        tensors |= pushed
        axes |= dict.fromkeys(pushed, ("features", "tokens"))
        labels["tokens"] = tuple(range(shown_tokens))
        ids += [pushed["promoted_ids"].flatten(), pushed["suppressed_ids"].flatten()]
    about = describe_run(
        model, "feature_report", at=shown(places.reads), dictionary=dictionary.source, texts=len(rows), skip_first=skip
    )
    vocabulary = vocabulary_of(model, torch.cat(ids))
    exact = token_bytes_of(model, vocabulary)
    return FeatureReport(tensors, axes, labels, vocabulary=vocabulary, about=about, token_bytes=exact)


class _Best:
    """For each feature the texts with its largest activations so far, and sums over all positions."""

    def __init__(self, chosen: list[int], top: int) -> None:
        self.chosen = torch.tensor(chosen)
        shape = (len(chosen), top)
        self.peaks = torch.full(shape, float("nan"))
        self.texts, self.positions = (torch.full(shape, -1, dtype=torch.long) for _ in range(2))
        self.active, self.activation = (torch.zeros(len(chosen), dtype=torch.double) for _ in range(2))
        self.count = 0

    def add(self, model: StandardizedTransformer, batch: Batch, places: Places, skip: int) -> None:
        """Count a batch's own positions."""
        x = _read(model, batch, places)
        mask = own_positions(batch, skip)
        for i, text in enumerate(batch.indices):
            start = batch.starts[i] + skip
            own = x[i, mask[i].to(x.device)]
            peaks = torch.full((len(self.chosen),), float("-inf"))
            places_of = torch.zeros(len(self.chosen), dtype=torch.long)
            for some, _, features in places.encoded(own):
                found = features[:, self.chosen.to(features.device)]
                self.active += (found != 0).sum(0).double().cpu()
                self.activation += found.double().sum(0).cpu()
                value, where = (t.cpu() for t in found.float().max(0))
                larger = value > peaks
                peaks = torch.where(larger, value, peaks)
                places_of = torch.where(larger, where + some.start + start - batch.starts[i], places_of)
            self.count += len(own)
            self._merge(peaks, text, places_of)

    def _merge(self, peaks: torch.Tensor, text: int, positions: torch.Tensor) -> None:
        """Take a text in where it is among the strongest; equal ones keep the order of the texts."""
        active = peaks > 0
        all_peaks = torch.cat([self.peaks, torch.where(active, peaks, torch.nan)[:, None]], dim=1)
        all_texts = torch.cat([self.texts, torch.where(active, text, -1)[:, None]], dim=1)
        all_positions = torch.cat([self.positions, torch.where(active, positions, -1)[:, None]], dim=1)
        later = torch.where(all_texts < 0, torch.iinfo(torch.long).max, all_texts).argsort(dim=1, stable=True)
        strength = all_peaks.nan_to_num(float("-inf")).gather(1, later)
        order = later.gather(1, strength.argsort(dim=1, descending=True, stable=True))[:, : self.peaks.shape[1]]
        self.peaks, self.texts, self.positions = (t.gather(1, order) for t in (all_peaks, all_texts, all_positions))

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]]]:
        """What is found, and its axes."""
        found = {"peaks": self.peaks, "texts": self.texts, "positions": self.positions}
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(found, ("features", "rank"))
        found |= {"density": (self.active / self.count).float()}
        found |= {"mean_activation": (self.activation / self.active).float()}
        return found, axes | dict.fromkeys(("density", "mean_activation"), ("features",))


class _Windows:
    """Tokens and activations around the peaks."""

    def __init__(self, best: _Best, before: int, after: int) -> None:
        self.best, self.before = best, before
        shape = (*best.peaks.shape, before + after + 1)
        self.activations = torch.full(shape, float("nan"))
        self.ids = torch.full(shape, -1, dtype=torch.long)

    def add(self, model: StandardizedTransformer, batch: Batch, places: Places, texts: list[int]) -> None:
        """Fill in the contexts that these texts are."""
        x = _read(model, batch, places)
        for i, text in enumerate(texts):
            row, start = batch.rows[i], batch.starts[i]
            self._fill(text, row, x[i, start : start + len(row)], places)

    def _fill(self, text: int, row: Row, x: torch.Tensor, places: Places) -> None:
        features, ranks = (self.best.texts == text).nonzero(as_tuple=True)
        window = torch.arange(self.ids.shape[2]) - self.before
        at = self.best.positions[features, ranks][:, None] + window
        inside = (at >= 0) & (at < len(row))
        ids = torch.tensor(row.ids)
        self.ids[features, ranks] = torch.where(inside, ids[at.clamp(0, len(row) - 1)], -1)
        values = torch.full(at.shape, float("nan"))
        columns = self.best.chosen[features][:, None].expand_as(at)
        for some, _, found in places.encoded(x):
            here = inside & (at >= some.start) & (at < some.start + len(found))
            values[here] = found.float().cpu()[at[here] - some.start, columns[here]]
        self.activations[features, ranks] = values


def _read(model: StandardizedTransformer, batch: Batch, places: Places) -> torch.Tensor:
    """What is encoded, `[batch, seq, width]` float32."""
    with model.trace(batch.encoding, **forward_flags(model)) as tracer:
        x = places.read(model, places.reads).save()
        tracer.stop()
    return x.flatten(2).float()


def _promoted(model: StandardizedTransformer, directions: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    """The tokens whose logits directions `[features, hidden]` raise and lower most, when they are read out directly."""
    found: dict[str, list[torch.Tensor]] = {}
    size = max(1, _DIRECTIONS // len(model.tokenizer))
    for some in directions.to(model._module.dtype).split(size):
        both = model.project_on_vocab(torch.stack([some, -some])).float().cpu()
        logits = (both[0] - both[1]) / 2
        for name, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(number, largest=largest)
            found.setdefault(name, []).append(values)
            found.setdefault(f"{name}_ids", []).append(ids)
    return {name: torch.cat(parts) for name, parts in found.items()}
