"""`collect` against a slow loop: one prompt at a time, plain torch hooks on the plain module."""

import pytest
import torch

from nnterp.errors import InsideTraceError, Unavailable
from nnterp.positions import at, last_of
from nnterp.testing import LEFT_PADDING_INEXACT
from nnterp.traced import View
from nnterp.values import Site

from .values_reference import arguments, hooked, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [
    "The capital of France is",
    "Hello",
    "The Eiffel Tower stands in the middle of Paris, and Paris is large",
    "one two three four",
    "A cat sat on the mat and looked at the other cat",
]
TYPES = (
    "gpt2 llama gemma2 gemma3_text qwen3 qwen2 mistral phi phi3 gpt_neox gptj gpt_neo bloom falcon mpt opt codegen "
    "stablelm starcoder2 olmo2 granite cohere cohere2 glm glm4 mixtral qwen3_moe deepseek_v3 gpt_oss nemotron xglm "
    "smollm3 bert mamba jamba cpmant"
).split()
NAMES = ["layers_output", "layers_input", "attentions_output", "mlps_output"]


def loop(model, name, layer, rows):
    """The value of every prompt alone, read by a hook."""
    values = model.place(name, layer)
    values = values.place if isinstance(values, View) else values
    assert isinstance(values, Site)
    found = []
    for row in rows:
        with hooked(model._module, x=(values.path, values.side)) as seen, torch.no_grad():
            model._module(**arguments(model._module, torch.tensor([row.ids])))
        x = seen["x"]
        found.append(x.reshape(-1, x.shape[-1])[-len(row) :])  # CPM-Ant puts a prompt of its own in front
    return found


@pytest.fixture
def side(request):
    return request.param


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_equals_a_loop_of_single_prompts(model_type, padding):
    model = wrapped(model_type, eager=False, check=True)
    kept = model.tokenizer.padding_side
    model.tokenizer.padding_side = padding
    try:
        have = [n for n in NAMES if model.support().available(n)]
        wanted = [*reversed(have), *have]  # any order, and twice
        got = model.collect(PROMPTS, wanted, batch_size=2, progress=False)
        last = model.collect(PROMPTS, have, positions=-1, batch_size=3, progress=False)
    finally:
        model.tokenizer.padding_side = kept
    assert list(got) == list(dict.fromkeys(wanted))
    for name in have:
        layers = got.layers[name]
        for layer in {layers[0], layers[-1]}:
            for i, expected in enumerate(loop(model, name, layer, got.rows)):
                scale = expected.abs().max()
                mine = got[name, layer][i]
                assert (mine[: len(expected)] - expected).abs().max() < 1e-5 * scale.clamp(min=1), (name, layer, i)
                assert not mine[len(expected) :].any()
                assert (last[name, layer][i] - expected[-1]).abs().max() < 1e-5 * scale.clamp(min=1)
    assert got.mask.sum(1).tolist() == [len(row) for row in got.rows]
    assert last.mask.tolist() == [True] * len(last.rows)


def test_types_are_enough():
    assert len(TYPES) >= 30
    assert not set(TYPES) & set(LEFT_PADDING_INEXACT)


@pytest.fixture(scope="module")
def llama():
    return wrapped("llama", check=True)


def test_batch_size_and_order_do_not_matter(llama):
    names = [
        "mlp_neurons",
        "attention_probabilities",
        "attention_head_outputs",
        "layers_mid",
        "attention_keys",
        "token_embeddings",
    ]
    one = llama.collect(PROMPTS, names, batch_size=1, progress=False)
    many = llama.collect(PROMPTS[::-1], names[::-1], batch_size=4, progress=False)
    for name in names:
        axis = 1 if llama.values[name].per_layer else 0
        torch.testing.assert_close(one[name], many[name].flip(axis), atol=1e-5, rtol=1e-4)


def test_patterns_count_keys_over_the_rows_own_tokens(llama):
    got = llama.collect(PROMPTS, "attention_probabilities", batch_size=5, progress=False)
    for i, row in enumerate(got.rows):
        with torch.no_grad(), llama.trace(torch.tensor([row.ids])):
            alone = llama.attention_probabilities[2].save()
        n = len(row)
        torch.testing.assert_close(got["blocks.2.attn.hook_pattern"][i][:, :n, :n], alone[0], atol=1e-6, rtol=1e-5)
        assert not got["attention_probabilities", 2][i][:, :, n:].any()


def test_positions(llama):
    full = llama.collect(PROMPTS, "layers_output", progress=False)
    picked = llama.collect(PROMPTS, "layers_output", positions=[0, -1], progress=False)
    assert picked["layers_output"].shape[2] == 2
    assert torch.equal(picked["layers_output"][:, :, 0], full["layers_output"][:, :, 0])
    each = llama.collect(PROMPTS, "layers_output", positions=[[0], [0], [1, 2], [-1], [0, 1, 2]], progress=False)
    assert [len(p) for p in each.positions] == [1, 1, 2, 1, 3]
    assert torch.allclose(each["layers_output", 1][4], full["layers_output", 1][4, :3], atol=1e-5)
    assert not each["layers_output", 1][0, 1:].any()

    towers = llama.collect([PROMPTS[2]], "layers_output", positions=last_of("Eiffel Tower"), progress=False)
    text = llama.tokenizer(PROMPTS[2], return_offsets_mapping=True)["offset_mapping"]
    end = PROMPTS[2].index("Tower") + len("Tower")
    token = max(i for i, (a, b) in enumerate(text) if a < end and b > a)
    assert towers.positions == ((token,),)
    assert torch.allclose(towers["layers_output"][:, 0], full["layers_output"][:, 2, token], atol=1e-5)
    second = llama.collect([PROMPTS[2]], "layers_output", positions=at("Paris", 1), progress=False)
    assert second.positions[0][0] > towers.positions[0][0]


@pytest.mark.parametrize(
    ("positions", "error", "words"),
    [
        (9, IndexError, "Prompt 0 has"),
        (at("Rome"), ValueError, "Rome"),
        (slice(40, 50), ValueError, "selects nothing"),
        ([[0], [1]], ValueError, "one list per prompt"),
    ],
)
def test_positions_that_do_not_exist(llama, positions, error, words):
    with pytest.raises(error, match=words):
        llama.collect(PROMPTS, "layers_output", positions=positions, progress=False)


def test_what_cannot_be_asked_for(llama):
    with pytest.raises(ValueError, match=r"no value called.*Did you mean layers_output or "):
        llama.collect(PROMPTS, "layer_outputs", progress=False)
    with pytest.raises(ValueError, match=r"Did you mean blocks\.3\.hook_resid_post or "):
        llama.collect(PROMPTS, "blocks.3.hook_resid_pst", progress=False)
    with pytest.raises(IndexError, match=r"^layers_output\[31\]: there are 4 layers"):
        llama.collect(PROMPTS, "layers_output[31]", progress=False)
    with pytest.raises(IndexError, match="4 layers"):
        llama.collect(PROMPTS, "layers_output", layers=[4], progress=False)
    with pytest.raises(Unavailable, match="no mixture of experts"):
        llama.collect(PROMPTS, "router_logits", progress=False)
    with pytest.raises(TypeError, match="max_new_tokens"):
        llama.collect(PROMPTS, "layers_output", do_sample=True)
    for tokens in (None, 2):
        with pytest.raises(TypeError, match=r"collect\(\) has no argument position\. Did you mean positions\?"):
            llama.collect(PROMPTS, "layers_output", position=-1, max_new_tokens=tokens)
    with pytest.raises(TypeError, match="max_new_tokens"):  # near to an argument, but a setting of its own
        llama.collect(PROMPTS, "layers_output", min_new_tokens=2)
    with pytest.raises(AttributeError, match=r"attribute 'layer_outputs'\. Did you mean layers_output"):
        llama.layer_outputs
    with pytest.raises(AttributeError, match=r"attribute 'quite_another_thing'\.$"):
        llama.quite_another_thing
    with pytest.raises(InsideTraceError, match="collect"), llama.trace("a"):
        llama.collect("b", "layers_output")


def test_names_and_layers(llama):
    got = llama.collect(
        PROMPTS,
        ["blocks.3.hook_resid_post", "layers_output[1]", "ln_final.hook_normalized"],
        progress=False,
        positions=-1,
    )
    assert got.layers["layers_output"] == (3, 1)
    assert torch.equal(got["layers_output", -1], got["blocks.3.hook_resid_post"])
    assert torch.equal(got["layers_output"][1], got["layers_output[1]"])
    assert got["ln_final_output"].shape == (len(PROMPTS), llama.hidden_size)
    with pytest.raises(KeyError, match="Layer 2"):
        got["layers_output", 2]
    with pytest.raises(KeyError, match="not collected"):
        got["mlp_neurons"]


def test_kinds_of_prompts(llama):
    encoding = llama.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    texts, tensors = (llama.collect(p, "layers_output", positions=-1, progress=False) for p in (PROMPTS, encoding))
    assert torch.allclose(texts["layers_output"], tensors["layers_output"], atol=1e-6)
    lists = llama.collect(
        [llama.tokenizer(p).input_ids for p in PROMPTS], "layers_output", positions=-1, progress=False
    )
    assert torch.equal(texts["layers_output"], lists["layers_output"])


def test_reduce(llama):
    full = llama.collect(PROMPTS, ["layers_output", "mlp_neurons"], progress=False)
    mean = llama.collect(PROMPTS, ["layers_output", "mlp_neurons"], reduce="mean", batch_size=2, progress=False)
    for name in full:
        expected = full[name].double().sum((1, 2)) / full.mask.sum()
        torch.testing.assert_close(mean[name], expected.float(), atol=1e-5, rtol=1e-4)
    norms = llama.collect(PROMPTS, "layers_output", positions=-1, reduce=lambda x: x.norm(dim=-1), progress=False)
    last = llama.collect(PROMPTS, "layers_output", positions=-1, progress=False)
    torch.testing.assert_close(norms["layers_output"], last["layers_output"].norm(dim=-1))
    with pytest.raises(ValueError, match="first axis"):
        llama.collect(PROMPTS, "layers_output", reduce=lambda x: x.mean(), progress=False)


def test_dtype(llama):
    half = llama.collect(PROMPTS, "layers_output", positions=-1, dtype=torch.bfloat16, progress=False)
    assert half["layers_output"].dtype == torch.bfloat16


def test_an_error_keeps_what_is_finished(llama):
    seen = []

    def fails_later(x):
        seen.append(len(x))
        if sum(seen) > 4 * llama.num_layers // 2:
            raise RuntimeError("out of luck")
        return x

    with pytest.raises(RuntimeError, match="out of luck") as raised:
        llama.collect(PROMPTS, "layers_output", positions=-1, batch_size=2, reduce=fails_later, progress=False)
    partial = raised.value.collected
    full = llama.collect(PROMPTS, "layers_output", positions=-1, progress=False)
    assert 0 < len(partial.done) < len(PROMPTS)
    for i in partial.done:
        assert torch.allclose(partial["layers_output"][:, i], full["layers_output"][:, i], atol=1e-5)


def test_stops_after_the_last_layer_needed(llama):
    ran = []
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(llama._module.model.layers)]
    handles.append(llama._module.lm_head.register_forward_hook(lambda *_: ran.append("head")))
    try:
        llama.collect("Hello there", ["layers_output[1]", "layers_output[0]"], progress=False)
    finally:
        for handle in handles:
            handle.remove()
    assert "head" not in ran
    assert 2 not in ran


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom", "jamba", "opt"])
def test_over_a_generation(model_type):
    """Every new token's values equal those of one forward pass over the finished text."""
    model = wrapped(model_type, check=True)
    n = 5
    got = model.collect(
        PROMPTS[:3], ["mlps_output", "layers_output"], max_new_tokens=n, do_sample=False, progress=False
    )
    for i, row in enumerate(got.rows):
        made = got.generated[i][got.generated[i] >= 0]
        whole = torch.tensor([[*row.ids, *made.tolist()]])
        with torch.no_grad(), model.trace(whole):
            own = model.layers_output[1].save()
            logits = model.logits.save()
        k = len(made)
        torch.testing.assert_close(
            got["layers_output", 1][i, :k], own[0, len(row) - 1 : len(row) - 1 + k], atol=1e-4, rtol=1e-4
        )
        assert logits[0, len(row) - 1 : len(row) - 1 + k].argmax(-1).tolist() == made.tolist()


def test_the_middle_of_a_layer_whose_module_adds_the_stream():
    """CPM-Ant's attention module ends with the stream's middle, at an operation that the probe does not time."""
    model = wrapped("cpmant", eager=False, check=True)
    found = model.collect(PROMPTS, ["mlps_input", "layers_mid", "attentions_output"], progress=False)
    for layer in range(model.num_layers):
        with torch.no_grad(), model.trace(list(found.rows[0].ids)):
            middle = model.layers_mid[layer].save()
        torch.testing.assert_close(found["layers_mid", layer][0, : len(found.rows[0])], middle[0], rtol=1e-4, atol=1e-4)
