"""Contributions, the stream between sublayers, neurons and heads through W_O: identities and writes on every type."""

import pytest
import torch

from nnterp.errors import Unavailable
from nnterp.testing import model_types

from ...looped_modeling import LOOPED
from .values_reference import arguments, ids, wrapped
from .values_reference import read as read_several

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NO_RESIDUAL_STREAM = {"xlm", "reformer"}  # refused at load, with the reason
TYPES = [t for t in model_types() if t not in NO_RESIDUAL_STREAM | LOOPED]


def served(model, name, layer):
    try:
        model.place(name, layer)
    except Unavailable:
        return False
    return True


def off(actual, expected):
    """Relative error at the worst position."""
    actual, expected = actual.double(), expected.double()
    norm = expected.norm(dim=-1)
    return ((actual - expected).norm(dim=-1) / norm.clamp(min=1e-3 * norm.max())).max().item()


def read(model, name, layer, tokens):
    return read_several(model, [(name, layer)], tokens)[name, layer]


CONTRIBUTIONS = ("mixer_contributions", "mlp_contributions", "other_contributions")


def with_middle(structure, parts):
    """Whether a layer's stream between its parts is its input plus what the first adds."""
    scale = structure.stream_scale
    return structure.kind == "sequential" and len(parts) == 2 and isinstance(scale, float) and scale == 1.0


@pytest.mark.parametrize("model_type", TYPES)
def test_input_plus_contributions_is_output(model_type):
    model, tokens = wrapped(model_type, eager=False, check=True), ids()
    assert model.residual_structures
    known, names = {}, {}
    for layer, structure in enumerate(model.residual_structures):
        if structure.kind == "unknown":
            assert structure.reason
            continue
        known[layer] = structure
        names[layer] = [n for n in CONTRIBUTIONS if served(model, n, layer)]
    edges = ("layers_input", "layers_output")
    asked = [(n, i) for i, s in known.items() for n in (*edges, *names[i], *["layers_mid"] * with_middle(s, names[i]))]
    found = read_several(model, asked, tokens)
    for layer, structure in known.items():
        x, y = (found[n, layer] for n in edges)
        parts = [found[n, layer] for n in names[layer]]
        scale = (
            structure.stream_scale.double()
            if isinstance(structure.stream_scale, torch.Tensor)
            else structure.stream_scale
        )
        if structure.kind in ("sequential", "parallel", "single"):
            made = scale * x.double() + sum(p.double() for p in parts)
            assert off(made, y) < 16 * torch.finfo(y.dtype).eps, structure.kind
        if with_middle(structure, parts):
            mid = found["layers_mid", layer]
            assert off(mid, x.double() + parts[0].double()) < 1e-5
            assert off(mid.double() + parts[1].double(), y) < 1e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_written_contributions_are_what_is_added(model_type):
    """Writing a contribution makes it what was written, and nothing else about the layer changes."""
    model, tokens = wrapped(model_type, eager=False, check=True), ids()
    layers = []
    for layer in {0, model.num_layers - 1}:
        structure = model.residual_structures[layer]
        if structure.other is not None:  # further modules of the layer read what the feed-forward added
            continue
        if structure.kind not in ("sequential", "parallel", "single") or not served(model, "mlp_contributions", layer):
            continue
        layers.append(layer)
    found = read_several(model, [(n, i) for i in layers for n in ("layers_output", "mlp_contributions")], tokens)
    for layer in layers:
        plain, now = found["layers_output", layer], found["mlp_contributions", layer]
        new = now * 0.5 + 0.1
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            model.mlp_contributions[layer] = new
            changed = model.layers_output[layer].clone().save()
        expected = plain.double() + (new - now).double()
        assert off(changed, expected) < 2e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_written_mid_moves_both_paths(model_type):
    """The stream between the sublayers reaches the layer's output directly and through the feed-forward."""
    model, tokens = wrapped(model_type, eager=False, check=True), ids()
    layers = [
        i for i, s in enumerate(model.residual_structures) if s.kind == "sequential" and served(model, "layers_mid", i)
    ]
    names = ["mlp_contributions", "other_contributions"]
    for layer in {*layers[:1], *layers[-1:]}:
        step = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1))
        have = [n for n in names if served(model, n, layer)]
        carried = []
        for move in (0 * step, step):
            with torch.no_grad(), model.trace(tokens, use_cache=False):
                mid = (model.layers_mid[layer] + move).save()
                model.layers_mid[layer] = mid.clone()
                added = [getattr(model, n)[layer].clone() for n in have]
                added.save()
                after = model.layers_output[layer].clone().save()
            carried.append(after.double() - sum(a.double() for a in added))
            carried.append(added[0])
        moved = carried[2] - carried[0]
        assert (moved - moved[:1, :1]).abs().max() < 1e-3
        if model_type not in SCALED_AFTER_MID:
            assert (moved - step).abs().max() < 1e-3
        assert (carried[3] - carried[1]).abs().max() > 1e-4, "the feed-forward did not see the write"


# The residual path is multiplied again after the attention.
SCALED_AFTER_MID = {"beam", "doge", "zaya"}


@pytest.mark.parametrize("model_type", TYPES)
def test_neurons(model_type):
    """The neurons through the down projection are the feed-forward's output, and zeroing them leaves its bias."""
    model, tokens = wrapped(model_type), ids()
    if model.facts.assumed.layout:
        # Without a proof, `mlps_output` is refused where the stream has other axes.
        model = wrapped(model_type, eager=False, check=True)
    layers = [i for i, p in enumerate(model.facts.inside.neurons) if not isinstance(p, str)]
    for layer in layers[:1]:
        place = model.facts.inside.neurons[layer]
        down = model._module.get_submodule(place.path)
        found = read_several(model, [("mlp_neurons", layer), ("mlps_output", layer)], tokens)
        neurons, plain = found["mlp_neurons", layer], found["mlps_output", layer]
        with torch.no_grad():
            made = down(neurons)
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            model.mlp_neurons[layer] = torch.zeros_like(neurons)
            silent = model.mlps_output[layer].clone().save()
        with torch.no_grad():
            moved = made - down(torch.zeros_like(neurons))
        # BLOOM's feed-forward adds the residual itself: the difference is the same.
        difference = (plain - silent).reshape(moved.shape)
        if model_type in MULTIPLIED:
            moved = moved * ((moved * difference).sum() / moved.square().sum())
        if model_type in GATED:
            assert ((difference / moved)[moved.abs() > 1e-3] > 0).all()
            assert ((difference / moved)[moved.abs() > 1e-3] < 1).all()
        else:
            assert off(difference, moved) < 1e-4


MULTIPLIED = {"falcon_h1", "inkling_text", "inkling2_text"}  # the projection's output is, by one number
GATED = {"rwkv"}  # the projection's output is


def test_neurons_of_shared_experts():
    """Of the expert that all tokens pass: a plain hook's, and an edit of them is the same edit in a plain hook."""
    seen = []
    for model_type in SHARED:
        model, tokens = wrapped(model_type), ids()
        layers = model.support()["shared_expert_neurons"]
        assert layers, model_type
        place = model.place("shared_expert_neurons", layers[-1])
        assert "shared" in place.path
        module, down = model._module, model._module.get_submodule(place.path)
        kept = {}

        def halved(_, args, kept=kept):
            kept["given"] = args[0].clone()
            return (args[0] * 0.5, *args[1:])

        handle = down.register_forward_pre_hook(halved)
        with torch.no_grad():
            expected = module(**arguments(module, tokens)).logits
        handle.remove()
        mine = read(model, "shared_expert_neurons", layers[-1], tokens)
        assert off(mine.flatten(0, -2), kept["given"].flatten(0, -2)) < 1e-6
        assert mine.shape[:2] == tokens.shape
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            model.shared_expert_neurons[layers[-1]] = mine * 0.5
            written = model.logits.save()
        assert (written - expected).abs().max() < 1e-5 * expected.abs().max()
        seen.append(model_type)
    assert len(seen) == len(SHARED)


SHARED = (
    "deepseek_v3",
    "qwen2_moe",
    "llama4",
    "glm4_moe",
    "qwen3_next",
    "ernie4_5_moe",
    "dots1",
    "hunyuan_v1_moe",
    "granitemoeshared",
)


def projection(module, inside):
    """What follows the heads, as one function."""
    out = module.get_submodule(inside.out)
    if inside.before_out is None:
        return out
    path, shape = inside.before_out
    before = module.get_submodule(path)
    return lambda x: out(before(x.reshape(*x.shape[:2], *shape)).flatten(2))


@pytest.mark.parametrize("model_type", TYPES)
def test_heads_through_out_sum_to_the_output(model_type):
    model, tokens = wrapped(model_type), ids()
    layers = [i for i in model.attention_layers if served(model, "attention_head_contributions", i)]
    for layer in layers[-1:]:
        inside = model.facts.inside.attention[layer]
        out = projection(model._module, inside)
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            contributions = model.attention_head_contributions[layer].save()
            z = model.attention_head_outputs[layer].save()
        with torch.no_grad():
            expected = out(z.flatten(2))
            bias = out(torch.zeros_like(z.flatten(2)))
        assert contributions.shape == (*z.shape[:3], expected.shape[-1])
        assert off(contributions.sum(2) + bias, expected) < 1e-5
        half = contributions * 0.5
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            model.attention_head_contributions[layer] = half
            written = model.envoy(model.facts.inside.attention[layer].out).output.clone().save()
        assert off(written.reshape(expected.shape), half.sum(2) + bias) < 1e-5
