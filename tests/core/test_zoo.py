"""The tiny models are what they claim: complete, loud, causal, deterministic, and honest about transformers' gaps."""

import inspect
import random
import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnterp import testing
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer

TYPES, WITH_IMAGES = testing.model_types(), testing.multimodal_model_types()
ALL_TYPES = TYPES + WITH_IMAGES
VOCAB = len(tiny_tokenizer())
LENGTH, PADDING = 12, 5

# Layers it takes for a stack to be built at all.
SHALLOWEST = {
    "gemma3n_text": 4,  # the upper half shares the keys and values of the lower one
    "olmo_hybrid": 4,  # needs an attention layer, which is its fourth
    "rwkv": 2,  # its initialisation divides by the number of layers minus one
}
# The only layer of a stack of one has no position information.
FIRST_LAYER_WITHOUT_POSITIONS = {
    "mistral_large4",  # attention without rotary embeddings, at the bottom
    "flint",  # full attention without rotary embeddings, at the bottom
}

# Layers that a text alone does not reach.
IDLE_WITHOUT_IMAGES = {
    "mllama": {"model.layers": [1, 3]},  # cross-attention to image features
}
NOT_DIFFERENTIABLE = {
    "reformer": "it refuses a backward pass in eval mode",
    "rwkv": "it writes to a state in place",
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[pytest.param(t, marks=pytest.mark.xdist_group(t)) for t in ALL_TYPES])
def model_type(request):
    """Every type in turn, all tests of a type together."""
    return request.param


@pytest.fixture(scope="module")
def model(model_type):
    """The default tiny model of the type, shared: leave it as it is."""
    return tiny_model(model_type)


@pytest.fixture(scope="module")
def tokens():
    """Token ids [2, LENGTH] without special tokens."""
    return random_tokens(LENGTH)


def random_tokens(length):
    return torch.randint(8, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def changed(ids, position):
    ids = ids.clone()
    ids[:, position] = 8 + (ids[:, position] - 8 + 101) % (VOCAB - 8)
    return ids


def swapped(ids, left, right):
    ids = ids.clone()
    ids[:, [left, right]] = ids[:, [right, left]]
    return ids


def distance(a, b):
    return (a - b).abs().max().item()


def test_mapping_is_partitioned():
    unavailable = testing.unavailable_model_types()
    assert not set(TYPES) & set(unavailable)
    assert set(TYPES) | set(unavailable) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(TYPES) >= 180
    assert not set(WITH_IMAGES) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for fact in (testing.CACHE_INEXACT, testing.LEFT_PADDING_INEXACT, testing.NOT_CAUSAL, testing.NOT_RELOADABLE):
        assert set(fact) <= set(ALL_TYPES)
        assert all(fact.values())


@pytest.mark.parametrize("model_type", sorted(testing.unavailable_model_types()))
def test_unavailable_says_why(model_type):
    with pytest.raises(KeyError, match=model_type):
        tiny_model(model_type)


def test_unknown_type_says_so():
    with pytest.raises(KeyError, match="not a causal LM"):
        tiny_model("no_such_model")


def test_logits(model_type, model, tokens):
    """Finite and loud, causal, and dependent on the first token."""
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    base = logits(model, tokens)
    assert base.shape == (2, LENGTH, VOCAB)
    assert torch.isfinite(base).all()
    assert 1 < base.std() < 6.5
    assert base.var(dim=1).mean() > 0.5, "all positions have nearly the same logits"

    future = distance(logits(model, changed(tokens, -1))[:, :-1], base[:, :-1])
    assert (future > 1e-3) == (model_type in testing.NOT_CAUSAL)
    assert distance(logits(model, changed(tokens, 0))[:, -1], base[:, -1]) > 1e-2


def test_every_layer_shows(model_type, model, tokens):
    """In a stack that the logits depend on, they depend on each layer, and not by rounding errors."""
    if model_type in NOT_DIFFERENTIABLE:
        pytest.skip(NOT_DIFFERENTIABLE[model_type])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = model(input_ids=tokens).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((out * weights).sum(), list(parameters.values()), allow_unused=True)
    stacks = {}
    for name, gradient in zip(parameters, gradients, strict=True):
        if layer := re.match(r"(.*?)\.(\d+)\.", name):
            size = 0.0 if gradient is None else gradient.abs().max().item()
            sizes = stacks.setdefault(layer[1], {})
            sizes[int(layer[2])] = max(size, sizes.get(int(layer[2]), 0.0))
    used = {stack: sizes for stack, sizes in stacks.items() if max(sizes.values()) > 0}
    assert used
    idle = {stack: [i for i, size in sizes.items() if size < 0.1] for stack, sizes in used.items()}
    assert {stack: layers for stack, layers in idle.items() if layers} == IDLE_WITHOUT_IMAGES.get(model_type, {})


def test_positions(model_type, tokens):
    """In the shallowest stack the order of earlier tokens can reach the last logits through positions alone."""
    model = tiny_model(model_type, num_layers=SHALLOWEST.get(model_type, 1), use_cache=False)
    moved = distance(logits(model, swapped(tokens, 8, 9))[:, -1], logits(model, tokens)[:, -1])
    assert (moved > 1e-2) != (model_type in FIRST_LAYER_WITHOUT_POSITIONS)


def test_left_padding(model_type, model):
    """The declared facts about left padding hold in transformers, both ways."""
    batch = random_tokens(2 * LENGTH)
    alone = logits(model, batch[1:, PADDING:])
    batch[1, :PADDING] = 0
    mask = torch.ones_like(batch)
    mask[1, :PADDING] = 0

    def error(**kwargs):
        return distance(logits(model, batch, attention_mask=mask, **kwargs)[1:, PADDING:], alone)

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions else {}
    if model_type in testing.POSITION_IDS_OFFSET:
        assert error() < 1e-3 < error(**positions)
    else:
        assert (error(**positions) > 1e-3) == (model_type in testing.LEFT_PADDING_INEXACT)
        assert (error() > 1e-3) == (model_type in {*testing.LEFT_PADDING_INEXACT, *testing.POSITION_IDS_NEEDED})


def test_cache(model_type, model):
    """The declared facts about continuing from a cache hold in transformers, both ways."""
    row = random_tokens(LENGTH + 3)
    whole = logits(model, row)
    with torch.no_grad():
        try:
            out = model(input_ids=row[:, :LENGTH], use_cache=True)
            name = next(
                (name for name in ("cache", "past_key_values", "cache_params", "state") if out.get(name) is not None),
                None,
            )
            assert (name is None) == (model_type in testing.NO_CACHE)
            errors = []
            for i in range(LENGTH, LENGTH + 3) if name else ():
                out = model(input_ids=row[:, i : i + 1], use_cache=True, **{name: out[name]})
                errors.append(distance(out.logits[:, -1], whole[:, i]))
        except (AttributeError, RuntimeError):
            assert model_type in {"blt", "cpmant"}
            return
    assert (max(errors, default=0.0) > 1e-3) == (model_type in testing.CACHE_INEXACT)


def test_seeded(model_type, model):
    """Bitwise the same for a seed, different for another, and no trace in the global random states."""
    torch.manual_seed(456)
    random.seed(456)
    states = torch.get_rng_state(), random.getstate()
    again = tiny_model(model_type, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    first = model.state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = tiny_model(model_type, seed=1).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_layer_kinds_are_kept(model_type, model):
    """Every kind of layer that the default configuration names is in the tiny one."""
    config = model.config.get_text_config(decoder=True)
    full = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types", "layers_block_type"):
        kinds, tiny = getattr(full, name, None), getattr(config, name, None)
        if kinds:
            assert set(kinds) <= set(tiny), name


def test_checkpoint_round_trip(model_type, model, tokens, tmp_path):
    if model_type in testing.NOT_RELOADABLE:
        with pytest.raises(ValueError, match="No checkpoint"):
            tiny_checkpoint(model_type, tmp_path)
        model.save_pretrained(tmp_path)
        if model_type not in TYPES:
            _, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
            assert info["missing_keys"]
            return
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    folder = tiny_checkpoint(model_type, tmp_path / "checkpoint")
    auto = AutoModelForImageTextToText if model_type in WITH_IMAGES else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(loaded) is type(model)
    assert distance(logits(loaded.eval(), tokens), logits(model, tokens)) < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The capital of France is Paris"
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "mixtral", "gpt_neo", "jamba", "llava", "bart"])
@pytest.mark.parametrize("num_layers", [2, 7])
def test_num_layers(model_type, num_layers, tokens):
    model = tiny_model(model_type, num_layers=num_layers)
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers]
    assert stacks
    assert torch.isfinite(logits(model, tokens)).all()


def test_overrides_reach_the_text_part():
    model = tiny_model("llava", rms_norm_eps=0.25, image_token_id=9)
    assert model.config.text_config.rms_norm_eps == 0.25
    assert model.config.image_token_id == 9
    vision = tiny_model("llava", vision_config={"hidden_size": 32}, text_config={"num_attention_heads": 2}).config
    assert (vision.vision_config.hidden_size, vision.vision_config.num_hidden_layers) == (32, 3)
    assert (vision.text_config.num_attention_heads, vision.text_config.hidden_size) == (2, 64)
    assert tiny_model("gpt2", hidden_size=32).config.n_embd == 32
    assert tiny_model("llava", attn_implementation="eager").config.vision_config._attn_implementation == "eager"
    assert tiny_model("llama", attn_implementation="eager").config._attn_implementation == "eager"
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert tiny_model("gemma2", layer_types=layer_types).config.layer_types == layer_types


@pytest.mark.parametrize(
    ("model_type", "field", "neutral"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "query_pre_attn_scalar", 24),
        ("cohere", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
        ("granite", "embedding_multiplier", 1.0),
        ("granite", "residual_multiplier", 1.0),
        ("granite", "attention_multiplier", 24**-0.5),
        ("mistral", "sliding_window", None),
        ("falcon_h1", "key_multiplier", 1.0),
        ("falcon_h1", "lm_head_multiplier", 1.0),
        ("minicpm3", "dim_model_base", 64),
        ("gpt_neox", "use_parallel_residual", False),
    ],
)
def test_features_show_in_the_logits(model_type, field, neutral, tokens):
    """The same weights without the feature have visibly different logits."""
    loud, plain = tiny_model(model_type), tiny_model(model_type, **{field: neutral})
    plain.load_state_dict(loud.state_dict())
    assert distance(logits(loud, tokens), logits(plain, tokens)) > 0.1


def test_dtype_and_plain_initialisation(tokens):
    half = tiny_model("llama", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm_head.weight, tiny_model("llama").lm_head.weight.bfloat16())
    assert logits(tiny_model("llama", loud=False), tokens).std() < 0.5


def test_tokenizer():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == tiny_model("gpt2").config.vocab_size == VOCAB
    text = "The Eiffel Tower is in café Ωmega, 東京 🙂\n\tdef f(x):  return x"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert min(ids) >= 8
    assert len(tokenizer("The capital of France is").input_ids) < 8
    batch = tokenizer(["a", "a longer one"], padding=True, padding_side="left")
    assert batch.input_ids[0][0] == tokenizer.pad_token_id
    assert batch.attention_mask[0][0] == 0
    tokenizer.padding_side = "left"
    assert tiny_tokenizer().padding_side == "right", "a caller's change leaked into the next tokenizer"
    assert len(tiny_tokenizer(300)) == 300
    assert len(tiny_tokenizer(1000)) == 1000
    with pytest.raises(ValueError, match="at least"):
        tiny_tokenizer(100)
