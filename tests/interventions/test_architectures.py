"""Every function on architectures of every build, against plain torch hooks on one prompt at a time.

The other files hold the same architectures to the first use of each function; here are the other values, arguments,
metrics and directions, in pairs and batches of mixed lengths, and what an architecture does not have.
"""

import pytest
import torch

from nnterp.errors import Unavailable
from nnterp.interventions import (
    Component,
    TargetPrompt,
    ablate,
    activation_patching,
    components,
    kl_divergence,
    logit_difference,
    logit_lens,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
    path_patching,
    steer,
    target_probability,
)

from .hooked import before, queries_projection, setting, values_of
from .hooked import run as run_anew
from .reference import ARCHITECTURES, WITHOUT_ATTENTION, eager

pytestmark = pytest.mark.slow

ALL = [*ARCHITECTURES, "gpt_oss", "falcon_h1", "granitemoehybrid"]
CLEAN = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15]]
CORRUPTED = [[11, 42, 99, 93, 130, 201], [60, 31, 101, 180]]
PROMPTS = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15], [33, 70, 91, 140, 12]]
ALONG = slice(None)

# What an architecture does not have, which every function must say.
NO_ATTENTION = NO_FEED_FORWARD = WITHOUT_ATTENTION
SOME_ATTENTION = {"jamba", "lfm2", "bamba", "granitemoehybrid"}
# Experts have neurons each of their own.
NO_NEURONS = {*NO_FEED_FORWARD, "mixtral", "granitemoe", "granitemoehybrid", "gpt_oss"}

VALUES = {  # with the architectures that lack it
    "layers_output": set(),
    "mixer_contributions": set(),
    "mlps_output": NO_FEED_FORWARD,
    "attention_contributions": NO_ATTENTION,
    "mlp_contributions": NO_FEED_FORWARD,
    "attention_head_outputs": NO_ATTENTION,
    "attention_probabilities": NO_ATTENTION,
    "mlp_neurons": NO_NEURONS,
}


KEPT = {}  # what the plain runs of this file's models gave: neither the models nor these tensors are changed


def run(model, prompt, edits=()):
    """As `hooked.run`; a run without edits is made once."""
    if edits:
        return run_anew(model, prompt, edits)
    key = id(model), tuple(prompt)
    if key not in KEPT:
        KEPT[key] = run_anew(model, prompt)
    return KEPT[key]


def value(model, prompt, name, layer):
    """As `hooked.value`; all layers are read in one run."""
    key = id(model), tuple(prompt), name
    if key not in KEPT:
        KEPT[key] = values_of(model, prompt, name, layers_having(model, name))
    return KEPT[key][layer]


@pytest.fixture(params=ALL)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return eager(kind)


def equal(found, expected, logits):
    """Within 1e-4 of the size of the logits that the numbers are made of."""
    tolerance = 1e-4 * max(1.0, float(logits.abs().max()))
    assert abs(float(found) - float(expected)) <= tolerance, (float(found), float(expected))


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def layers_having(model, name):
    role = "self_attn" if name.startswith("attention") else "mlp" if name.startswith("mlp") else "layer"
    layers = range(model.num_layers) if role == "layer" else model.anatomy.indices(role)
    return [layer for layer in layers if name != "mlp_neurons" or not model.anatomy.blocks[layer].mixture_of_experts]


def metrics(reference):
    """Metrics by name, each with the number it makes of the logits `[vocab]` of one run of pair `i`."""
    logs = [logits.log_softmax(-1) for logits in reference]
    return [
        (logit_difference(5, 9), lambda logits, i: logits[5] - logits[9]),
        (target_probability([[7, 8], 30]), lambda logits, i: logits.softmax(-1)[[[7, 8], [30]][i]].sum()),
        (kl_divergence(), lambda logits, i: (logs[i].exp() * (logs[i] - logits.log_softmax(-1))).sum()),
        (lambda logits: logits[:, 3] * 2, lambda logits, i: logits[3] * 2),
    ]


def test_lens_at_positions_layers_and_targets(model):
    layers, positions, targets = [-1, 1], [0, -1], [[5, [7, 8]], [9], [30]]
    found = logit_lens(model, PROMPTS, layers=layers, positions=positions, batch_size=2)
    probs, inverse = logit_lens(model, PROMPTS, False, True, layers=layers)
    reduced = logit_lens(
        model, PROMPTS, layers=layers, positions=positions, targets=targets, top_k=2, ranks=True, entropy=True
    )
    last = model.num_layers - 1
    for i, prompt in enumerate(PROMPTS):
        for k, layer in enumerate((last, 1)):
            state = value(model, prompt, "layers_output", layer)

            def read(state, prompt=prompt):
                return run(model, prompt, [("layers_output", last, lambda x: state.expand_as(x))]).softmax(-1)

            own = [read(state[0]), read(state[-1])]
            same(found[i, k], torch.stack(own))
            same(probs[i, k], own[1])
            with before(model._module.get_submodule(model.anatomy.lm_head), lambda x: -x):
                same(inverse[i, k], read(state[-1]))
            for j, expected in enumerate(own):
                same(reduced["top_probs"][i, k, j], expected.topk(2).values)
                same(reduced["entropy"][i, k, j], torch.special.entr(expected).sum())
                for t, target in enumerate(targets[i]):
                    ids = target if isinstance(target, list) else [target]
                    same(reduced["target_probs"][i, k, j, t], expected[ids].sum())
                    best = expected[ids].max()
                    assert (expected > best * 1.001).sum() <= reduced["target_ranks"][i, k, j, t]
                    assert reduced["target_ranks"][i, k, j, t] <= (expected > best * 0.999).sum()


def test_patchscopes_of_latents_tables_and_texts(model):
    tokenizer = model.tokenizer
    targets = [TargetPrompt("The capital of France is", -2), TargetPrompt("Hello there, who", 0)]
    ids = [tokenizer(target.prompt).input_ids for target in targets]
    layers = [model.num_layers - 1, 0]
    latents = 2 * torch.randn(2, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    found = patchscope_lens(model, target_patch_prompts=targets, layers=layers, latents=latents, batch_size=3)
    sources = PROMPTS[:2]
    table = patchscope_table(model, sources, targets, layers, top_k=2)
    by_old_name = patchscope_lens(model, sources, targets, layer_to_patch=layers[1])
    written = patchscope_generate(model, sources, targets[0], 2, layers, batch_size=3, do_sample=False)
    for k, layer in enumerate(layers):
        for i in range(2):
            state = value(model, sources[i], "layers_output", layer)[-1]
            at = targets[i].index_to_patch % len(ids[i])
            same(found[i, k], run(model, ids[i], [("layers_output", layer, setting(at, latents[k, i]))]).softmax(-1))
            expected = run(model, ids[i], [("layers_output", layer, setting(at, state))]).softmax(-1)
            same(table["top_probs"][i, k], expected.topk(2).values)
            if k == 1:
                same(by_old_name[i, 0], expected)
            row, at = list(ids[0]), targets[0].index_to_patch % len(ids[0])
            for _ in range(2):
                logits = run(model, row, [("layers_output", layer, setting(at, state))])
                first, second = logits.topk(2).values
                if first - second < 1e-3 * logits.abs().max():
                    break  # a tie, which rounding decides
                row.append(int(logits.argmax()))
                if row[-1] == model._module.generation_config.eos_token_id:
                    break
            assert written[layer][i][: len(row)].tolist() == row


def test_attention_reads_a_source_in_place_of_an_object(model, kind):
    sources, targets = PROMPTS[1:], [PROMPTS[0], [60, 77, 101]]
    if kind in NO_ATTENTION | SOME_ATTENTION:
        with pytest.raises(Unavailable, match="has no self_attn"):
            patch_object_attn_lens(model, sources, targets, 1, num_patches=2)
        return
    found = patch_object_attn_lens(model, sources, targets, 1, num_patches=2)
    for i, target in enumerate(targets):
        own = [value(model, sources[i], "attentions_input", layer)[-1] for layer in range(model.num_layers)]
        for layer in range(model.num_layers):
            patched = range(layer, min(model.num_layers, layer + 2))
            edits = [("attentions_input", other, setting(1, own[other])) for other in patched]
            same(found[i, layer], run(model, target, edits).softmax(-1))


def test_steering_and_skipping(model):
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = PROMPTS if model.padding_is_exact else PROMPTS[:1]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad(), model.trace({"input_ids": ids, "attention_mask": mask}):
        steer(model, [1, 0], vector, factor=0.5)
        steer(model, model.num_layers - 1, vector, token_positions=-1)
        steered = model.logits[:, -1].save()
    last = ("layers_output", model.num_layers - 1, lambda x: torch.cat([x[:, :-1], x[:, -1:] + vector], 1))
    for row, found in zip(rows, steered, strict=True):
        everywhere = [("layers_output", layer, lambda x: x + 0.5 * vector) for layer in (0, 1)]
        expected = run(model, row, [*everywhere, last])
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    source = [91, 15, 33, 12, 70, 140]
    saved = value(model, source, "layers_output", 1)
    with torch.no_grad(), model.trace(torch.tensor([PROMPTS[0]])):
        model.skip_layers(0, 1, skip_with=saved[None])
        found = model.logits[0, -1].save()
    expected = run(model, PROMPTS[0], [("layers_output", 1, setting(ALONG, saved))])
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert (found - run(model, PROMPTS[0])).norm() > 1e-2 * expected.norm(), "skipping changed nothing"


@pytest.mark.parametrize("name", VALUES)
def test_patching_every_kind_of_value(model, kind, name):
    if kind in VALUES[name]:
        with pytest.raises(Unavailable):
            activation_patching(model, CLEAN, CORRUPTED, logit_difference(5, 9), name)
        return
    having = layers_having(model, name)
    lacking = sorted(set(range(model.num_layers)) - set(having))
    if lacking and name.startswith("attention"):
        with pytest.raises(Unavailable, match="has no self_attn; layer"):
            activation_patching(model, CLEAN, CORRUPTED, logit_difference(5, 9), name, lacking[0])
    layers = sorted({having[0], having[-1]})
    which = list(VALUES).index(name)
    direction = ("denoising", "noising")[which % 2]
    into, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    metric, number = metrics([run(model, prompt) for prompt in CLEAN])[which % 4]
    by_unit = name in ("attention_head_outputs", "attention_probabilities", "mlp_neurons")
    units, positions = ([1, -1], "all") if by_unit else (None, [1, -1])
    found = activation_patching(
        model, CLEAN, CORRUPTED, metric, name, layers, positions, units, direction, batch_size=3
    )
    assert found.axes["scores"] == ("prompts", "layers", "heads" if by_unit else "positions")
    effect = 0.0
    for i in range(2):
        plain = [run(model, prompts[i]) for prompts in (CLEAN, CORRUPTED)]
        for side, logits in zip(("clean", "corrupted"), plain, strict=True):
            equal(found[side][i], number(logits, i), logits)
        for a, layer in enumerate(layers):
            given = value(model, source[i], name, layer)
            for b, at in enumerate(units or positions):
                index = (ALONG, at) if by_unit and name != "attention_probabilities" else (at,)
                logits = run(model, into[i], [(name, layer, setting(index, given[index]))])
                equal(found["scores"][i, a, b], number(logits, i), logits)
                effect = max(effect, (logits - plain[direction == "denoising"]).abs().max().item())
    assert effect > 1e-3, "no cell changes anything"


def senders_of(model):
    """A head and a feed-forward, or mixers where there are none, of the first layers."""
    attending, feeding = model.anatomy.indices("self_attn"), model.anatomy.indices("mlp")
    senders = [Component("mixers_output", 0, positions=[1, -1])]
    if attending:
        senders.append(Component("attention_head_outputs", attending[0], 1))
    if feeding:
        senders.append(Component("mlps_output", feeding[0]))
    return senders


ADDS_THE_STREAM = ("bloom", "mpt")  # modules that add the stream themselves, so what is held is not what they return
SHARED_EXPERTS_BESIDE = ("granitemoehybrid",)  # their shared MLP adds to the stream beside the mixture of experts


def outputs(model):
    """The values that mean what the mixer and the feed-forward add."""
    if model.config.model_type in ADDS_THE_STREAM:
        return "mixer_contributions", "mlp_contributions"
    return "mixers_output", "mlps_output"


def parts_of(model, layer):
    """What mixers and feed-forwards add to the stream, by value, in layers from one on."""
    mixed, fed = outputs(model)
    for block in model.anatomy.blocks[layer:]:
        for name, part in ((mixed, block.mixer), (fed, block.mlp)):
            if part is not None:
                yield name, block.index
        if model.config.model_type in SHARED_EXPERTS_BESIDE:
            yield "other_contributions", block.index
        if block.self_attn is not None and block.self_attn != block.mixer:
            yield "attentions_output", block.index


@torch.no_grad()
def parts_states(model, prompt):
    kept = {}
    listen = [
        (name, layer, lambda x, key=(name, layer): kept.__setitem__(key, x[0].clone()))
        for name, layer in parts_of(model, 0)
    ]
    run(model, prompt, listen)
    return kept


def slow_path(model, prompt, source, sender, receivers, states):
    """Two forward passes: what reaches the receivers with all else held, and the run in which they are given that."""
    layer, index = sender.layer, (ALONG, sender.heads) if sender.heads is not None else (sender.positions or ALONG,)
    mixed, fed = outputs(model)
    named = {"mixers_output": mixed, "mlps_output": fed}.get(sender.value, sender.value)
    given = value(model, source, named, layer)[index]
    edits = [(named, layer, setting(index, given))]
    spoken = named, layer
    if sender.value == "attention_head_outputs":
        block = model.anatomy.blocks[layer]
        spoken = (mixed if block.self_attn == block.mixer else "attentions_output"), layer
    edits += [(*part, setting(ALONG, states[part])) for part in parts_of(model, layer) if part != spoken]
    arrived = []

    def listen(name, at):
        kept = []
        edits.append((name, at, lambda x: kept.append(x[0].clone())))
        arrived.append(kept)

    for name, at, _ in receivers:
        listen(name, at)
    run(model, prompt, edits)
    put = [
        (name, at, setting(index, kept[0][index])) for (name, at, index), kept in zip(receivers, arrived, strict=True)
    ]
    return run(model, prompt, put)


def test_paths(model, kind):
    senders, last = senders_of(model), model.num_layers - 1
    sets = [("logits", [("layers_output", last, (ALONG,))])]
    feeding, attending = model.anatomy.indices("mlp"), model.anatomy.indices("self_attn")
    if feeding:
        sets.append((Component("mlps_input", feeding[-1]), [("mlps_input", feeding[-1], (ALONG,))]))
    if attending and attending[-1] > max(sender.layer for sender in senders):
        at = attending[-1]
        sets.append(([Component("attentions_input", at, positions=-1)], [("attentions_input", at, (-1,))]))
        projection = queries_projection(model, at)
        width = value(model, CLEAN[0], "attention_head_outputs", at).shape[-1] * model.num_heads
        if projection is not None and projection.weight.shape[0] == width:
            sets.append((Component("attention_queries", at, 2), [("attention_queries", at, (ALONG, 2))]))
    else:
        with pytest.raises((ValueError, Unavailable)):
            receiver = Component("attentions_input", attending[0] if attending else 0)
            path_patching(model, CLEAN, CORRUPTED, senders, receiver, logit_difference(5, 9))
    reference = [run(model, prompt) for prompt in CLEAN]
    for k, (receivers, slow) in enumerate(sets):
        metric, number = metrics(reference)[k]
        direction = ("noising", "denoising")[k % 2]
        into, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
        found = path_patching(model, CLEAN, CORRUPTED, senders, receivers, metric, direction=direction, batch_size=2)
        for i in range(2):
            states = parts_states(model, into[i])
            for j, sender in enumerate(senders):
                logits = slow_path(model, into[i], source[i], sender, slow, states)
                equal(found["scores"][i, j], number(logits, i), logits)


def test_ablating(model, kind):
    first, last = 0, model.num_layers - 1
    layer = [Component("mixer_contributions", last)]
    if model.anatomy.blocks[last].mlp is not None:
        layer.append(Component("mlp_contributions", last))
    cases = [layer, Component("layers_output", first, positions=1)]
    attending, plain = model.anatomy.indices("self_attn"), layers_having(model, "mlp_neurons")
    if attending:
        cases += components(model, "attention_head_outputs", attending[-1], [0, 2])
    if kind in NO_NEURONS:
        with pytest.raises(Unavailable):
            ablate(model, PROMPTS, Component("mlp_neurons", last, 3))
    else:
        cases.append(Component("mlp_neurons", plain[0], (3, 7), positions=[0, -1]))
    keys = {(c.value, c.layer) for case in cases for c in (case if isinstance(case, list) else [case])}
    states = [{key: value(model, prompt, *key) for key in keys} for prompt in PROMPTS]
    mean = {key: torch.cat([own[key] for own in states]).mean(0) for key in keys}
    partner = [11, 180, 222, 9, 31, 77, 250]
    drawn = {key: value(model, partner, *key) for key in keys}
    plain_logits = [run(model, prompt) for prompt in PROMPTS]

    def filling(how, component, prompt):
        key = component.value, component.layer
        positions = range(len(prompt)) if component.positions is None else component.positions
        at = [positions] if isinstance(positions, int) else list(positions)
        index = (at,) if component.heads is None else (at, component.heads)
        if component.heads is not None and not isinstance(component.heads, int):
            index = (torch.tensor(at)[:, None], torch.tensor(component.heads)[None])
        if how == "zero":
            return key, index, torch.zeros(())
        if how == "mean":
            whole = mean[key].expand(len(prompt), *mean[key].shape)
        else:
            whole = drawn[key][len(partner) - len(prompt) :]
        return key, index, whole[index]

    for how in ("zero", "mean", "resample"):
        metric, number = metrics(plain_logits)[{"zero": 2, "mean": 0, "resample": 3}[how]]
        reference = [partner] if how == "resample" else None
        found = ablate(model, PROMPTS, cases, how, None if how == "zero" else metric, reference=reference, batch_size=4)
        assert found["scores"].shape == (3, len(cases))
        for i, prompt in enumerate(PROMPTS):
            equal(found["baseline"][i], 0 if how == "zero" else number(plain_logits[i], i), plain_logits[i])
            for k, case in enumerate(cases):
                edits = []
                for component in case if isinstance(case, list) else [case]:
                    (name, at_layer), index, new = filling(how, component, prompt)
                    edits.append((name, at_layer, setting(index, new)))
                logits = run(model, prompt, edits)
                equal(found["scores"][i, k], number(logits, i), logits)
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1))
    sweep = components(model, "layers_output", [first, last], positions=-1)
    found = ablate(model, PROMPTS, sweep, vector, logit_difference(5, 9))
    for i, prompt in enumerate(PROMPTS):
        for k, at_layer in enumerate((first, last)):
            logits = run(model, prompt, [("layers_output", at_layer, setting(-1, vector))])
            equal(found["scores"][i, k], logits[5] - logits[9], logits)
