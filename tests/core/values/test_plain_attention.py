"""Attention's inside, read and written, against the torch functions that a plain HuggingFace forward calls."""

import pytest
import torch

from nnterp.eager import eagerly
from nnterp.errors import Unavailable
from nnterp.testing import NOT_CAUSAL, model_types
from nnterp.values import reads, when

from ...looped_modeling import LOOPED
from .plain_attention import PlainAttention
from .values_reference import arguments, hooked, ids, wrapped

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

REFUSED = {"xlm", "reformer"}  # nnterp does not load them
NO_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
TWO_A_LAYER = {"longcat_flash"}  # tested on its own
EINSUMS = {"xlnet", "prophetnet"}  # contracted by einsum, with terms of relative positions: see test_attention
TYPES = [t for t in model_types() if t not in REFUSED | LOOPED | NO_ATTENTION | TWO_A_LAYER | EINSUMS]

# What attention averages is changed before W_O, and z is what W_O is given.
CHANGED = {
    **dict.fromkeys(
        "afmoe axk2 bailing_hybrid beam dots3_note dots3_note_text granite_swa granitemoe_swa hy_v4 inkling2_text "
        "laguna lfm3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text".split(),
        "heads pass a gate",
    ),
    "bitnet": "a norm over all heads",
    "deepseek_v4": "the rotation of keys that are values as well is undone",
    "diffllama": "pairs of heads are subtracted",
}
LETTERS = {
    "q": "attention_queries",
    "k": "attention_keys",
    "v": "attention_values",
    "scores": "attention_scores",
    "probs": "attention_probabilities",
    "z": "attention_head_outputs",
}
LENGTH, POSITION = 13, 7


def plain(module, anatomy, tokens, **how):
    """The attentions of each layer in a plain forward, and its logits."""
    layers = [module.get_submodule(block.path) for block in anatomy.blocks]
    with torch.no_grad(), PlainAttention(layers, *tokens.shape, **how) as recorded:
        logits = module(**arguments(module, tokens)).logits
    return recorded.calls, logits


def in_order(model, names, layer):
    """Names in the order in which this model passes them."""

    def last(name):
        return max(when(model, place) for place in reads(model, model.place(name, layer))[0])

    return sorted(names, key=last)


def read(model, names, layers, tokens):
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        found = {}
        found.save()
        for layer in layers:
            for name in in_order(model, names, layer):
                found[name, layer] = getattr(model, name)[layer].clone()
    return found


def shown(letter, calls):
    """What the calls of one layer's attention were given, as nnterp shows it."""
    parts = [getattr(call, letter) for call in calls]
    if letter in ("scores", "probs"):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    parts = [part.transpose(1, 2) for part in parts]
    if letter in ("q", "k"):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts, dim=-1)  # one call, unless each averages a part of the values


def assert_equal(mine, theirs, letter):
    if letter in ("k", "v"):  # the model may hand on every key-value head several times
        assert theirs.shape[2] % mine.shape[2] == 0
        times = theirs.shape[2] // mine.shape[2]
        options = [mine.repeat_interleave(times, 2), mine.repeat(1, 1, times, 1)]
        assert any(torch.equal(option, theirs) for option in options)
    elif letter == "scores" and theirs.shape[-1] > mine.shape[-1]:
        # With a sink's as one more; and the model may have taken each row's largest from it, which no softmax sees.
        torch.testing.assert_close(mine.softmax(-1), theirs[..., :-1].softmax(-1), atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(mine, theirs[..., : mine.shape[-1]])


@pytest.mark.parametrize("model_type", TYPES)
def test_reads(model_type):
    """Exactly the arguments and results of the plain forward's own calls, in both ways of computing attention."""
    model, tokens = wrapped(model_type, eager=False), ids(2, LENGTH)
    layers = model.attention_layers
    assert layers
    calls, _ = plain(model._module, model.anatomy, tokens)
    letters = "qkv" if model_type in CHANGED else "qkvz"
    found = read(model, [LETTERS[letter] for letter in letters], layers, tokens)
    for layer in layers:
        assert len(calls[layer]) == (2 if model_type == "diffllama" else 1)
        for letter in letters:
            assert_equal(found[LETTERS[letter], layer], shown(letter, calls[layer]), letter)

    with eagerly(model._module):
        calls, _ = plain(model._module, model.anatomy, tokens)
        found = read(model, [LETTERS[letter] for letter in (*letters, "scores", "probs")], layers, tokens)
    for layer in layers:
        for letter in (*letters, "scores", "probs"):
            assert_equal(found[LETTERS[letter], layer], shown(letter, calls[layer]), letter)


@pytest.mark.parametrize("model_type", CHANGED)
def test_changed_outputs_are_what_the_last_projection_is_given(model_type):
    """z where it is not simply what attention averages: a plain hook's, and not the average, as the list says."""
    model, tokens = wrapped(model_type, eager=False), ids(2, LENGTH)
    layer = model.attention_layers[-1]
    path = projection(model, layer)
    with hooked(model._module, z=(path, "input")) as kept:
        calls, _ = plain(model._module, model.anatomy, tokens)
    z = read(model, ["attention_head_outputs"], [layer], tokens)["attention_head_outputs", layer]
    assert torch.equal(z.flatten(2), kept["z"].flatten(2))
    average = shown("z", calls[layer])
    assert z.shape != average.shape or (z - average).abs().max() > 1e-3


def test_several_attentions_in_a_layer(capsys):
    """LongCat-Flash's layers hold two, indexed with the layer and their number in it."""
    model, tokens = wrapped("longcat_flash", eager=False), ids(2, LENGTH)
    assert model.attention_layers == ()
    assert "attention_head_outputs[0, 1]" in str(model.support())
    with eagerly(model._module):
        calls, clean = plain(model._module, model.anatomy, tokens)
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            found = {}
            found.save()
            for layer in range(model.num_layers):
                for number in range(2):
                    for letter, name in LETTERS.items():
                        found[letter, layer, number] = getattr(model, name)[layer, number].clone()
                    contributions = model.attention_head_contributions[layer, number]
                    found["out", layer, number] = model.attentions_output[layer, number].clone()
                    found["sum", layer, number] = contributions.sum(2)
        for layer in range(model.num_layers):
            assert len(calls[layer]) == 2
            for number, call in enumerate(calls[layer]):
                for letter in LETTERS:
                    assert_equal(found[letter, layer, number], shown(letter, [call]), letter)
                out, made = found["out", layer, number], found["sum", layer, number]
                torch.testing.assert_close(made, out, atol=1e-5, rtol=1e-4)
        for letter, name in LETTERS.items():
            edit = changed(letter)
            for number in range(2):
                _, expected = plain(model._module, model.anatomy, tokens, edits={letter: edit}, where=1, number=number)
                with torch.no_grad(), model.trace(tokens, use_cache=False):
                    value = getattr(model, name)[1, number]
                    if letter in ("scores", "probs"):
                        getattr(model, name)[1, number] = edit(value)
                    else:
                        getattr(model, name)[1, number] = edit(value.transpose(1, 2)).transpose(1, 2)
                    written = model.logits.save()
                scale = expected.abs().max()
                assert (expected - clean).abs().max() > 1e-4 * scale, letter
                assert (written - expected).abs().max() < 1e-5 * scale, letter
    model.explain("attention_values", (1, 0))
    assert "model.layers.1.self_attn.0" in capsys.readouterr().out
    with pytest.raises(IndexError, match="holds 2 attentions"), model.trace(tokens):
        model.attention_queries[0, 2].save()
    with pytest.raises(Unavailable, match="one index"), model.trace(tokens):
        model.layers_output[0, 1].save()
    with pytest.raises(Unavailable, match="hold one at most"), wrapped("llama", eager=False).trace(tokens):
        wrapped("llama", eager=False).attention_queries[0, 1].save()


def projection(model, layer):
    """The module that is given the heads."""
    inside = model.facts.inside.attention[layer]
    return inside.out if inside.before_out is None else inside.before_out[0]


def changed(letter):
    """An edit of one query's row, or of one position, of a tensor `[batch, heads, positions, ...]`."""

    def edit(x):
        x = x.clone()
        if letter == "scores":
            x[:, :, POSITION, : POSITION + 1] = x[:, :, POSITION, : POSITION + 1].flip(-1)
        elif letter == "probs":
            x[:, 0, POSITION] = 0
        else:
            x[:, :, POSITION] *= -1.5
        return x

    return edit


@pytest.mark.parametrize("model_type", TYPES)
def test_writes(model_type):
    """Written through nnterp or in the plain forward's own call: the same logits, other ones than unwritten, causal."""
    model = wrapped(model_type, eager=False)
    _, clean = plain(model._module, model.anatomy, ids(2, LENGTH))
    for letter in "qkvz":
        check_write(model, letter, clean, model_type)
    with eagerly(model._module):
        _, clean = plain(model._module, model.anatomy, ids(2, LENGTH))
        for letter in ("scores", "probs"):
            check_write(model, letter, clean, model_type)


def check_write(model, letter, clean, model_type):
    tokens, layer, name, edit = ids(2, LENGTH), model.attention_layers[0], LETTERS[letter], changed(letter)
    if letter == "z" and model_type in CHANGED:
        expected = edited_input(model._module, projection(model, layer), tokens)
    else:
        _, expected = plain(model._module, model.anatomy, tokens, edits={letter: edit}, where=layer)
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        value = getattr(model, name)[layer]
        if letter in ("scores", "probs"):
            getattr(model, name)[layer] = edit(value)
        else:
            getattr(model, name)[layer] = edit(value.transpose(1, 2)).transpose(1, 2)
        written = model.logits.save()
    scale = expected.abs().max()
    assert (expected - clean).abs().max() > 1e-4 * scale, letter
    assert (written - expected).abs().max() < 1e-5 * scale, letter
    if model_type not in NOT_CAUSAL:
        assert (written - clean)[:, :POSITION].abs().max() < 1e-5 * scale, letter


def edited_input(module, path, tokens):
    """The logits of a plain forward in which a hook changes what a projection is given at one position."""

    def hook(_, args):
        x = args[0].clone()
        x[:, POSITION] *= -1.5
        return (x, *args[1:])

    handle = module.get_submodule(path).register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            return module(**arguments(module, tokens)).logits
    finally:
        handle.remove()


# Names under which modelling code keeps the projection of the stream to the values, where it has one of its own.
PROJECTIONS = ("v_proj", "value", "wv", "v_lin", "project_v", "v")


def test_values_are_what_their_projection_returns():
    """On the types with a projection of the values of its own, whose output nothing changes."""
    proven = []
    for model_type in ("llama", "gemma2", "gpt_neo", "gptj", "opt", "xglm", "bert", "qwen3", "cohere2", "mixtral"):
        model, tokens = wrapped(model_type, eager=False), ids(2, LENGTH)
        layer = model.attention_layers[-1]
        top = model.anatomy.part("self_attn", layer).path
        paths = [
            f"{top}.{name}"
            for name, _ in model._module.get_submodule(top).named_modules()
            if name.rpartition(".")[2] in PROJECTIONS
        ]
        with hooked(model._module, v=(paths[0], "output")) as kept, torch.no_grad():
            model._module(**arguments(model._module, tokens))
        mine = read(model, ["attention_values"], [layer], tokens)["attention_values", layer]
        assert torch.equal(mine.flatten(2), kept["v"].reshape(*mine.shape[:2], -1))
        proven.append(model_type)
    assert len(proven) == 10


def test_an_unserved_value_fails_these_tests():
    """The comparison notices a layer that has no value, another head order and another position."""
    model, tokens = wrapped("llama", eager=False), ids(2, LENGTH)
    calls, _ = plain(model._module, model.anatomy, tokens)
    mine = read(model, ["attention_queries"], [1], tokens)["attention_queries", 1]
    for wrong in (mine.flip(2), mine.roll(1, 1), mine.flip(-1)):
        with pytest.raises(AssertionError):
            assert_equal(wrong, shown("q", calls[1]), "q")
    with pytest.raises(AssertionError):
        assert_equal(mine, shown("q", calls[2]), "q")
    with pytest.raises(Unavailable):
        read(wrapped("mamba", eager=False), ["attention_queries"], [1], tokens)
