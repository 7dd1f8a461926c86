"""Frozen gradients equal those of the plain model with hand-written norms, detached softmaxes and detached gates."""

import contextlib
from functools import cache

import nnsight
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError, RemoteModelError, Unavailable
from nnterp.frozen import FROZEN, freeze, prove_frozen
from nnterp.testing import tiny_model, tiny_tokenizer

from .values_reference import arguments, ids

pytestmark = pytest.mark.filterwarnings("ignore")

GATED = ["llama", "gemma2", "gemma3_text", "mistral", "qwen3", "mixtral", "qwen3_moe", "olmo2", "cohere", "granite"]
PLAIN = ["gpt2", "gpt_neox", "opt", "falcon", "bloom", "starcoder2", "phi", "gptj", "mpt"]
NO_NORM_BIAS = ["llama", "mistral", "qwen3", "qwen3_moe", "olmo2", "mixtral"]  # and no bias elsewhere, no logit cap


def metric(logits):
    return logits[:, -1, 7].sum() - logits[:, -1, 11].sum()


@cache
def model_of(model_type):
    """The model as it is loaded by default: fused attention."""
    return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer(), check_renaming=False)


# -- the reference: HuggingFace's module, torch hooks and patched functions ------------------------------------------


def held_norm(norm, x):
    """Every norm of these models, written out with its scale as a constant."""
    name, wide = type(norm).__name__, x.float()
    centred = wide if "RMS" in name else wide - wide.mean(-1, keepdim=True)
    eps = next(getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n))
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        out = out * (1 + weight if "Gemma" in name else weight)
    return out if bias is None else out + bias


@contextlib.contextmanager
def reference(module, model_type, kinds):
    """The plain module, eager, with `kinds` held still by other means than nnterp's."""
    inside, handles, restored = [], [], []
    for part in module.modules():
        name = type(part).__name__
        if name.endswith("Attention"):
            handles.append(part.register_forward_pre_hook(lambda *_: inside.append(1)))
            handles.append(part.register_forward_hook(lambda *_: inside.pop() and None))
        if "norms" in kinds and "Norm" in name:
            restored.append(part)
            part.forward = lambda x, part=part: held_norm(part, x).to(x.dtype)
        activation = type(part).__module__ in ("transformers.activations", "torch.nn.modules.activation")
        if "gates" in kinds and (activation or name == "BloomGelu"):

            def hold(_, args, out):
                return out.detach() if model_type in GATED else args[0] * (out / args[0]).detach()

            handles.append(part.register_forward_hook(hold))
    real = torch.nn.functional.softmax, torch.nn.functional.gelu

    def softmax(*args, **kwargs):
        out = real[0](*args, **kwargs)
        return out.detach() if ("patterns" if inside else "gates") in kinds else out

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = real[0]
        for handle in handles:
            handle.remove()
        for part in restored:
            del part.forward


def reference_gradients(model_type, tokens, kinds):
    """Logits, and gradients with respect to the token embeddings and the output of the second layer."""
    module = tiny_model(model_type)
    module.config._attn_implementation_internal = "eager"
    seen = {}
    model = model_of(model_type)

    def keep(name):
        def hook(_, args, out):
            seen[name] = out if isinstance(out, torch.Tensor) else out[0]

        return hook

    module.get_submodule(model.anatomy.embed_tokens).register_forward_hook(keep("embedding"))
    module.get_submodule(model.anatomy.blocks[1].path).register_forward_hook(keep("layer"))
    with reference(module, model_type, kinds):
        logits = module(**arguments(module, tokens)).logits
        slopes = torch.autograd.grad(metric(logits), [seen["embedding"], seen["layer"]])
    return logits, slopes


@pytest.mark.parametrize("model_type", GATED + PLAIN)
def test_equal_the_plain_model_with_parts_held_still(model_type):
    model, tokens = model_of(model_type), ids()
    embeddings = {}
    handle = model._module.get_submodule(model.anatomy.embed_tokens).register_forward_hook(
        lambda _, args, out: embeddings.update(x=out)
    )
    for kinds in ((), *((kind,) for kind in FROZEN), FROZEN):
        embeddings.clear()
        logits, (embedding, layer) = reference_gradients(model_type, tokens, kinds)
        with freeze(model, kinds):
            mine = model._module(**arguments(model._module, tokens)).logits
        (slope,) = torch.autograd.grad(metric(mine), embeddings["x"])
        torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(slope, embedding, atol=2e-5, rtol=1e-3)
        got = model.gradients(tokens, metric, "layers_output", layers=1, frozen=kinds)
        torch.testing.assert_close(got["layers_output", 1], layer, atol=2e-5, rtol=1e-3)
    handle.remove()


@pytest.mark.parametrize("model_type", GATED + PLAIN)
def test_the_forward_pass_gives_the_same_numbers_bit_for_bit(model_type):
    model, tokens = model_of(model_type), ids()
    names = ["layers_output", "attentions_output"]
    plain = model.gradients(tokens, metric, names)
    for kinds in (*FROZEN, FROZEN):
        held = model.gradients(tokens, metric, names, frozen=kinds)
        assert torch.equal(held.logits, plain.logits)
        assert all(torch.equal(held.value(name), plain.value(name)) for name in names)
        if (model_type, kinds) != ("opt", "gates"):  # a ReLU is its slope times its input already
            assert not torch.allclose(held["layers_output"], plain["layers_output"], atol=1e-3)
    after = model.gradients(tokens, metric, names)  # nothing is left of it
    assert torch.equal(after["layers_output"], plain["layers_output"])


@pytest.mark.parametrize("model_type", GATED + PLAIN)
def test_no_gradient_reaches_queries_and_keys(model_type):
    model, tokens = model_of(model_type), ids()
    names = ["attention_queries", "attention_keys", "attention_values"]
    free = model.gradients(tokens, metric, names, frozen=("norms", "gates"))
    held = model.gradients(tokens, metric, names, frozen="patterns")
    for name in names[:2]:
        assert free[name].abs().max() > 1e-3
        assert torch.count_nonzero(held[name]) == 0
    assert held["attention_values"].abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4_text", "jetmoe"])
def test_no_gradient_reaches_routers(model_type):
    """JetMoe has a router inside of its attention too: its softmax is a gate and no pattern."""
    model, tokens = model_of(model_type), ids()
    named = model._module.named_parameters()
    routers = [p for n, p in named if "router" in n or n.endswith("gate.weight") if p.requires_grad]
    assert routers
    for kinds in (("patterns", "norms"), "gates"):
        with freeze(model, kinds):
            score = metric(model._module(**arguments(model._module, tokens)).logits)
        slopes = torch.autograd.grad(score, routers, allow_unused=True)
        flat = [slope is None or torch.count_nonzero(slope) == 0 for slope in slopes]
        assert all(flat) if kinds == "gates" else not any(flat)


@pytest.mark.parametrize("model_type", NO_NORM_BIAS)
def test_everything_held_still_makes_logits_a_sum_over_the_embedding(model_type):
    """Without biases the frozen model is linear: gradient times input is the metric, at every layer."""
    model, tokens = model_of(model_type), ids()
    got = model.gradients(tokens, metric, ["token_embeddings", "layers_output"], frozen=FROZEN)
    expected = got.metric.item()
    assert (got["token_embeddings"] * got.value("token_embeddings")).sum().item() == pytest.approx(expected, abs=1e-3)
    for layer in range(model.num_layers):
        share = (got["layers_output", layer] * got.value(("layers_output", layer))).sum().item()
        assert share == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "bloom", "phi", "starcoder2", "falcon"])
def test_with_biases_logits_are_a_sum_over_the_embedding_and_the_biases(model_type):
    model, tokens = model_of(model_type), ids()
    seen = []
    handle = model._module.get_submodule(model.anatomy.embed_tokens).register_forward_hook(
        lambda _, args, out: seen.append(out)
    )
    with freeze(model):
        score = metric(model._module(**arguments(model._module, tokens)).logits)
    handle.remove()
    added = [p for n, p in model._module.named_parameters() if n.endswith("bias") or "wpe" in n or "positions" in n]
    inputs = [seen[-1], *added]
    slopes = torch.autograd.grad(score, inputs, allow_unused=True)
    total = sum((slope * x).sum().item() for slope, x in zip(slopes, inputs, strict=True) if slope is not None)
    assert total == pytest.approx(score.item(), abs=2e-3)


# -- in traces -------------------------------------------------------------------------------------------------------


def test_a_block_keeps_the_gradient_of_what_it_computes_itself():
    """A softmax of the user's own, at a value inside an attention and in the metric, is not held still."""
    model, tokens = model_of("llama"), ids()
    with freeze(model), model.trace(tokens):
        stream = model.layers_output[1]
        mixed = model.attentions_output[2]
        own = torch.softmax(mixed, -1)[..., 3].sum()
        score = torch.log_softmax(model.logits, -1)[:, -1, 7].sum()
        slopes = nnsight.save(torch.autograd.grad(own + score, [mixed, stream]))
    with torch.no_grad():
        values = model.collect(tokens.tolist(), ["attentions_output"], layers=2, progress=False)
    leaf = values["attentions_output"][0].detach().requires_grad_(True)
    (expected,) = torch.autograd.grad(torch.softmax(leaf, -1)[..., 3].sum(), leaf)
    with freeze(model), model.trace(tokens):
        mixed = model.attentions_output[2]
        score = torch.log_softmax(model.logits, -1)[:, -1, 7].sum()
        rest = nnsight.save(torch.autograd.grad(score, mixed))
    torch.testing.assert_close(slopes[0] - rest[0], expected, atol=1e-5, rtol=1e-3)
    assert slopes[1].abs().max() > 0


def test_probabilities_that_are_held_still_have_a_gradient_when_asked():
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    names = ["attention_probabilities", "attention_values"]
    free = model.gradients(ids(), metric, names, layers=3)
    held = model.gradients(ids(), metric, names, layers=3, frozen="patterns")
    torch.testing.assert_close(held["attention_probabilities", 3], free["attention_probabilities", 3])
    torch.testing.assert_close(held["attention_values", 3], free["attention_values", 3])


def test_a_trace_that_stops_early_leaves_nothing_behind():
    model, tokens = model_of("gpt2"), ids()
    with freeze(model):
        with model.trace(tokens) as tracer:
            model.attentions_output[1].save()
            tracer.stop()
        x = torch.randn(4, requires_grad=True)
        assert torch.softmax(x, 0).requires_grad
        assert torch.nn.functional.layer_norm(x, (4,)).grad_fn.name().startswith("NativeLayerNorm")
    hooks = [part for part in model._module.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert hooks == []


def test_padded_prompts_and_frozen_weights():
    model, prompts = model_of("llama"), ["The capital of France is", "A cat"]
    model.validate()
    both = model.gradients(prompts, lambda x: x[:, -1, 7].sum(), "layers_output", frozen=FROZEN)
    for parameter in model._module.parameters():
        parameter.requires_grad_(False)
    try:
        alone = model.gradients(prompts[1], lambda x: x[:, -1, 7].sum(), "layers_output", frozen=FROZEN)
    finally:
        for parameter in model._module.parameters():
            parameter.requires_grad_(True)
    start = both.batch.starts[1]
    torch.testing.assert_close(both["layers_output"][:, 1, start:], alone["layers_output"][:, 0], atol=1e-4, rtol=1e-3)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_names_are_refused():
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="'softmax' cannot be held still; there are 'patterns', 'norms', 'gates'"):
        model.gradients(ids(), metric, "layers_output", frozen=("norms", "softmax"))
    for wrong in (True, 3, [1]):
        with pytest.raises(TypeError, match="frozen is some of"):
            model.gradients(ids(), metric, "layers_output", frozen=wrong)
    with pytest.raises(RemoteModelError, match=r"frozen=.* is refused"):
        model.gradients(ids(), metric, "layers_output", frozen="norms", remote=True)


@pytest.mark.parametrize(
    ("model_type", "refused", "why"),
    [
        ("jamba", ("patterns", "gates"), "state space mixer"),
        ("qwen3_next", ("patterns", "gates"), "linear attention mixer"),
        ("rwkv", ("patterns", "gates"), "recurrent mixer"),
        ("gpt_oss", ("gates",), r"model\.layers\.\*\.mlp is not linear"),
    ],
)
def test_what_cannot_be_held_still_is_refused_by_name(model_type, refused, why):
    model = model_of(model_type)
    for kind in FROZEN:
        if kind in refused:
            with pytest.raises(Unavailable, match=why):
                model.gradients(ids(), metric, "layers_output", frozen=kind)
        else:
            assert model.gradients(ids(), metric, "layers_output", frozen=kind)["layers_output"].abs().max() > 0


def test_it_is_opened_around_a_trace():
    model = model_of("gpt2")
    with pytest.raises(InsideTraceError), model.trace(ids()):  # noqa: SIM117 (the block is the trace's)
        with freeze(model, "norms"):
            model.layers_output[1].save()


class Fused(torch.autograd.Function):
    """A norm with a backward pass of its own, as fused kernels have it."""

    @staticmethod
    def forward(ctx, x):
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0]


class FusedNorm(torch.nn.Module):
    def forward(self, x):
        return Fused.apply(x)


class OddNorm(torch.nn.Module):
    """Scales by what no rule knows."""

    def forward(self, x):
        return x * torch.exp(-x.abs().mean(-1, keepdim=True))


@pytest.mark.parametrize(("norm", "operation"), [(FusedNorm, "FusedBackward"), (OddNorm, "Abs")])
def test_a_norm_that_no_rule_knows_is_refused(norm, operation):
    module = tiny_model("llama")
    module.model.layers[1].input_layernorm = norm()
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    with pytest.raises(Unavailable, match=rf"refused: model\.layers\.\*\.input_layernorm.*{operation}"):
        model.gradients(ids(), metric, "layers_output", frozen=FROZEN)
    with pytest.raises(Unavailable, match='What can be held still: "patterns", "gates"'):
        model.gradients(ids(), metric, "layers_output", frozen="norms")
    assert (
        torch.count_nonzero(model.gradients(ids(), metric, "attention_keys", frozen="patterns")["attention_keys"]) == 0
    )


def test_a_part_whose_gradient_is_cut_altogether_is_refused(monkeypatch):
    """The proof looks for too little gradient as well as for too much."""
    module = tiny_model("llama")
    plain = module.model.layers[2].mlp.down_proj.forward
    module.model.layers[2].mlp.down_proj.forward = lambda x: plain(x.detach()) + 0 * plain(x)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), check_renaming=False)
    with pytest.raises(Unavailable, match=r"refused: the output of model\.layers\.\*\.mlp is not"):
        model.gradients(ids(), metric, "layers_output", frozen="gates")


def test_the_proof_is_made_once_and_anew_for_a_changed_model():
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    proof = prove_frozen(model)
    assert proof.reasons == {}
    assert proof.error < 1e-5
    assert prove_frozen(model) is proof
    model.validate()
    assert prove_frozen(model) is not proof
    assert all(parameter.requires_grad for parameter in model._module.parameters())
