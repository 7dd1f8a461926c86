"""Is the feature that stands for a country seen in the attribution graph of its capital? Measured on the toy.

    uv run python tools/country_features.py             # the countries that were held out
    uv run python tools/country_features.py --chosen    # those that the dictionaries were chosen with

For each country:

1. Its feature is found without capitals: in sentences about languages, currencies and continents, the feature of
   `transcoder_0` whose mean activation at the country's token exceeds that for every other country by most.
2. The graph is that of "The capital of {country} is", of the logit of the capital less the mean logit of the other
   capitals. It predicts what ablating a feature does to this difference.
3. The feature is ablated in the model. Control: all other features at the country's token, of every layer, ablated
   together. Beside it: the same activation taken from other features of the transcoder, drawn at random, which changes
   what the MLP returns by a vector of the same length, in a direction that the prompt has not.
4. The feature is replaced by that of another country, at its mean activation in the sentences. Controls: by that of a
   third country, and by another feature of the transcoder drawn at random, at the same activation.

Countries whose name's checksum is a multiple of 3 were used to choose the size of the dictionary and these criteria.
The criteria were written down before the other countries were run:

* no two countries share a feature, and at least 95 % of the features are most active in their own country's prompt;
* at least 90 % have the most influence of all features of the graph at the country's token;
* ablated in the model, at least 95 % lower the logit difference, at least 90 % by more than the control, and on average
  by at least 3 times as much;
* at least half of the replacements make the model say the other country's capital, and at most 5 % of each control.

What removing a vector of the same length does, and how far the graph's predictions correlate with the model, is printed
without a criterion.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nnterp
from nnterp import StandardizedTransformer
from nnterp.interventions import attribution_graph, validate_graph
from nnterp.positions import last_of

HERE = Path(__file__).parent
PROMPT = "The capital of {} is"
LAYER, DRAWS, OTHERS = 0, 20, 5


@dataclass(frozen=True)
class Country:
    """A country, its capital's token, and whether it is held out."""

    name: str
    capital: str
    held_out: bool


@dataclass(frozen=True)
class Outcome:
    """What was measured of one country; changes are those of the logit difference.

    Attributes:
        country: Its name.
        feature: Its feature.
        selective: Whether the feature is more active at its token in the prompt than for any other country.
        share: Of the length of what the country's features decode to at its token, the feature's own.
        rank: Its place by influence among all features of the graph at the country's token, from 1.
        predicted, frozen, ablated: What ablating it changes: as the graph predicts, in the local replacement model, in
            the model.
        others: What ablating all other features at the country's token changes in the model.
        elsewhere: What taking the same activation from other features changes in the model, `[draws]`.
        swapped: Whether the model says the capital of each other country whose feature takes the place.
        third, random: The same for the controls.
    """

    country: str
    feature: int
    selective: bool
    share: float
    rank: int
    predicted: float
    frozen: float
    ablated: float
    others: float
    elsewhere: torch.Tensor
    swapped: list[bool]
    third: list[bool]
    random: list[bool]


def countries_of(model: StandardizedTransformer) -> tuple[list[Country], list[str]]:
    """The countries whose name and capital are a token each, and sentences about a country that name no capital."""
    sys.path.insert(0, str(HERE / "toy"))
    facts: Any = importlib.import_module("facts")

    def is_token(word: str) -> bool:
        return len(model.tokenizer(f" {word}").input_ids) == 1

    found = [
        Country(own.name, own.capital, zlib.crc32(own.name.encode()) % 3 != 0)
        for own in facts.COUNTRIES
        if is_token(own.name) and is_token(own.capital)
    ]
    phrasings = [p for relation in ("language", "currency", "continent") for p in facts.PHRASINGS[relation]]
    return found, [phrasing for phrasing in phrasings if not phrasing.startswith("{s}")]


class Experiment:
    """The toy with its transcoders, and each country's feature.

    Attributes:
        means: The mean activation of each feature at each country's token in the sentences, `[countries, features]`.
        features: Each country's feature, `[countries]`.
    """

    def __init__(self) -> None:
        self.model = StandardizedTransformer(nnterp.toy_checkpoint())
        layers = range(self.model.num_layers)
        self.transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in layers}
        nnterp.attach(self.model, self.transcoders[LAYER])
        self.countries, self.sentences = countries_of(self.model)
        self.means = self.activations(self.sentences).mean(1)
        self.features = margins(self.means).argmax(1)
        self.in_prompt = self.activations([PROMPT.replace("{}", "{s}")])[:, 0]
        ids = [self.model.tokenizer(f" {own.capital}").input_ids[0] for own in self.countries]
        self.capitals = torch.tensor(ids)

    def activations(self, sentences: list[str]) -> torch.Tensor:
        """The features at the country's token in each sentence, `[countries, sentences, features]`."""
        pairs = [(own.name, sentence) for own in self.countries for sentence in sentences]
        texts = [sentence.format(s=name) for name, sentence in pairs]
        where = [[last_of(f" {name}")] for name, _ in pairs]
        found = self.model.collect(texts, f"features[{LAYER}]", positions=where, progress=False)["features", LAYER]
        return found.flatten(1).unflatten(0, (len(self.countries), len(sentences)))

    def differences(self, logits: torch.Tensor, country: int) -> torch.Tensor:
        """The logit of a country's capital less the mean logit of all other capitals, `[rows]`."""
        own = logits[:, self.capitals]
        return own[:, country] - (own.sum(1) - own[:, country]) / (len(self.capitals) - 1)

    def logits(self, country: int, position: int, changes: torch.Tensor) -> torch.Tensor:
        """Logits after the prompt of a country with features changed by each of `changes`, `[rows, vocab]`."""
        model = self.model
        prompts = [PROMPT.format(self.countries[country].name)] * len(changes)
        with torch.no_grad(), model.trace(prompts):
            features = model.features[LAYER]
            features[:, position] += changes
            model.features[LAYER] = features
            logits = model.logits[:, -1].save()
        return logits

    def outcome(self, country: int, generator: torch.Generator) -> Outcome:
        """Everything that is measured of one country."""
        own, feature = self.countries[country], int(self.features[country])
        wrong = [f" {other.capital}" for other in self.countries if other.capital != own.capital]
        target = (f" {own.capital}", wrong)
        graph = attribution_graph(self.model, self.transcoders, PROMPT.format(own.name), target, progress=False)
        position = graph.tokens.index(f" {own.name}")
        here = [i for i in graph.of_kind("feature") if graph.nodes[i].position == position]
        try:
            node = graph.index(f"L{LAYER} F{feature} @{position}")
        except KeyError:  # it is silent in this prompt
            node = None
        influence, predicted, frozen, ablated, others = 0.0, 0.0, 0.0, 0.0, 0.0
        if node is not None:
            influence = float(graph.influence[node])
            rest = [i for i in here if i != node]
            checked = validate_graph(self.model, self.transcoders, graph, [[node], rest], progress=False)
            others = float(checked.model[1, -1])
            predicted, frozen, ablated = (float(t[0, -1]) for t in (checked.predicted, checked.frozen, checked.model))
        active = self.in_prompt[country]
        changes = torch.stack(
            [
                torch.zeros_like(active),
                *(self.one_hot(self.drawn(feature, generator), -float(active[feature])) for _ in range(DRAWS)),
            ]
        )
        found = self.differences(self.logits(country, position, changes), country)
        swaps = self.swaps(country, position, generator)
        decoder = self.transcoders[LAYER].decoder
        return Outcome(
            own.name,
            feature,
            int(self.in_prompt[:, feature].argmax()) == country,
            float((active[feature] * decoder[feature]).norm() / (active @ decoder).norm()),
            1 + sum(float(graph.influence[i]) > influence for i in here) if node is not None else len(here) + 1,
            predicted,
            frozen,
            ablated,
            others,
            found[1:] - found[0],
            *swaps,
        )

    def drawn(self, feature: int, generator: torch.Generator) -> int:
        """Another feature of the transcoder."""
        found = feature
        while found == feature:
            found = int(torch.randint(len(self.in_prompt[0]), (), generator=generator))
        return found

    def one_hot(self, feature: int, value: float) -> torch.Tensor:
        """A change of one feature."""
        change = torch.zeros_like(self.in_prompt[0])
        change[feature] = value
        return change

    def swaps(self, country: int, position: int, generator: torch.Generator) -> list[list[bool]]:
        """Whether the model says another country's capital once that country's feature, or a control's, stands in."""
        feature = int(self.features[country])
        off = self.one_hot(feature, -float(self.in_prompt[country, feature]))
        order = torch.randperm(len(self.countries), generator=generator).tolist()
        group = self.countries[country].held_out
        order = [i for i in order if i != country and self.countries[i].held_out == group]
        changes, wanted = [], []
        for other, third in itertools.islice(itertools.pairwise(order), OTHERS):
            value = float(self.means[other, self.features[other]])
            chosen = [int(self.features[other]), int(self.features[third])]
            chosen.append(self.drawn(chosen[0], generator))
            changes += [off + self.one_hot(one, value) for one in chosen]
            wanted += [int(self.capitals[other])] * 3
        said = self.logits(country, position, torch.stack(changes)).argmax(1)
        right = (said == torch.tensor(wanted)).view(-1, 3)
        return [right[:, kind].tolist() for kind in range(3)]


def margins(means: torch.Tensor) -> torch.Tensor:
    """By how much each mean activation exceeds the largest of the other countries, `[countries, features]`."""
    top = means.topk(2, dim=0).values
    return means - torch.where(means == top[0], top[1], top[0])


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    """The figures of all countries."""
    ablated = torch.tensor([own.ablated for own in outcomes])
    elsewhere = torch.stack([own.elsewhere.mean() for own in outcomes])
    predicted, frozen, others = (
        torch.tensor([getattr(own, name) for own in outcomes]) for name in ("predicted", "frozen", "others")
    )

    def share(values: list[bool]) -> float:
        return sum(values) / len(values)

    def r(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    return {
        "countries": len(outcomes),
        "distinct features": len({own.feature for own in outcomes}),
        "most active for its country": share([own.selective for own in outcomes]),
        "share of length": sum(own.share for own in outcomes) / len(outcomes),
        "of most influence at the token": share([own.rank == 1 for own in outcomes]),
        "predicted": float(predicted.mean()),
        "frozen": float(frozen.mean()),
        "ablated": float(ablated.mean()),
        "all other features at the token": float(others.mean()),
        "a vector as long": float(elsewhere.mean()),
        "lowered": float((ablated < 0).float().mean()),
        "by more than all others at the token": float((ablated < others).float().mean()),
        "by more than a vector as long": float((ablated < elsewhere).float().mean()),
        "correlation with frozen over countries": r(predicted, frozen),
        "correlation with model over countries": r(predicted, ablated),
        "swapped": share([said for own in outcomes for said in own.swapped]),
        "third country": share([said for own in outcomes for said in own.third]),
        "random feature": share([said for own in outcomes for said in own.random]),
    }


def main() -> None:
    """Run the experiment and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chosen", action="store_true", help="the countries that the dictionaries were chosen with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment, generator = Experiment(), torch.Generator().manual_seed(0)
    outcomes = []
    for i, own in enumerate(experiment.countries):
        if own.held_out != arguments.chosen:
            outcomes.append(found := experiment.outcome(i, generator))
            print(
                f"{own.name:12} F{found.feature:<5} rank {found.rank:<3} share {found.share:.2f}  predicted "
                f"{found.predicted:6.2f}  frozen {found.frozen:6.2f}  ablated {found.ablated:6.2f}  controls "
                f"{found.others:6.2f} {float(found.elsewhere.mean()):6.2f}  swapped {sum(found.swapped)}",
                flush=True,
            )
    for name, value in summary(outcomes).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
