"""On the trained toy checkpoint: the tone vector flips the tone of held-out texts, the sweep names the damage."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from nnterp.interventions import optimize_vector, probe, steering_sweep, steering_vectors

TOOLS = Path(__file__).parents[2] / "tools" / "toy"
FRAMES = ["The weather today is", "I think the soup is", "The film was", "I feel", "This bread tastes"]
OPENINGS = [
    ("I love the city.", "I hate the city."),
    ("What a wonderful day.", "What a terrible day."),
    ("I am happy.", "I am sad."),
    ("The tea is delicious.", "The tea is disgusting."),
]
PLEASANT = [f"{good} {frame}" for good, _ in OPENINGS for frame in FRAMES]
UNPLEASANT = [f"{bad} {frame}" for _, bad in OPENINGS for frame in FRAMES]
LAYER, FACTOR = 4, 2.0


@pytest.fixture(scope="module")
def texts():
    """Texts of each tone with nouns that no training text has there, and the words of each tone."""
    sys.path.insert(0, str(TOOLS))
    try:
        evaluate, corpus = importlib.import_module("evaluate"), importlib.import_module("corpus")
    finally:
        sys.path.remove(str(TOOLS))
    held_out = {tone: evaluate.tone_examples(tone, count=100) for tone in (True, False)}
    return held_out, {tone: [f" {word}" for word in corpus.tone_words(tone)] for tone in (True, False)}


def ids(model, words):
    return torch.tensor([model.tokenizer(word).input_ids[0] for word in words])


def tones(model, texts, words):
    """The share of texts whose most probable next token is a pleasant word, and an unpleasant one."""
    best = []
    for start in range(0, len(texts), 50):
        with torch.no_grad(), model.trace(texts[start : start + 50]):
            best.append(model.logits[:, -1].argmax(-1).save())
    found = torch.cat(best)
    return tuple(torch.isin(found, ids(model, words[tone])).float().mean().item() for tone in (True, False))


@pytest.mark.parametrize("method", ["mean", "pca_center", "probe", "pca"])
def test_the_tone_is_flipped(toy, texts, method):
    held_out, words = texts
    vector = steering_vectors(toy, PLEASANT, UNPLEASANT, method, layers=LAYER)
    if method != "mean":  # as long as the mean difference: these have length 1
        vector = vector.to_norm(steering_vectors(toy, PLEASANT, UNPLEASANT, layers=LAYER).norms[LAYER])
    assert tones(toy, held_out[False], words)[1] > 0.95
    assert tones(toy, held_out[True], words)[0] > 0.95
    with toy.steering(vector, LAYER, FACTOR):
        up = tones(toy, held_out[False], words)[0]
    with toy.steering(vector, LAYER, -FACTOR):
        down = tones(toy, held_out[True], words)[1]
    with toy.steering(vector.random(), LAYER, FACTOR):
        control = tones(toy, held_out[False], words)[0]
    print(method, up, down, control)
    assert control < 0.2
    # PCA of centred differences loses what all pairs share, which is the tone
    assert min(up, down) >= (0.9 if method != "pca" else 0.5)


def test_the_direction_reads_as_the_tone(toy, texts):
    held_out, words = texts
    del held_out
    vector = steering_vectors(toy, PLEASANT, UNPLEASANT)
    found = vector.logits(toy, 5)
    late = vector.layers.index(toy.num_layers - 1)
    pleasant, unpleasant = ({int(i) for i in ids(toy, words[tone])} for tone in (True, False))
    assert sum(int(i) in pleasant for i in found["promoted_ids"][late]) >= 4
    assert sum(int(i) in unpleasant for i in found["demoted_ids"][late]) >= 3


def test_the_sweep_names_the_damage(toy, texts):
    held_out, words = texts
    vector = steering_vectors(toy, PLEASANT, UNPLEASANT)
    pleasant, unpleasant = ids(toy, words[True]), ids(toy, words[False])

    def tone(logits):
        probabilities = logits.softmax(-1)
        return probabilities[:, pleasant].sum(-1) - probabilities[:, unpleasant].sum(-1)

    capitals = [
        "The capital of France is Paris.",
        "The currency of Japan is the yen.",
        "Mary and John went to the store.",
    ]
    damage = {"kl": capitals, "perplexity": capitals, "repetition": None}
    prompts = held_out[False][:20]
    swept = steering_sweep(
        toy, vector, prompts, tone, [1, LAYER], [0.0, 0.5, 1.0, 2.0, 16.0], damage, max_new_tokens=8, batch_size=64
    )
    assert swept["baseline"].mean() < -0.9
    assert (swept["kl"].diff(dim=1) > 0).all()
    assert (swept["perplexity"][:, 0] - swept["plain_perplexity"]).abs().max() < 0.01
    assert (swept["perplexity"][:, -1] > 10 * swept["plain_perplexity"]).all()
    gentle, strong = swept.best(0.5), swept.best(float("inf"))
    assert gentle["kl"] <= 0.5 < strong["kl"]
    assert strong["effect"] > 1.8
    assert gentle["effect"] <= strong["effect"]
    random = steering_sweep(toy, vector.random(), prompts, tone, [LAYER], [2.0], damage=None)
    assert swept["effect"][1, 3] > random["effect"].item() + 1.0


def test_only_unhappy_texts_are_cheered_up(toy, texts):
    """The condition of a probe, and the vector of a contrast: rows that are pleasant already stay as they are."""
    held_out, words = texts
    vector = steering_vectors(toy, PLEASANT, UNPLEASANT, layers=LAYER)
    sad = probe(toy, PLEASANT + UNPLEASANT, [0] * 20 + [1] * 20, layers=2, controls=[]).condition(2)
    both = held_out[True][:30] + held_out[False][:30]
    with torch.no_grad(), toy.trace(both):
        plain = toy.logits[:, -1].save()
    with torch.no_grad(), toy.steering(vector, factor=FACTOR, when=sad), toy.trace(both):
        steered = toy.logits[:, -1].save()
    changed = (plain - steered).abs().amax(-1) > 1e-3
    assert changed[:30].float().mean() < 0.1
    assert changed[30:].float().mean() > 0.9
    assert torch.isin(steered.argmax(-1), ids(toy, words[True])).float().mean() > 0.9


def test_an_optimised_vector_reaches_texts_it_was_not_fitted_on(toy, texts):
    held_out, words = texts
    vector = optimize_vector(toy, UNPLEASANT[::2], " wonderful", 2, steps=40, norm=40.0)
    with toy.steering(vector):
        assert tones(toy, held_out[False][:50], words)[0] > 0.9


# -- harnesses that take a HuggingFace model -------------------------------------------------------------------------


def choices(module, tokenizer, questions):
    """A harness in small: for each question, the choice to which the HuggingFace module gives the most probability."""
    picked = []
    for context, options in questions:
        scores = []
        for option in options:
            head, tail = tokenizer(context).input_ids, tokenizer(option).input_ids
            with torch.no_grad():
                logs = module(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            scores.append(sum(logs[len(head) - 1 + i, token].item() for i, token in enumerate(tail)))
        picked.append(max(range(len(options)), key=scores.__getitem__))
    return picked


def test_a_harness_runs_the_steered_module(toy, texts):
    held_out, _ = texts
    vector = steering_vectors(toy, PLEASANT, UNPLEASANT, layers=LAYER)
    questions = [(text, [" wonderful.", " terrible."]) for text in held_out[False][:20]]
    assert sum(choices(toy._module, toy.tokenizer, questions)) > 18
    with toy.steering(vector, factor=FACTOR):
        assert sum(choices(toy._module, toy.tokenizer, questions)) < 2
    assert sum(choices(toy._module, toy.tokenizer, questions)) > 18


TASK = """
task: tone
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["wonderful", "terrible"]
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
"""


def test_lm_evaluation_harness(toy, texts, tmp_path, monkeypatch):
    """The recipe of the page on steering, with a task from a local file."""
    lm_eval = pytest.importorskip("lm_eval")
    import json

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    held_out, _ = texts
    (tmp_path / "tone.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in held_out[False][:20]))
    (tmp_path / "tone.yaml").write_text(TASK.format(data=tmp_path / "tone.jsonl"))
    vector = steering_vectors(toy, PLEASANT, UNPLEASANT, layers=LAYER)
    harness = HFLM(pretrained=toy._module, tokenizer=toy.tokenizer, batch_size=4)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def accuracy():
        found = lm_eval.simple_evaluate(harness, tasks=["tone"], task_manager=tasks, bootstrap_iters=0)
        return found["results"]["tone"]["acc,none"]

    assert accuracy() < 0.1
    with toy.steering(vector, factor=FACTOR):
        assert accuracy() > 0.9
    assert accuracy() < 0.1
