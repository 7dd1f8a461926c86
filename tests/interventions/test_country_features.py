"""The feature that stands for a country in the attribution graph of its capital, beside controls.

Features are encoded, found, ablated and swapped here by plain torch hooks on the HuggingFace module; of nnterp are the
transcoders, the graph, and what it predicts. `tools/country_features.py` measures more countries and more controls.
"""

from __future__ import annotations

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
PROMPT, AT, DRAWS = "The capital of {} is", 3, 10


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


@pytest.fixture(scope="module")
def plain(toy):
    return Plain(toy)


@pytest.fixture(scope="module")
def graphs(toy):
    transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(toy.num_layers)}
    made = []
    for country, capital in CAPITALS.items():
        target = (f" {capital}", [f" {other}" for other in CAPITALS.values() if other != capital])
        made.append(attribution_graph(toy, transcoders, PROMPT.format(country), target, progress=False))
    return transcoders, made


def ablations(plain, features):
    """What ablating each country's feature changes, `[countries]`, and the same activation taken from others."""
    generator, own, controls = torch.Generator().manual_seed(0), [], []
    decoder = plain.dictionary.decoder
    for k, feature in enumerate(features):
        others = torch.randint(len(decoder), (DRAWS,), generator=generator)
        rows = torch.cat([torch.zeros(1, decoder.shape[1]), -decoder[[feature]], -decoder[others]])
        changed = plain.difference(plain.logits(k, float(plain.active[k, feature]) * rows), k)
        own.append(changed[1] - changed[0])
        controls.append((changed[2:] - changed[0]).mean())
    return torch.stack(own), torch.stack(controls)
