"""Sentiment on the two small trained models: the vector's effect beside that of random vectors of its length."""

import random

import pytest
import torch

from nnterp.interventions import steering_sweep, steering_vectors

pytestmark = [pytest.mark.real, pytest.mark.slow]

SUBJECTS = (
    "The movie|This restaurant|My new phone|The hotel|Her latest book|The concert|Our train ride|The coffee|The course|"
    "This jacket|The garden|The service"
).split("|")
TONES = [
    ("was wonderful, and I enjoyed every minute.", "was terrible, and I hated every minute."),
    ("is the best I have ever had.", "is the worst I have ever had."),
    ("made me very happy.", "made me very angry."),
    ("is a joy, and I love it.", "is a misery, and I hate it."),
]
PAIRS = [(f"{subject} {good}", f"{subject} {bad}") for subject in SUBJECTS for good, bad in TONES]
OPEN = [  # no subject of the pairs, and no tone
    "I went to the new museum yesterday, and it was",
    "The teacher read my essay and said that it was",
    "We watched the play last night. I thought it was",
    "They moved to a small town in the north, and life there is",
    "I tried the soup that he had cooked. It tasted",
    "The neighbours have a dog. It is",
    "My holiday on the island was",
    "When I think of my first job, I feel",
    "The software update is",
    "His speech at the wedding was",
]
GOOD = "great wonderful amazing good beautiful excellent fantastic delicious happy perfect lovely nice".split()
BAD = "terrible awful bad horrible poor disappointing sad boring ugly difficult disgusting angry".split()
LAYER = {"smollm2": 18, "gemma3": 12}
LEAST = {"smollm2": 3.0, "gemma3": 4.0}  # nats; measured 3.4 and 4.3


def log_odds(model):
    """Of the next token: the pleasant words against the unpleasant ones, in nats."""
    good, bad = (
        [model.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words] for words in (GOOD, BAD)
    )

    def metric(logits):
        logits = logits.float()
        return logits[:, good].logsumexp(-1) - logits[:, bad].logsumexp(-1)

    return metric


@pytest.mark.parametrize("name", LAYER)
def test_sentiment_over_three_seeds_beside_random_vectors(real, name):
    model = real(name)
    layer, metric = LAYER[name], log_odds(model)
    effects, controls = [], []
    for seed in range(3):
        pairs = random.Random(seed).sample(PAIRS, 32)
        vector = steering_vectors(model, pairs, layers=layer, progress=False)
        asked = (OPEN, metric, [layer], [-1.0, 1.0])
        sweep = steering_sweep(model, vector, *asked, damage={"kl": None}, progress=False)
        effects.append(torch.cat([sweep["effect"][0], sweep["kl"][0]]))
        random_one = steering_sweep(model, vector.random(seed=seed), *asked, damage=None, progress=False)
        controls.append(random_one["effect"][0])
    # [seeds, (−1, +1, KL at −1, KL at +1)], and [seeds, (−1, +1)]
    effect, control = torch.stack(effects), torch.stack(controls)
    print(name, effect.round(decimals=2).tolist(), control.round(decimals=2).tolist())
    assert effect[:, 0].max() < -LEAST[name]
    assert effect[:, 1].min() > LEAST[name]
    assert effect[:, :2].abs().min() > 1.5 * control.abs().max()
    assert effect[:, :2].std(0).max() < 0.5  # the seeds agree
    assert (effect[:, 2:] < 1.0).all()  # nats on neutral sentences
