"""Looped models, whose layers run several times in a forward pass: every pass against plain torch hooks."""

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from transformers import CONFIG_MAPPING

from nnterp import StandardizedTransformer
from nnterp.certificate import CONSECUTIVE, PASSES, certify
from nnterp.errors import CertificateError, Unavailable
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced import _runs

from ..looped_modeling import CORE, LOOPED, PRELUDE, looped_module
from ..looped_modeling import PASSES as TIMES
from ..plain_hooks import at_call, seen

IDS = torch.tensor([[5, 9, 12, 40, 77], [33, 8, 21, 90, 14]])
LAST = PRELUDE + CORE  # number of the layer after the loop


@pytest.fixture(scope="module")
def model():
    return StandardizedTransformer(looped_module(), tokenizer=tiny_tokenizer(), enable_attention_probs=True)


@pytest.fixture(scope="module")
def plain(model):
    """What hooks see of a plain run: path → what each call of the module was given and returned."""
    with torch.no_grad():
        return seen(model._module, lambda: model._module(IDS, output_attentions=True, output_hidden_states=True))


def every_run(model):
    return [(layer, turn) for layer, times in enumerate(model.passes) for turn in range(times)]


def test_anatomy_support_and_explain_say_passes(model, capsys):
    assert model.passes == (1, TIMES, TIMES, 1)
    assert model.num_layers == 2 + CORE * TIMES
    assert model.anatomy.runs == ((0,), (1, 3, 5), (2, 4, 6), (7,))
    assert model.anatomy.seams == (1, 3, 5)
    assert "4 layer modules run 8 times, in the order 0 to 2, 1 to 2, 1 to 3" in str(model.anatomy)
    assert model.support()["mlp_neurons"] == tuple(range(8))
    model.explain("layers_output", layer=(1, 1))
    named = capsys.readouterr().out
    assert "(run 1 of 3, from 0)" in named
    model.explain("layers_output", layer=3)
    assert capsys.readouterr().out.splitlines()[-2:] == named.splitlines()[-2:]
    line = model.certificate[PASSES]
    assert line.status == "passed"
    assert "8 runs of 4 layers" in line.detail
    assert model.validate().ok  # again, of a model whose passes are known


def test_indices_of_passes(model):
    assert model.unrolled(1) == [1, 3, 5]
    assert model.unrolled(-2, -1) == 6
    assert model.unrolled(3) == [7]
    assert StandardizedTransformer(tiny_model("gpt2"), tokenizer=tiny_tokenizer()).unrolled(2) == [2]


VALUES = {  # value → (module in the layer, whether it is what the module is given)
    "layers_input": ("", True),
    "layers_output": ("", False),
    "attentions_input": ("self_attn", True),
    "attentions_output": ("self_attn", False),
    "attention_head_outputs": ("self_attn.o_proj", True),
    "layers_mid": ("post_attention_layernorm", True),
    "mlps_input": ("mlp", True),
    "mlp_neurons": ("mlp.down_proj", True),
    "mlps_output": ("mlp", False),
    "attention_contributions": ("self_attn", False),
    "mlp_contributions": ("mlp", False),
}


@pytest.mark.parametrize("value", VALUES)
def test_every_pass_is_what_a_hook_sees(model, plain, value):
    inner, given = VALUES[value]
    read = {}
    with torch.no_grad(), model.trace(IDS):
        for index in range(model.num_layers):
            at = next(run for run in every_run(model) if model.unrolled(*run) == index)
            read[at] = getattr(model, value)[at].clone().save()
    for (layer, turn), found in read.items():
        calls = plain.calls[f"model.layers.{layer}{'.' if inner else ''}{inner}"]
        assert len(calls) == model.passes[layer]
        expected = calls[turn][0] if given else calls[turn][1]
        assert torch.equal(found.reshape(expected.shape), expected)


def test_the_inside_of_attention_in_every_pass(model, plain):
    read = {}
    with torch.no_grad(), model.trace(IDS):
        for index in range(model.num_layers):
            queries, keys = model.attention_queries[index].save(), model.attention_keys[index].save()
            values, probs = model.attention_values[index].save(), model.attention_probabilities[index].save()
            heads = model.attention_head_outputs[index].save()
            read[index] = queries, keys, values, probs, heads
    later = torch.ones(IDS.shape[1], IDS.shape[1]).triu(1).bool()
    for index, (queries, keys, values, probs, heads) in read.items():
        assert torch.equal(probs, plain.result.attentions[index])
        groups = queries.shape[2] // keys.shape[2]
        keys, values = keys.repeat_interleave(groups, 2), values.repeat_interleave(groups, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * queries.shape[-1] ** -0.5
        torch.testing.assert_close(scores.masked_fill(later, -torch.inf).softmax(-1), probs)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", probs, values), heads)


def test_one_index_counts_all_runs_and_equals_hidden_states(model, plain):
    states = []
    with torch.no_grad(), model.trace(IDS):
        for index in range(model.num_layers - 1):
            states.append(model.layers_output[index].save())
        last = model.layers_output[-1].save()
        norm = model.ln_final_output.save()
    for state, expected in zip(states, plain.result.hidden_states[1:], strict=False):
        assert torch.equal(state, expected)
    assert torch.equal(norm, plain.result.hidden_states[-1])
    assert torch.equal(model.project_on_vocab(last), plain.result.logits)


WRITTEN = ["layers_input", "layers_output", "attentions_output", "attention_head_outputs", "mlp_neurons", "layers_mid"]


@pytest.mark.parametrize("value", WRITTEN)
@pytest.mark.parametrize("at", [(0, 0), (1, 0), (1, 2), (2, 1), (LAST, 0)])
def test_a_write_to_one_pass_is_that_of_a_hook(model, value, at):
    inner, given = VALUES[value]
    path = f"model.layers.{at[0]}{'.' if inner else ''}{inner}"
    with torch.no_grad(), model.trace(IDS):
        accessor = getattr(model, value)
        accessor[at] = scaled(accessor[at])
        written = model.logits.save()
    if value == "layers_mid":  # the hook writes to the feed-forward alone: what the residual path carries is added
        with torch.no_grad(), at_call(model._module, f"{path.rpartition('.')[0]}.self_attn", at[1], _to_mid()):
            expected = model._module(IDS).logits
        torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-4)
        return
    with torch.no_grad(), at_call(model._module, path, at[1], scaled, given):
        expected = model._module(IDS).logits
    assert torch.equal(written, expected)
    assert not torch.allclose(written, model._module(IDS).logits, atol=1e-3)


def scaled(x):
    """A multiple per channel, which no norm undoes."""
    flat = x.flatten(2)
    return (flat * torch.linspace(0.5, 1.5, flat.shape[-1])).view_as(x)


def _to_mid():
    """The write to what attention returns that scales the stream after it."""
    return lambda made, entered: scaled(made) + scaled(entered) - entered


def test_gradients_of_every_pass(model):
    def metric(logits):
        return logits[:, -1].logsumexp(-1)

    found = model.gradients(IDS[:1].tolist(), metric, "layers_output")["layers_output"]
    kept = []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    handles = [layer.register_forward_hook(keep) for layer in model._module.model.layers]
    metric(model._module(IDS[:1]).logits).sum().backward()
    for handle in handles:
        handle.remove()
    model._module.zero_grad()
    assert len(kept) == model.num_layers
    for index, stream in enumerate(kept):
        torch.testing.assert_close(found[index], stream.grad, rtol=1e-4, atol=1e-5)


def test_values_are_collected_in_the_order_of_all_runs(model, plain, tmp_path):
    prompts = IDS.tolist()
    whole = model.collect(prompts, ["layers_output", "mlp_contributions"], positions=-1)
    one = model.collect(prompts, "layers_output[2, 1]", positions=-1)
    stored = model.collect(prompts, ["layers_output", "mlp_contributions"], positions=-1, to=tmp_path / "all")
    assert list(whole["layers_output"].shape) == [8, 2, model.hidden_size]
    for layer, turn in every_run(model):
        index = model.unrolled(layer, turn)
        expected = plain.calls[f"model.layers.{layer}"][turn][1][:, -1]
        torch.testing.assert_close(whole["layers_output", index], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stored["layers_output", index][:], whole["layers_output", index])
    torch.testing.assert_close(one["layers_output", 4], whole["layers_output", 4])
    with pytest.raises(IndexError, match="layer 2 runs 3 times"):
        model.collect(prompts, "layers_output[2, 3]")


@pytest.mark.parametrize("turn", [None, 0, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_steering_at_one_pass_or_all_in_a_generation(model, turn, cached):
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached, "min_new_tokens": 4}
    module = model._module
    with torch.no_grad(), model.generate(IDS[:1], **options) as tracer:
        model.steer(layers=model.unrolled(1, turn), steering_vector=vector)
        found = tracer.result.save()
    calls = iter(range(10_000))

    def add(_, args, output):
        return output + vector if turn is None or next(calls) % TIMES == turn else output

    handle = module.model.layers[1].register_forward_hook(add)
    with torch.no_grad():
        expected = module.generate(IDS[:1], **options)
    handle.remove()
    with torch.no_grad():
        unsteered = module.generate(IDS[:1], **options)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, unsteered)


def test_every_step_of_a_generation_has_its_passes(model):
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": True, "min_new_tokens": 3}
    with torch.no_grad(), model.generate(IDS[:1], **options) as tracer:
        looped = nnsight_list()
        for _ in tracer.iter[:3]:
            looped.append((model.layers_output[1, 0][:, -1].clone(), model.layers_output[2, 2][:, -1].clone()))
    hooked = {1: [], 2: []}
    handles = [
        model._module.model.layers[i].register_forward_hook(lambda m, a, o, i=i: hooked[i].append(o[:, -1]))
        for i in hooked
    ]
    with torch.no_grad():
        model._module.generate(IDS[:1], **options)
    for handle in handles:
        handle.remove()
    for step, (first, second) in enumerate(looped):
        assert torch.equal(first, hooked[1][step * TIMES])
        assert torch.equal(second, hooked[2][step * TIMES + 2])


def nnsight_list():
    import nnsight

    return nnsight.save([])


@pytest.mark.parametrize("at", [(1, 0), (2, 2), (0, 0)])
def test_a_skipped_pass_is_that_of_a_hook(model, at):
    with torch.no_grad(), model.trace(IDS):
        model.skip_layer(model.unrolled(*at))
        found = model.logits.save()
    with torch.no_grad(), at_call(model._module, f"model.layers.{at[0]}", at[1], lambda made, entered: entered):
        expected = model._module(IDS).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        ((4, 0), IndexError, "the model has 4 layer modules, so layers go from -4 to 3"),
        ((1, 3), IndexError, "layer 1 runs 3 times, so passes go from -3 to 2"),
        ((0, 1), IndexError, "layer 0 runs 1 times"),
        ((1, 0.5), TypeError, "a pass is an integer"),
        ((True, 0), TypeError, "a layer is an integer"),
        (8, IndexError, "the model has 8 layers"),
        ("layers", TypeError, "a layer is an integer"),
    ],
)
def test_bad_indices_say_what_there_is(model, at, error, words):
    with pytest.raises(error, match=words), torch.no_grad(), model.trace(IDS):
        model.layers_output[at].save()
    if isinstance(at, tuple):
        with pytest.raises(error, match=words):
            model.unrolled(*at)


def test_an_earlier_pass_is_past(model):
    with pytest.raises(OutOfOrderError, match=r"layers_output\[1, 0\]"), torch.no_grad(), model.trace(IDS):
        model.layers_output[1, 1] = model.layers_output[1, 1] * 2
        model.layers_output[1, 0].save()


def test_several_prompts_in_invokes(model):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            model.layers_output[1, 1] = model.layers_output[1, 1] * 0
            first = model.logits.save()
        with tracer.invoke(IDS[1:]):
            second = model.layers_output[1, 1].save()
            untouched = model.logits.save()
    with torch.no_grad(), at_call(model._module, "model.layers.1", 1, lambda x: x * 0):
        torch.testing.assert_close(first, model._module(IDS[:1]).logits, rtol=1e-4, atol=1e-4)
    plain_second = seen(model._module, lambda: model._module(IDS[1:]))
    torch.testing.assert_close(second, plain_second.calls["model.layers.1"][1][1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(untouched, plain_second.result.logits, rtol=1e-4, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_a_pass_begins_with_must_be_made_of_what_was_there():
    module = looped_module()
    module.model.mix = lambda x, begun: (x * begun).relu()
    with pytest.raises(CertificateError, match=r"between model\.layers\.0 and model\.layers\.1"):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("wrong", ["first", "next", "unpinned"])
def test_a_wrong_pass_is_caught(model, monkeypatch, wrong):
    """Mutations of the one place at which a run is chosen: the certificate fails, and says which values differ."""
    if wrong == "unpinned":
        monkeypatch.setattr(_runs.Waiting, "__enter__", lambda self: setattr(self, "worker", _Quiet()))
    else:
        begin = _runs.Waiting.__init__

        def init(self, trial, turn, turns):
            begin(self, trial, 0 if wrong == "first" else (turn + 1) % turns, turns)

        monkeypatch.setattr(_runs.Waiting, "__init__", init)
    certificate, _ = certify(model)
    assert not certificate.ok
    assert certificate.failures[0].name == PASSES


class _Quiet:
    wanted = None


def test_a_skipped_pass_in_the_anatomy_is_caught(monkeypatch, model):
    from nnterp.anatomy import Anatomy
    from nnterp.certificate import _loops

    whole = _loops.dataclasses.replace
    monkeypatch.setattr(
        _loops.dataclasses,
        "replace",
        lambda obj, **new: (
            whole(obj, **{**new, "blocks": new["blocks"][:-1]})
            if isinstance(obj, Anatomy) and "blocks" in new
            else whole(obj, **new)
        ),
    )
    certificate, _ = certify(model)
    assert not certificate.ok


def test_what_holds_still_or_adds_up_over_layers_is_refused(model):
    with pytest.raises(Unavailable, match="runs its layers several times"):
        model.gradients(IDS[:1].tolist(), lambda logits: logits[:, -1, 3], "layers_output", frozen="norms")


def test_a_direct_call_under_a_steering_is_refused(model):
    with model.steering(layers=[1], steering_vector=torch.ones(model.hidden_size)):
        with torch.no_grad(), model.trace(IDS):
            steered = model.layers_output[1, 0].save()
        with pytest.raises(Unavailable, match="runs its layers several times"), torch.no_grad():
            model._module(IDS)
    assert steered.shape[-1] == model.hidden_size


# -- the types that transformers has -----------------------------------------------------------------------------------


# type → how often each layer module runs, which layers read something else than what the one before wrote, and what
TYPES = {
    "dory": ((1, 1, 3, 3, 1, 1), (2, 4, 6), "model.norm + model.norm"),
    "inkling2_loop_text": ((1, 1, 3, 3, 1, 1), (4, 6), "layer 1"),
    "hrm_text": ((6, 6, 2, 2), (2, 4, 6, 8, 10, 12, 14), "model.L_module.final_norm + model.H_module.final_norm"),
}


def test_every_looped_type_is_listed():
    assert {*TYPES, "inkling2_loop"} == LOOPED  # which is inkling2_loop_text with images


@pytest.mark.parametrize("model_type", TYPES)
def test_looped_types_of_transformers(model_type, tiny):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{model_type} came with transformers 5.24")
    model, (passes, seams, read) = tiny(model_type), TYPES[model_type]
    assert (model.passes, model.anatomy.seams) == (passes, seams)
    assert model.certificate[PASSES].status == model.certificate[CONSECUTIVE].status == "passed"
    assert read in model.certificate[CONSECUTIVE].detail
    assert model.padding_is_exact
    module, found = model._module, []
    with torch.no_grad():
        plain = seen(module, lambda: module(IDS))
    with torch.no_grad(), model.trace(IDS):
        for index in range(model.num_layers):
            found.append(model.layers_output[index].clone().save())
    paths = [model.anatomy.blocks[runs[0]].path for runs in model.anatomy.runs]
    for layer, path in enumerate(paths):
        assert len(plain.calls[path]) == passes[layer]
        for turn in range(passes[layer]):
            assert torch.equal(found[model.unrolled(layer, turn)], plain.calls[path][turn][1])
            with torch.no_grad(), model.trace(IDS):
                model.mlps_output[layer, turn] = scaled(model.mlps_output[layer, turn])
                written = model.logits.save()
            with torch.no_grad(), at_call(module, f"{path}.mlp", turn, scaled):
                assert torch.equal(written, module(IDS).logits)


def test_gradients_through_passes_without_gradients_are_refused(tiny):
    """HRM runs its early cycles under torch.no_grad: what autograd gives is not the derivative."""
    model = tiny("hrm_text")
    with pytest.raises(Unavailable, match=r"runs model\.L_module\.layers\.0 under torch\.no_grad"):
        model.gradients(IDS[:1].tolist(), lambda logits: logits[:, -1, 3], "layers_output")


@pytest.mark.parametrize("before", ["layers_input", "attention_values"])
@pytest.mark.parametrize("turn", range(TIMES))
def test_what_is_inside_an_operation_is_that_of_its_pass(before, turn):
    """nnsight looks into a forward, and into what it calls, when they are first read: here in a later pass."""
    fresh = StandardizedTransformer(looped_module(), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    with torch.no_grad(), fresh.trace(IDS):
        getattr(fresh, before)[1, turn].save()
        found = fresh.attention_probabilities[1, turn].save()
        heads = fresh.attention_head_outputs[1, turn].save()
    with torch.no_grad():
        patterns = fresh._module(IDS, output_attentions=True, use_cache=False).attentions
    torch.testing.assert_close(found, patterns[fresh.unrolled(1, turn)])
    values = fresh.collect(IDS, "attention_values", layers=fresh.unrolled(1, turn))["attention_values"][0]
    values = values.repeat_interleave(found.shape[1] // values.shape[2], 2)
    torch.testing.assert_close(heads, torch.einsum("bhqk,bkhd->bqhd", found, values), rtol=1e-4, atol=1e-5)
