"""The feature that stands for a country in the attribution graph of its capital, beside controls.

Features are encoded, found, ablated and swapped here by plain torch hooks on the HuggingFace module; of nnterp are the
transcoders, the graph, and what it predicts. `tools/country_features.py` measures more countries and more controls.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import nnterp
from nnterp.interventions import attribution_graph, validate_graph

CAPITALS = {
    "England": "London",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "China": "Beijing",
    "Syria": "Damascus",
    "Morocco": "Rabat",
    "Chile": "Santiago",
}
SENTENCES = [
    "The main language of {} is",
    "The people of {} speak",
    "The currency of {} is the",
    "People in {} pay with the",
    "The continent of {} is",
    "On the map, {} is part of",
]
PROMPT, AT = "The capital of {} is", 3


class Plain:
    """The toy and the transcoder of its first MLP, by hooks.

    Attributes:
        capitals: The token of each capital.
        prompts: Token ids of each prompt, `[countries, 5]`.
        active: The features at each country's token in its prompt, `[countries, features]`.
        means: Their means over the sentences.
    """

    def __init__(self, toy):
        self.module, self.tokenizer = toy._module, toy.tokenizer
        self.dictionary = nnterp.toy_dictionary("transcoder_0")
        self.mlp = self.module.model.layers[0].mlp
        self.capitals = torch.tensor([self.tokenizer(f" {own}").input_ids[0] for own in CAPITALS.values()])
        self.prompts = torch.tensor([self.tokenizer(PROMPT.format(country)).input_ids for country in CAPITALS])
        self.active = torch.stack([self.encoded(PROMPT, country) for country in CAPITALS])
        by_sentence = [torch.stack([self.encoded(text, own) for text in SENTENCES]) for own in CAPITALS]
        self.means = torch.stack(by_sentence).mean(1)

    def encoded(self, sentence, country):
        """The features at a country's token."""
        ids = self.tokenizer(sentence.format(country)).input_ids
        (token,) = self.tokenizer(f" {country}").input_ids
        seen = []
        handle = self.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
        with torch.no_grad():
            self.module(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
        d, x = self.dictionary, seen[0][0, ids.index(token)]
        before = x @ d.encoder.T + d.encoder_bias
        return torch.where(before > d.activation.threshold, before, 0).relu()

    def features(self):
        """For each country the feature whose mean in its sentences exceeds that of every other country by most."""
        found = []
        for k in range(len(CAPITALS)):
            others = torch.cat([self.means[:k], self.means[k + 1 :]]).max(0).values
            found.append(int((self.means[k] - others).argmax()))
        return found

    def logits(self, country, changes):
        """Logits after the prompt with what the MLP returns at the country's token changed, `[changes, vocab]`."""

        def change(module, args, output):
            return torch.cat([output[:, :AT], (output[:, AT] + changes)[:, None], output[:, AT + 1 :]], 1)

        handle = self.mlp.register_forward_hook(change)
        with torch.no_grad():
            found = self.module(input_ids=self.prompts[country].expand(len(changes), -1), use_cache=False).logits
        handle.remove()
        return found[:, -1]

    def difference(self, logits, country):
        """The logit of the capital less the mean of the other capitals'."""
        own = logits[:, self.capitals]
        return own[:, country] - torch.cat([own[:, :country], own[:, country + 1 :]], 1).mean(1)


@cache
def plain_of(toy):
    return Plain(toy)


@pytest.fixture
def plain(toy):
    return plain_of(toy)


@pytest.fixture
def graphs(toy):
    return graphs_of(toy)


@cache
def graphs_of(toy):
    transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(toy.num_layers)}
    made = []
    for country, capital in CAPITALS.items():
        target = (f" {capital}", [f" {other}" for other in CAPITALS.values() if other != capital])
        made.append(attribution_graph(toy, transcoders, PROMPT.format(country), target, progress=False))
    return transcoders, made


def seen(graphs, features):
    """For each country whether its feature has the most influence of all features at its token."""
    found = []
    for graph, feature in zip(graphs[1], features, strict=True):
        here = [(float(graph.influence[i]), graph.nodes[i]) for i in graph.of_kind("feature")]
        node = max((own for own in here if own[1].position == AT), key=lambda own: own[0])[1]
        found.append((node.layer, node.feature) == (0, feature))
    return found


def ablated(plain, features):
    """By hooks: what ablating each country's feature does to the logit difference, `[countries]`."""
    found = []
    for k, feature in enumerate(features):
        own = plain.active[k, feature] * plain.dictionary.decoder[feature]
        changed = plain.difference(plain.logits(k, torch.stack([0 * own, -own])), k)
        found.append(changed[1] - changed[0])
    return torch.stack(found)


def said(plain, features, shift=1):
    """By hooks: each country's feature is replaced by that of the next; whether the next one's capital is said."""
    decoder, found = plain.dictionary.decoder, []
    for k, feature in enumerate(features):
        other = (k + 1) % len(features)
        value, put = plain.means[other, plain.features()[other]], features[(k + shift) % len(features)]
        change = value * decoder[put] - plain.active[k, feature] * decoder[feature]
        found.append(int(plain.logits(k, change[None])[0].argmax()) == int(plain.capitals[other]))
    return found


def test_each_country_has_a_feature_of_its_own(plain):
    """Found in sentences without capitals, and active in the prompt of its country alone."""
    features = plain.features()
    assert len(set(features)) == len(CAPITALS)
    active = plain.active[:, features]
    assert bool((active.argmax(0) == torch.arange(len(CAPITALS))).all())
    others = active - active.diagonal().diag()
    assert float(others.max()) < 0.2 * float(active.diagonal().min())


def test_it_is_seen_in_the_graph_of_the_capital(plain, toy, graphs):
    """It leads at its token, does what the graph predicts, and more than all other features there together."""
    transcoders, made = graphs
    features = plain.features()
    assert sum(seen(graphs, features)) >= 7
    exact, others, predicted, frozen = ablated(plain, features), [], [], []
    for graph, feature, change in zip(made, features, exact, strict=True):
        node = graph.index(f"L0 F{feature} @{AT}")
        rest = [i for i in graph.of_kind("feature") if graph.nodes[i].position == AT and i != node]
        found = validate_graph(toy, transcoders, graph, [[node], rest], progress=False)
        assert float(found.model[0, -1]) == pytest.approx(float(change), abs=1e-3)
        others.append(float(found.model[1, -1]))
        predicted.append(float(found.predicted[0, -1]))
        frozen.append(float(found.frozen[0, -1]))
    assert float(exact.max()) < 0
    assert sum(exact < torch.tensor(others)) >= 7
    assert float(exact.mean()) < 3 * min(sum(others) / len(others), -0.1)
    assert torch.tensor(predicted) == pytest.approx(torch.tensor(frozen), rel=0.25)


def test_another_countrys_feature_in_its_place_turns_the_answer(plain):
    features = plain.features()
    assert sum(said(plain, features)) >= 5
    assert sum(said(plain, features, shift=2)) <= 1  # the feature of a third country


def test_features_of_other_countries_fail(plain, graphs):
    """With features exchanged among the countries, nothing of the above holds."""
    features = plain.features()
    exchanged = features[3:] + features[:3]
    assert sum(seen(graphs, exchanged)) == 0
    assert float(ablated(plain, exchanged).abs().max()) < 0.5
    assert sum(said(plain, exchanged)) <= 1
