"""What models do around their layers, against their configurations and plain hooks."""

import math

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

# Type → {name of a fact: the number that the config has}
FACTS = {
    "llama": {},
    "gpt2": {"positions": None},
    "gemma2": {"embedding multiplier": lambda c: math.sqrt(c.hidden_size), "logit softcap": "final_logit_softcapping"},
    "gemma": {"embedding multiplier": lambda c: math.sqrt(c.hidden_size)},
    "granite": {
        "embedding multiplier": "embedding_multiplier",
        "residual multiplier": "residual_multiplier",
        "logit multiplier": lambda c: 1 / c.logits_scaling,
    },
    "cohere": {"logit multiplier": "logit_scale"},
    "falcon_h1": {"embedding multiplier": "embedding_multiplier", "logit multiplier": "lm_head_multiplier"},
    "gemma3n_text": {
        "embedding multiplier": lambda c: math.sqrt(c.hidden_size),
        "per-layer embeddings": "hidden_size_per_layer_input",
        "streams": "altup_num_inputs",
    },
    "deepseek_v3": {"multi-token prediction": "num_nextn_predict_layers"},
    "glm4_moe": {"multi-token prediction": "num_nextn_predict_layers"},
    "qwen3_next": {"multi-token prediction": None},
    "bloom": {"embedding path": None},
    "opt": {"positions": None},
}
MANY = [t for t in FACTS if t not in ("llama", "gpt2", "gemma2", "bloom", "falcon_h1", "deepseek_v3", "qwen3_next")]


def check(model, expected):
    config = model._module.config.get_text_config()
    found = {}
    for fact in model.support().context:
        found.setdefault(fact.name, []).append(fact)
    assert found.keys() >= expected.keys(), found
    for name, number in expected.items():
        if number is not None:
            wanted = number(config) if callable(number) else getattr(config, number)
            assert all(math.isclose(fact.number, wanted, rel_tol=1e-4) for fact in found[name]), found[name]
    return found


def entering(model, ids):
    """What enters the first layer, by a plain hook."""
    seen = []
    first = model._module.get_submodule(model.anatomy.blocks[0].path)

    def hook(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model._module(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", [t for t in FACTS if t not in MANY])
def test_facts(tiny, model_type):
    model = tiny(model_type)
    found, ids = check(model, FACTS[model_type]), torch.arange(8, 19)[None]
    rows = model._module.get_input_embeddings().weight[ids]
    stream = entering(model, ids)
    if "embedding multiplier" in found and stream.shape == rows.shape:
        torch.testing.assert_close(stream, rows * found["embedding multiplier"][0].number, rtol=1e-4, atol=1e-4)
    elif not {"positions", "embedding path", "streams"} & found.keys():
        torch.testing.assert_close(stream, rows)


@pytest.mark.parametrize("model_type", MANY)
def test_more_facts(tiny, model_type):
    test_facts(tiny, model_type)


def test_a_model_that_does_nothing_around_its_layers_says_so(tiny, capsys):
    model = tiny("llama")
    assert model.support().context == ()
    model.explain()
    assert "is a row of the embedding table" in capsys.readouterr().out


def test_printed(tiny, capsys):
    model = tiny("gemma2")
    model.explain()
    said = capsys.readouterr().out
    assert "embedding multiplier" in said
    assert "8 (the square root of 64)" in said
    support = model.support()
    assert all(str(fact) in str(support) for fact in support.context)
    assert "embedding multiplier" in support._repr_html_()


def test_the_number_is_measured_and_not_read_from_the_config():
    """A config whose field has another name, and a wrong one, change nothing."""
    module = tiny_model("granite")
    module.config.embedding_multiplier, module.model.embedding_multiplier = 5.0, 2.25
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    (fact,) = [f for f in model.support().context if f.name == "embedding multiplier"]
    assert fact.number == pytest.approx(2.25, rel=1e-5)
