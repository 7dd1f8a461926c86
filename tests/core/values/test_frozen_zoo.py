"""What can be held still on every causal language model of transformers; `test_frozen_gradients` checks the numbers."""

import pytest

from nnterp.anatomy import find_anatomy
from nnterp.frozen import FROZEN, _holding
from nnterp.frozen._proof import prove
from nnterp.testing import model_types, tiny_model

from ...looped_modeling import LOOPED

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

NO_ANATOMY = {"xlm", *LOOPED}
MIXERS = {  # state space, linear attention, convolution or recurrent mixers: norms alone
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lara_mini", "lfm2", "lfm2_moe", "lfm3"),
    *("mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("qwen3_5_text", "qwen3_next", "rwkv", "xlstm", "zamba", "zamba2"),
}
SERVED = {
    **dict.fromkeys(MIXERS, ("norms",)),
    # A length inside the mixer is written as a square root, which may be a norm.
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma"), ()),
    # Clamps in the feed-forward (or, for DBRX, of the values) are no gates.
    **dict.fromkeys(("dbrx", "gpt_oss", "minimax_m3_vl_text"), ("patterns", "norms")),
    "inkling_text": ("patterns", "norms"),  # weights of experts by a log-sigmoid
    # Streams that are mixed by factors made of the stream.
    **dict.fromkeys(("gemma3n_text", "inkling2_text"), ("norms",)),
    **dict.fromkeys(("deepseek_v4", "hy_v4"), ()),
    "blt": ("norms", "gates"),  # other stacks
    "reformer": (),  # a backward pass of its own
}


@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in NO_ANATOMY])
def test_what_can_be_held_still(model_type):
    module = tiny_model(model_type)
    before = [parameter.requires_grad for parameter in module.parameters()]
    proof = prove(module, find_anatomy(module, None))
    served = tuple(kind for kind in FROZEN if kind not in proof.reasons)
    assert served == SERVED.get(model_type, FROZEN), proof.reasons
    assert proof.error < 1e-5
    assert [parameter.requires_grad for parameter in module.parameters()] == before


@pytest.mark.parametrize(
    ("model_type", "rules", "name", "kind"),
    [
        ("llama", "SCALES", "rsqrt", "norms"),
        ("gpt2", "SCALES", "layer_norm", "norms"),
        ("llama", "PATTERNS", "scaled_dot_product_attention", "patterns"),
        ("bloom", "PATTERNS", "softmax", "patterns"),
        ("qwen3_moe", "WEIGHTS", "softmax", "gates"),
        ("deepseek_v3", "WEIGHTS", "sigmoid", "gates"),
    ],
)
def test_the_proof_notices_a_rule_that_is_missing(monkeypatch, model_type, rules, name, kind):
    module = tiny_model(model_type)
    table = getattr(_holding, rules)
    monkeypatch.setattr(_holding, rules, {key: rule for key, rule in table.items() if key != name})
    assert set(prove(module, find_anatomy(module, None)).reasons) == {kind}


@pytest.mark.parametrize(
    ("model_type", "name", "wrong", "kind"),
    [
        ("gpt2", "layer_norm", lambda func, args, kwargs: func(*args, **kwargs).detach(), "norms"),
        ("llama", "rsqrt", lambda func, args, kwargs: func(*args, **kwargs).detach() * 1.001, "norms"),
    ],
)
def test_the_proof_notices_a_rule_that_is_wrong(monkeypatch, model_type, name, wrong, kind):
    module = tiny_model(model_type)
    monkeypatch.setitem(_holding.SCALES, name, wrong)
    assert kind in prove(module, find_anatomy(module, None)).reasons
