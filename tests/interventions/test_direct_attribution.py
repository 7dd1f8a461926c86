"""Direct logit attribution: the parts add up to the logits of plain HuggingFace, and each is what hooks compute."""

import pytest
import torch
from torch import nn

from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError, RemoteModelError, Unavailable
from nnterp.interventions import DirectAttribution, Result, direct_logit_attribution
from nnterp.interventions._attribution import check_sum, head_shares, terms_of
from nnterp.positions import last_of
from nnterp.testing import tiny_model, tiny_tokenizer

from .hooked import ATTENTION_ENDS, FEED_FORWARD_ENDS
from .reference import eager, stream

PROMPTS = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15], [33, 70, 91, 140, 12]]
CORRECT, WRONG = [5, 7, 9], [8, 3, [2, 4]]
MIXERS = {"falcon_h1", "jamba", "bamba", "mamba", "mamba2", "lfm2"}  # beside attention, or in its place
EXPERTS = {"mixtral", "granitemoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"}
NO_HEADS = {"mamba", "mamba2"}
WHOLE = """
gpt2 llama gemma gemma2 gemma3_text mistral mixtral qwen2 qwen3 qwen3_moe phi phi3 gpt_neox gptj gpt_neo opt bloom
falcon mpt codegen cohere cohere2 granite granitemoe olmo olmo2 stablelm starcoder2 glm4 nemotron xglm gpt_bigcode
smollm3 biogpt gpt_oss falcon_h1 jamba bamba mamba lfm2
""".split()
FEW = ["gpt2", "llama", "gemma2"]  # biases and LayerNorm; grouped queries; post-norms, multipliers and softcaps


@torch.no_grad()
def plain_logits(model, prompt, position=-1):
    """HuggingFace's own logits of one prompt alone, before a softcap."""
    logits = model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, position].double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.atanh(logits / cap)


def difference(logits, i):
    return logits[CORRECT[i]] - logits[WRONG[i]].mean()


def total(found):
    """The sum of all that was found, `[prompts]`."""
    return found["scores"].double().nansum(1) + (found["bias"].double() if "bias" in found.tensors else 0)


# -- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WHOLE)
def test_the_parts_add_up_to_the_logits_of_huggingface(kind):
    model = eager(kind)
    ways = ["layer", "sublayer"]
    ways += ["head"] if kind not in NO_HEADS else []
    ways += ["neuron"] if kind not in EXPERTS | NO_HEADS else []
    ways += ["position"] if kind not in MIXERS else []
    logits = [plain_logits(model, prompt) for prompt in PROMPTS]
    for by in ways:
        found = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), by)
        assert isinstance(found, DirectAttribution)
        for i, own in enumerate(logits):
            tolerance = 1e-4 * max(1.0, float(own.abs().max()))
            assert abs(total(found)[i] - difference(own, i)) <= tolerance, (by, i)
            assert abs(found["logits"][i] - difference(own, i)) <= tolerance, (by, i)
        moved = found["scores"].nan_to_num().abs().max(0).values
        assert (moved > 1e-4).sum() >= min(4, len(moved)), "almost nothing has a score"


@pytest.mark.parametrize("kind", ["mixtral", "falcon_h1", "mamba"])
def test_what_cannot_be_split_is_refused_by_name(kind):
    model = eager(kind)
    by, why = {"mixtral": ("neuron", "mixture"), "falcon_h1": ("position", "mixers of layers 0")}.get(
        kind, ("head", "no layer of MambaForCausalLM has an attention")
    )
    with pytest.raises(Unavailable, match=why):
        direct_logit_attribution(model, PROMPTS, 5, by)


@pytest.mark.parametrize("kind", ["openai-gpt", "xlnet"])
def test_a_stream_that_is_no_sum_is_refused(kind):
    model = StandardizedTransformer(tiny_model(kind), tokenizer=tiny_tokenizer())
    with pytest.raises(Unavailable, match="normalises the stream between its parts"):
        direct_logit_attribution(model, PROMPTS, 5)


# -- each part, with plain hooks ------------------------------------------------------------------------------------


class ByHand:
    """One prompt through the HuggingFace module, everything that is attributed kept by torch hooks."""

    def __init__(self, model, prompt):
        self.model, self.module = model, model._module
        self.kept, handles = {}, []
        for name, inner in self.module.named_modules():
            handles.append(inner.register_forward_hook(lambda m, a, o, name=name: self.keep(name, a, o)))
        with torch.no_grad():
            self.module(input_ids=torch.tensor([prompt]), use_cache=False, output_attentions=True)
        for handle in handles:
            handle.remove()
        self.layers = [path for path in self.kept if path.split(".")[-1].isdigit() and path.count(".") == 2]
        self.root = self.module.transformer if hasattr(self.module, "transformer") else self.module.model
        self.final = self.root.ln_f if hasattr(self.root, "ln_f") else self.root.norm

    def keep(self, name, args, output):
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        made = stream(output)
        self.kept[name] = (
            None if given is None or not given.is_floating_point() else given[0].double(),
            made[0].double() if isinstance(made, torch.Tensor) else None,
            output,
        )

    def direction(self, i):
        """The gradient of the logit difference by the last stream, the final norm written out with its scale fixed."""
        head = self.module.lm_head.weight.detach().double()
        rows = head[CORRECT[i]] - head[WRONG[i]].reshape(-1, head.shape[1]).mean(0)
        x = self.kept[self.layers[-1]][1][-1]
        return self.through_norm(self.final, x, rows)

    @staticmethod
    def through_norm(norm, x, direction):
        """The transposed map of a norm at `x`, its scale fixed."""
        if isinstance(norm, nn.LayerNorm):
            scaled = direction * norm.weight.detach().double() / (x.var(unbiased=False) + norm.eps).sqrt()
            return scaled - scaled.mean()
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = norm.weight.detach().double() + ("Gemma" in type(norm).__name__)
        return direction * weight / (x.square().mean() + eps).sqrt()

    def down(self, layer):
        path = [
            p for p in self.kept if p.startswith(f"{self.layers[layer]}.mlp") and p.split(".")[-1] in FEED_FORWARD_ENDS
        ]
        return path[0]

    def out(self, layer):
        path = [
            p
            for p in self.kept
            if p.startswith(f"{self.layers[layer]}.") and ".mlp" not in p and p.split(".")[-1] in ATTENTION_ENDS
        ]
        return path[0]

    def pulled(self, layer, part, direction):
        """The direction at what the last projection of a part returns, a post-norm's scale fixed."""
        names = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
        if self.model.config.model_type != "gemma2":
            return direction
        norm = self.module.get_submodule(f"{self.layers[layer]}.{names[part]}")
        path = self.out(layer) if part == "attention" else self.down(layer)
        return self.through_norm(norm, self.kept[path][1][-1], direction)

    def weight(self, path):
        """`[out, in]`."""
        module = self.module.get_submodule(path)
        return module.weight.detach().double() if isinstance(module, nn.Linear) else module.weight.detach().double().T


@pytest.mark.parametrize("kind", FEW)
def test_every_part_is_what_plain_hooks_compute(kind):
    model = eager(kind)
    count, width = model.num_heads, model.head_dim
    by_head = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), "head")
    by_neuron = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), "neuron")
    by_position = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), "position")
    by_token = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), "token")
    by_layer = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), "layer")
    for i, prompt in enumerate(PROMPTS):
        run = ByHand(model, prompt)
        direction = run.direction(i)
        entering = run.kept[run.layers[0]][0][-1]
        named = dict(zip(by_head.labels["parts"], by_head["scores"][i].double(), strict=True))
        layers = dict(zip(by_layer.labels["parts"], by_layer["scores"][i].double(), strict=True))
        neurons = dict(zip(by_neuron.labels["parts"], by_neuron["scores"][i].double(), strict=True))
        assert named["embeddings"] == pytest.approx(float(entering @ direction), abs=1e-4)
        positions = torch.zeros(len(prompt), dtype=torch.float64)
        positions[-1] += float(entering @ direction)
        for layer in range(model.num_layers):
            given, made = run.kept[run.layers[layer]][:2]
            assert layers[f"L{layer}"] == pytest.approx(float((made - given)[-1] @ direction), abs=1e-4)
            along = run.pulled(layer, "attention", direction)
            path = run.out(layer)
            z, weight = run.kept[path][0], run.weight(path)
            for head in range(count):
                own = slice(head * width, (head + 1) * width)
                expected = float(along @ (weight[:, own] @ z[-1, own]))
                assert named[f"L{layer}.H{head}"] == pytest.approx(expected, abs=1e-4), (layer, head)
            bias = getattr(run.module.get_submodule(path), "bias", None)
            assert (f"L{layer} attention bias" in named) == (bias is not None)
            if bias is not None:
                expected = float(along @ bias.detach().double())
                assert named[f"L{layer} attention bias"] == pytest.approx(expected, abs=1e-4)
                positions[-1] += expected
            by_source = by_position["heads"][i, layer, :, : len(prompt)].double()
            pattern = _pattern(run, layer)
            values = _values(run, layer, count, width)
            for head in range(count):
                own = slice(head * width, (head + 1) * width)
                expected = pattern[head, -1] * (values[:, head] @ (weight[:, own].T @ along))
                torch.testing.assert_close(by_source[head], expected, atol=1e-4, rtol=1e-4)
                positions += expected
            along = run.pulled(layer, "mlp", direction)
            path = run.down(layer)
            expected = run.kept[path][0][-1] * (run.weight(path).T @ along)
            found = torch.stack([neurons[f"L{layer}.N{n}"] for n in range(len(expected))])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert named[f"L{layer} mlp"] == pytest.approx(float(run.kept[path][1][-1] @ along), abs=1e-4)
            positions[-1] += float(run.kept[path][1][-1] @ along)
        biased = isinstance(run.final, nn.LayerNorm)
        head = run.module.lm_head.weight.detach().double()
        rows = head[CORRECT[i]] - head[WRONG[i]].reshape(-1, head.shape[1]).mean(0)
        expected = float(run.final.bias.detach().double() @ rows) if biased else 0.0
        assert named["bias"] == pytest.approx(expected, abs=1e-4)
        torch.testing.assert_close(by_position["scores"][i, : len(prompt)].double(), positions, atol=2e-4, rtol=1e-4)
        assert by_position["scores"][i, len(prompt) :].isnan().all()
        for k, token in enumerate(by_token["source_ids"][i].tolist()):
            if token >= 0:
                at = [j for j, own in enumerate(prompt) if own == token]
                assert float(by_token["scores"][i, k]) == pytest.approx(float(positions[at].sum()), abs=2e-4)


def _pattern(run, layer):
    """Attention probabilities `[heads, query, key]`, as the attention module returns them."""
    (path,) = [p for p in run.kept if p in (f"{run.layers[layer]}.attn", f"{run.layers[layer]}.self_attn")]
    return run.kept[path][2][1][0].double()


def _values(run, layer, heads, width):
    """Values `[key, heads, head_dim]`, those of grouped queries repeated."""
    fused = f"{run.layers[layer]}.attn.c_attn"
    made = run.kept[fused][1][:, -heads * width :] if fused in run.kept else None
    made = run.kept[f"{run.layers[layer]}.self_attn.v_proj"][1] if made is None else made
    return made.unflatten(-1, (-1, width)).repeat_interleave(heads * width // made.shape[-1], 1)


def test_equal_tokens_are_added_up():
    model = eager("llama")
    prompt = [11, 42, 11, 93, 42, 11]
    by_position = direct_logit_attribution(model, [prompt], 5, "position")["scores"][0]
    by_token = direct_logit_attribution(model, [prompt], 5, "token")
    assert by_token["source_ids"][0].tolist() == [11, 42, 93]
    expected = torch.stack([by_position[[0, 2, 5]].sum(), by_position[[1, 4]].sum(), by_position[3]])
    torch.testing.assert_close(by_token["scores"][0], expected)


# -- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "olmo2", "granite", "bloom"])
def test_shares_of_heads_add_up_to_the_contribution_and_are_linear_in_a_head(kind):
    model, layer = eager(kind), 1
    with torch.no_grad(), model.trace(torch.tensor([PROMPTS[0]])):
        z = model.attention_head_outputs[layer].clone().save()
        whole = model.attention_contributions[layer].clone().save()
    shares, rest = head_shares(model, layer, z, whole)
    assert shares.shape == (1, 6, model.num_heads, model.hidden_size)
    torch.testing.assert_close(shares.sum(2) + rest, whole, atol=1e-5, rtol=1e-4)
    if kind in ("gpt2", "llama", "granite", "bloom"):  # no norm: zeroing a head takes away its share
        z0 = z.clone()
        z0[:, :, 2] = 0
        with torch.no_grad(), model.trace(torch.tensor([PROMPTS[0]])):
            model.attention_head_outputs[layer] = z0
            without = model.attention_contributions[layer].clone().save()
        torch.testing.assert_close(whole - without, shares[:, :, 2], atol=1e-5, rtol=1e-4)
    with pytest.raises(Unavailable, match="do not add up to it"):
        head_shares(model, layer, z, whole + 0.1 * whole.roll(1, -1))


def test_terms_that_do_not_add_up_are_refused():
    model = eager("llama")
    terms = terms_of(model)
    assert [term.label for term in terms[:3]] == ["embeddings", "L0 attention", "L0 mlp"]
    some = [torch.ones(1, 8), torch.ones(1, 8)]
    check_sum(model, some, torch.full((1, 8), 2.0), "this")
    with pytest.raises(Unavailable, match="does not add up to the stream"):
        check_sum(model, some, torch.full((1, 8), 2.01), "this")


# -- arguments ------------------------------------------------------------------------------------------------------


def test_targets_of_every_kind():
    model = eager("gpt2")
    logits = [plain_logits(model, prompt) for prompt in PROMPTS]
    ways = {
        "one": (5, [own[5] for own in logits]),
        "each": ([5, [7, 8], 9], [logits[0][5], logits[1][[7, 8]].mean(), logits[2][9]]),
        "pair": ((5, 8), [own[5] - own[8] for own in logits]),
        "pairs": (
            [(5, 8), ([7, 3], 2), (1, 4)],
            [d[a].mean() - d[b] for d, a, b in zip(logits, [[5], [7, 3], [1]], [8, 2, 4], strict=True)],
        ),
    }
    for name, (targets, expected) in ways.items():
        found = direct_logit_attribution(model, PROMPTS, targets)
        torch.testing.assert_close(found["logits"].double(), torch.stack(expected), atol=1e-4, rtol=1e-4, msg=name)
        assert ("wrong_ids" in found.tensors) == ("pair" in name)
    for wrong, message in (
        ((1, 2, 3), "a tuple is a pair"),
        ([(1, 2), 3, 4], "pairs .* for some prompts"),
        ([1, 2], "2 entries for 3 prompts"),
        ("two words here", "not one"),
    ):
        with pytest.raises(ValueError, match=message):
            direct_logit_attribution(model, PROMPTS, wrong)


def test_positions_batches_and_lengths():
    model = eager("gemma2")
    text = "The capital of France is big"
    found = direct_logit_attribution(model, PROMPTS, 5, "head", position=[2, -2, 0], batch_size=2)
    one = [
        direct_logit_attribution(model, p, 5, "head", position=at)
        for p, at in zip([[p] for p in PROMPTS], [2, -2, 0], strict=True)
    ]
    torch.testing.assert_close(found["scores"], torch.cat([f["scores"] for f in one]), atol=1e-5, rtol=1e-4)
    for prompt, at, logit in zip(PROMPTS, [2, -2, 0], found["logits"], strict=True):
        assert float(logit) == pytest.approx(float(plain_logits(model, prompt, at)[5]), abs=1e-4)
    by_position = direct_logit_attribution(model, PROMPTS, 5, "position", position=[2, -2, 0])
    torch.testing.assert_close(total(by_position), found["logits"].double(), atol=1e-4, rtol=1e-4)
    assert (by_position["heads"][0, :, :, 3:6].abs() <= 1e-6).all(), "nothing is taken from later positions"
    named = direct_logit_attribution(model, text, 5, position=last_of("France"))
    row = model.tokenizer(text).input_ids
    (place,) = [i for i, (start, end) in enumerate(_spans(model, text)) if start < text.index("France") + 6 <= end]
    assert float(named["logits"][0]) == pytest.approx(float(plain_logits(model, row, place)[5]), abs=1e-4)
    with pytest.raises(ValueError, match="is 6 tokens of prompt 0"):
        direct_logit_attribution(model, PROMPTS, 5, position=slice(None))
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        direct_logit_attribution(model, PROMPTS, 5, position=[0, 1])


def _spans(model, text):
    return model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]


def test_what_is_refused():
    model = eager("llama")
    with pytest.raises(ValueError, match="by is one of"):
        direct_logit_attribution(model, PROMPTS, 5, "heads")
    with pytest.raises(RemoteModelError, match="Load the weights here"):
        direct_logit_attribution(model, PROMPTS, 5, remote=True)
    with pytest.raises(ValueError, match="outside of"), model.steering({1: torch.ones(model.hidden_size)}):
        direct_logit_attribution(model, PROMPTS, 5)
    with pytest.raises(InsideTraceError), model.trace(torch.tensor([PROMPTS[0]])):
        direct_logit_attribution(model, PROMPTS, 5)
    fused = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(Unavailable, match="enable_attention_probs=True"):
        direct_logit_attribution(fused, PROMPTS, 5, "position")


def test_under_inference_mode_and_other_dtypes():
    model = eager("gemma2")
    plain = direct_logit_attribution(model, PROMPTS, 5, "head")
    with torch.inference_mode():
        again = direct_logit_attribution(model, PROMPTS, 5, "head")
    assert torch.equal(plain["scores"], again["scores"])
    low = StandardizedTransformer(tiny_model("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    high = direct_logit_attribution(eager("llama"), PROMPTS, 5, "head")
    found = direct_logit_attribution(low, PROMPTS, 5, "head")
    assert found["scores"].dtype == torch.float32
    torch.testing.assert_close(found["scores"], high["scores"], atol=0.1, rtol=0.1)


# -- the result -----------------------------------------------------------------------------------------------------


def test_the_grid_the_residue_and_the_file(tmp_path):
    model = eager("gemma2")
    found = direct_logit_attribution(model, PROMPTS, (CORRECT, WRONG), "head")
    assert "residue at most" in repr(found)
    assert found.about["softcap"] == model.config.final_logit_softcapping
    torch.testing.assert_close(found["residue"], found["logits"] - found["scores"].sum(1), atol=1e-6, rtol=0)
    grid = found.grid()
    assert grid.shape == (3, model.num_layers, model.num_heads)
    assert grid[1, 2, 3] == found["scores"][1, found.labels["parts"].index("L2.H3")]
    assert found.top(1)[0]["scores"] == pytest.approx(float(found["scores"].flatten()[found["scores"].abs().argmax()]))
    table = found.to_dataframe()
    assert {"prompt", "part", "scores", "logits"} <= set(table.columns)
    found.save(tmp_path / "kept")
    again = Result.load(tmp_path / "kept")
    assert isinstance(again, DirectAttribution)
    assert torch.equal(again.grid(), grid)
    by_sublayer = direct_logit_attribution(model, PROMPTS, 5, "sublayer")
    assert by_sublayer.columns() == ("attention", "mlp")
    assert by_sublayer.grid()[0, 1, 1] == by_sublayer["scores"][0, by_sublayer.labels["parts"].index("L1 mlp")]
    with pytest.raises(ValueError, match="a grid is made of"):
        direct_logit_attribution(model, PROMPTS, 5, "layer").grid()


@pytest.mark.parametrize("by", ["head", "token"])
def test_what_was_computed_is_kept(by, monkeypatch):
    model = eager("llama")
    whole = direct_logit_attribution(model, PROMPTS, 5, by)
    from nnterp.interventions._attribution import _direct

    read, calls = _direct.read_batch, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(_direct, "read_batch", failing)
    with pytest.raises(KeyboardInterrupt) as error:
        direct_logit_attribution(model, PROMPTS, 5, by, batch_size=1)
    partial = error.value.partial
    assert partial["done"].tolist() == [True, False, False]
    assert partial["scores"][1].isnan().all()
    calls.extend([None] * 5)
    found = direct_logit_attribution(model, PROMPTS, 5, by, batch_size=1, resume=partial)
    assert len(calls) == 2 + 5 + 2, "one prompt was there already"
    torch.testing.assert_close(found["scores"], whole["scores"], equal_nan=True, atol=1e-5, rtol=1e-4)
