"""The table as a whole: support, explanations, names, and values in every kind of run."""

import pytest
import torch

from nnterp import RenameConfig, StandardizedTransformer
from nnterp.anatomy import AttnProbFunction
from nnterp.errors import OutsideTraceError, ShapeError, Unavailable
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer
from nnterp.values import VALUES, canonical

from .values_reference import ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

SERVED = [
    n
    for n, row in VALUES.items()
    if row.stack == "layers"
    and row.finder not in ("router", "experts", "state", "linear", "features")
    and n not in ("other_contributions", "shared_expert_neurons")
]


@pytest.fixture(scope="module")
def llama():
    return wrapped("llama", check=True)


def get(model, name, layer=1):
    return getattr(model, name)[layer] if VALUES[name].per_layer else getattr(model, name)


def put(model, name, tensor, layer=1):
    if VALUES[name].per_layer:
        getattr(model, name)[layer] = tensor
    else:
        setattr(model, name, tensor)


def test_every_row_has_an_accessor(llama):
    for name, value in VALUES.items():
        assert value.description.endswith(".")
        assert value.shape.startswith("[batch") or value.stack == "vision"
        assert hasattr(type(llama), name)
    assert llama.values == VALUES


@pytest.mark.parametrize("name", SERVED)
def test_shapes_are_what_the_table_says(llama, name):
    tokens = ids(3, 7)
    with torch.no_grad(), llama.trace(tokens):
        value = get(llama, name).save()
    sizes = {"batch": 3, "seq": 7, "keys": 7, "query": 7, "key": 7, "hidden": 64}
    sizes |= {"heads": 4, "kv_heads": 2, "head_dim": 24, "neurons": 112}
    assert list(value.shape) == [sizes[axis] for axis in VALUES[name].shape.strip("[]").split(", ")]


@pytest.mark.parametrize("name", SERVED)
def test_written_value_is_read_back_and_reaches_the_logits(llama, name):
    tokens = ids()
    with torch.no_grad(), llama.trace(tokens):
        value = get(llama, name).clone().save()
        clean = llama.logits.save()
    new = value.flip(1) * 0.7 if name != "attention_scores" else value * 0.3
    with torch.no_grad(), llama.trace(tokens):
        put(llama, name, new.clone())
        if name != "attention_head_contributions":  # read before W_O, written after it
            back = get(llama, name).clone().save()
        changed = llama.logits.save()
    if name != "attention_head_contributions":
        torch.testing.assert_close(back, new, atol=1e-5, rtol=1e-4)
    assert (changed - clean).abs().max() > 1e-4
    with pytest.raises(ShapeError, match="shape"), torch.no_grad(), llama.trace(tokens):
        put(llama, name, new[:, :-1])


@pytest.mark.parametrize("name", SERVED)
def test_in_a_session_and_in_a_generation(llama, name):
    tokens = ids(2, 6)
    with torch.no_grad(), llama.session():
        with llama.trace(tokens):
            first = get(llama, name).clone().save()
        with llama.trace(tokens):
            put(llama, name, first * 0.5)
            logits = llama.logits.save()
    with torch.no_grad(), llama.trace(tokens):
        put(llama, name, first * 0.5)
        expected = llama.logits.save()
    torch.testing.assert_close(logits, expected)

    with torch.no_grad(), llama.generate(tokens, max_new_tokens=3, do_sample=False, min_new_tokens=3) as tracer:
        seen = []
        seen.save()
        for _ in tracer.iter[:3]:
            seen.append(get(llama, name).clone())
            put(llama, name, seen[-1] * 0.5)
    torch.testing.assert_close(seen[0], first, atol=1e-5, rtol=1e-4)
    axis = 2 if VALUES[name].shape == "[batch, heads, query, key]" else 1
    lengths = [s.shape[axis] for s in seen]
    assert lengths == ([6, 7, 8] if name in ("attention_keys", "attention_values") else [6, 1, 1])


@pytest.mark.parametrize("model_type", ["llama", "bloom", "opt", "xglm"])
def test_each_invoke_sees_and_writes_its_own_rows(model_type):
    """Also where the model folds heads or positions into the batch axis."""
    model = wrapped(model_type, check=True)
    a, b = ids(1, 8, seed=1), ids(2, 8, seed=2)
    names = [
        n
        for n in ("attention_probabilities", "attention_values", "mlp_neurons", "mlps_output")
        if model.support().available(n, 1)
    ]
    assert len(names) == 4
    for name in names:
        with torch.no_grad(), model.trace(b):
            alone = get(model, name).clone().save()
            put(model, name, alone * 0.5)
            expected = model.logits.save()
        with torch.no_grad(), model.trace(a):
            other = model.logits.save()
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(a):
                untouched = model.logits.save()
            with tracer.invoke(b):
                mine = get(model, name).clone().save()
                put(model, name, mine * 0.5)
                written = model.logits.save()
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(written, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(untouched, other, atol=1e-4, rtol=1e-4)


def test_editing_in_place(llama):
    tokens = ids()
    for name in ("attention_head_outputs", "attention_probabilities", "mlp_neurons", "attention_values"):
        with torch.no_grad(), llama.trace(tokens):
            value = get(llama, name)
            new = value.clone()
            new[:, 2:4] = 0
            put(llama, name, new)
            assigned = llama.logits.save()
        with torch.no_grad(), llama.trace(tokens):
            get(llama, name)[:, 2:4] = 0
            edited = llama.logits.save()
        torch.testing.assert_close(assigned, edited)


def test_first_use_inside_a_layer_that_has_begun():
    """A value inside a forward is served even when it is first asked for after that forward began."""
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    tokens = ids()
    with torch.no_grad(), model.trace(tokens):
        attention = model.attentions_output[0].save()
        mid = model.layers_mid[0].save()
        x = model.layers_input[1].save()
    with torch.no_grad(), model.trace(tokens):
        entered = model.layers_input[0].save()
    torch.testing.assert_close(mid, entered + attention)
    assert x.shape == mid.shape


def test_names(llama):
    for alias, name in {
        "hook_embed": "token_embeddings",
        "blocks.3.hook_resid_pre": "layers_input",
        "blocks.3.hook_resid_mid": "layers_mid",
        "blocks.3.hook_resid_post": "layers_output",
        "blocks.3.attn.hook_z": "attention_head_outputs",
        "blocks.3.attn.hook_pattern": "attention_probabilities",
        "blocks.3.attn.hook_attn_scores": "attention_scores",
        "blocks.3.attn.hook_q": "attention_queries",
        "blocks.3.attn.hook_k": "attention_keys",
        "blocks.3.attn.hook_v": "attention_values",
        "blocks.3.attn.hook_result": "attention_head_contributions",
        "blocks.3.hook_attn_out": "attention_contributions",
        "blocks.3.hook_mlp_out": "mlp_contributions",
        "blocks.3.mlp.hook_post": "mlp_neurons",
        "ln_final.hook_normalized": "ln_final_output",
    }.items():
        value, layer = canonical(alias)
        assert value.name == name
        assert layer == (3 if alias.startswith("blocks") else None)
    with pytest.raises(ValueError, match="hook_resid_post"):
        canonical("blocks.3.hook_nothing")


def test_support_and_explain(llama, capsys):
    support = llama.support()
    assert support["layers_output"] == (0, 1, 2, 3)
    assert support["router_logits"] == ()
    assert "no mixture of experts" in str(support)
    llama.explain("blocks.2.attn.hook_pattern")
    shown = capsys.readouterr().out
    assert "model.layers.2.self_attn" in shown
    assert "[batch, heads, query, key]" in shown
    assert "-->" in shown
    with pytest.raises(Unavailable, match="no mixture"):
        llama.explain("router_logits")
    parallel = wrapped("gpt_neox", eager=False, check=True)
    assert parallel.support()["layers_mid"] == ()
    assert "parallel block" in parallel.support().reasons["layers_mid"][0]


def test_probabilities_are_refused_without_eager_attention():
    model = wrapped("llama", eager=False, check=True)
    assert not model.attn_probs_available
    with pytest.raises(Unavailable, match="enable_attention_probs=True"), model.trace("a"):
        model.attention_probabilities[0].save()
    with pytest.raises(ValueError, match="sdpa"):
        StandardizedTransformer(
            tiny_model("llama"), tokenizer=tiny_tokenizer(), enable_attention_probs=True, attn_implementation="sdpa"
        )


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "bloom", "gpt_oss", "gemma2", "diffllama"])
def test_check_and_print_source(model_type, capsys):
    model = wrapped(model_type, check=True)
    assert model.attn_probs_available
    model.attention_probabilities.check_source()
    model.attention_probabilities.print_source(1)
    assert "softmax" in capsys.readouterr().out.lower() or model_type in (
        "gpt2",
        "gpt_oss",
        "diffllama",
        "gemma2",
        "bloom",
    )


def test_a_sink_makes_rows_sum_below_one():
    model = wrapped("gpt_oss", check=True)
    with torch.no_grad(), model.trace(ids()):
        sums = model.attention_probabilities[0].sum(-1).save()
    assert (sums < 1 - 1e-3).any()
    assert (sums > 0).all()


class WrongSource(AttnProbFunction):
    def get_attention_prob_source(self, attention_module, return_module_source=False):
        return attention_module.source if return_module_source else attention_module.source.attention_interface_1


class RightSource(AttnProbFunction):
    def get_attention_prob_source(self, attention_module, return_module_source=False):
        source = attention_module.source.attention_interface_1.source
        return source if return_module_source else source.nn_functional_dropout_0


def test_a_source_of_the_users_own():
    def make(source):
        return StandardizedTransformer(
            tiny_model("llama"),
            tokenizer=tiny_tokenizer(),
            enable_attention_probs=True,
            rename_config=RenameConfig(attn_prob_source=source),
        )

    right = make(RightSource())
    right.attention_probabilities.check_source()
    with torch.no_grad(), right.trace(ids()):
        probs = right.attention_probabilities[1].save()
    with torch.no_grad(), wrapped("llama", check=True).trace(ids()):
        own = wrapped("llama", check=True).attention_probabilities[1].save()
    torch.testing.assert_close(probs, own)
    with pytest.raises(Exception, match=r"probabilities|tuple"):
        make(WrongSource()).attention_probabilities.check_source()


def test_a_value_used_twice_is_written_twice():
    """DiffLlama calls its attention function twice with the same queries and keys."""
    model, tokens = wrapped("diffllama", eager=False, check=True), ids()
    with torch.no_grad(), model.trace(tokens):
        model.attention_queries[1] = model.attention_queries[1] * 0
        silent = model.attention_head_outputs[1].save()
    eager = wrapped("diffllama", check=True)
    with torch.no_grad(), eager.trace(tokens):
        probs = eager.attention_probabilities[1]
        uniform = torch.ones_like(probs).tril()
        eager.attention_probabilities[1] = uniform / uniform.sum(-1, keepdim=True)
        expected = eager.attention_head_outputs[1].save()
    torch.testing.assert_close(silent, expected, atol=1e-5, rtol=1e-4)


def test_outside_a_trace(llama):
    with pytest.raises(OutsideTraceError, match="attention_head_outputs"):
        llama.attention_head_outputs[0]
    with pytest.raises(IndexError, match="4 layers"):
        llama.mlp_neurons[4]


def test_without_weights(tmp_path):
    """Places are found on fake tensors, and again with the weights."""
    folder = tiny_checkpoint("llama", tmp_path / "llama")
    model = StandardizedTransformer(
        folder, enable_attention_probs=True, allow_dispatch=False, check_attn_probs_with_trace=False
    )
    if not model.dispatched:
        with model.scan(ids()):
            queries = model.attention_queries[1].save()
            z = model.attention_head_outputs[1].save()
        assert queries.shape == z.shape == (2, 12, 4, 24)
    model.dispatch()
    with torch.no_grad(), model.trace(ids()):
        probs = model.attention_probabilities[1].save()
        mid = model.layers_mid[1].save()
    assert probs.shape == (2, 4, 12, 12)
    assert mid.shape == (2, 12, 64)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss"])
def test_routers(model_type):
    """The router's logits are HuggingFace's own, and the choices are their largest."""
    model, tokens = wrapped(model_type, eager=False, check=True), ids()
    layers = model.support()["router_logits"]
    assert layers
    with torch.no_grad(), model.trace(tokens):
        logits = model.router_logits[layers[-1]].save()
        chosen = model.router_choices[layers[-1]].save()
    assert logits.shape[:2] == chosen.shape[:2] == tokens.shape
    assert not chosen.is_floating_point()
    assert chosen.max() < logits.shape[-1]
    with torch.no_grad():
        own = model._module(tokens, output_router_logits=True, use_cache=False)
    theirs = getattr(own, "router_logits", None)
    if theirs:
        torch.testing.assert_close(logits.flatten(0, 1), theirs[-1].reshape(-1, logits.shape[-1]), atol=1e-5, rtol=1e-4)
    if model_type in ("mixtral", "qwen3_moe", "olmoe"):
        top = logits.topk(chosen.shape[-1], dim=-1).indices
        assert torch.equal(top.sort(-1).values, chosen.sort(-1).values)


def test_the_reference_page_is_the_table():
    from pathlib import Path

    from nnterp.values._page import page

    written = Path(__file__).parents[3] / "docs" / "values.md"
    assert written.read_text(encoding="utf-8") == page(), "run: python -m nnterp.values > docs/values.md"
    for name in VALUES:
        assert f"`{name}`" in page()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "jamba", "gpt_oss", "olmoe", "dots1"])
def test_written_router_logits_decide(tiny, model_type):
    """Scores in reverse are what the router's matrix gives with its rows in reverse."""
    model = tiny(model_type)
    layer = model.support()["router_logits"][0]
    tokens = torch.arange(12, 20)[None]
    with torch.no_grad(), model.trace(tokens):
        model.router_logits[layer] = model.router_logits[layer].flip(-1)
        written = model.logits.save()
    place = model.place("router_logits", layer)
    router = model._module.get_submodule(place.path)
    kept = {name: p.detach().clone() for name, p in router.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in router.named_parameters():
                if name.endswith(("weight", "bias")) and "correction" not in name:
                    parameter.copy_(parameter.flip(0))
            expected = model._module(tokens, use_cache=False).logits
    finally:
        with torch.no_grad():
            for name, parameter in router.named_parameters():
                parameter.copy_(kept[name])
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-4)
    plain = model._module(tokens, use_cache=False).logits
    assert (written - plain).abs().max() > 1e-3
