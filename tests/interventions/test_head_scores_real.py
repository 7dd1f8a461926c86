"""Known kinds of heads on the two small trained models, and what they make of the tasks."""

import pytest
import torch

from nnterp.interventions import head_scores, logit_difference, probability_difference
from nnterp.prompts.tasks import capitals, greater_than, ioi

pytestmark = [pytest.mark.real, pytest.mark.slow]

NAMES = ("smollm2", "gemma3")
LEAST = {"induction": 0.5, "previous_token": 0.5}
METRICS = {ioi: logit_difference, greater_than: probability_difference, capitals: logit_difference}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LEAST)
def test_heads_are_found_well_above_the_control(real, name, kind):
    model = real(name, enable_attention_probs=True)
    scores = head_scores(model, kind, n=4, draws=3, progress=False)
    found = scores.heads(threshold=LEAST[kind])
    print(name, kind, [(c["layer"], c["head"], round(c["scores"], 2), round(c["control"], 3)) for c in found[:5]])
    assert found
    assert found[0]["control"] < 0.2
    assert len(scores.heads()) < scores.values.numel() / 2  # most heads are of another kind


def test_name_movers_of_smollm2_stand_in_a_late_layer(real):
    model = real("smollm2", enable_attention_probs=True)
    task = ioi(model, 6)
    scores = head_scores(model, "name_mover", task.clean, task.correct, layers=[5, 23], draws=2, progress=False)
    found = scores.heads(threshold=0.3)
    print(found, scores["copying"][1].tolist(), scores["attention"][1].tolist())
    assert found[0]["scores"] > 0.5  # measured 0.73, head 23.0
    assert all(cell["layer"] == 23 for cell in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("make", "least"), [(ioi, 0.75), (greater_than, 0.75), (capitals, 0.9)])
def test_tasks_are_solved_above_chance(real, name, make, least):
    model = real(name, enable_attention_probs=True)
    task = make(model, 8)
    means = {}
    for which, prompts in (("clean", task.clean), ("corrupted", task.corrupted)):
        with torch.no_grad():
            ids = [model.tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
            logits = [model._module(input_ids=own, logits_to_keep=1).logits[0, -1] for own in ids]
        bound = METRICS[make](task.correct, task.wrong).bind(model, len(task), torch.stack(logits))
        scores = torch.cat([bound(own[None].float(), i) for i, own in enumerate(logits)])
        means[which] = scores.mean().item()
        if which == "clean":
            right = (scores > 0).float().mean().item()
    print(name, task.name, f"right {right:.2f}", {k: round(v, 2) for k, v in means.items()})
    assert right >= least
    assert means["clean"] > means["corrupted"]
