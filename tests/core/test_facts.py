"""What is known of a model is one immutable object; nothing else is ever written on the model."""

import ast
import contextlib
import dataclasses
import inspect
import pickle
import textwrap

import nnsight
import pytest
import torch
from nnsight import TransformersModel

from nnterp import RenameConfig, StandardizedTransformer
from nnterp.certificate import CLAIMS, certify
from nnterp.errors import PaddingError, Unavailable, Unproven, UnprovenWarning
from nnterp.facts import Facts
from nnterp.interventions import activation_patching, logit_lens
from nnterp.named_transformer import NamedTransformer
from nnterp.reading import ReadTransformer
from nnterp.sent import SENT, SENT_OF_NNSIGHT
from nnterp.table import SENT_WHERE_NAMED, VALUES
from nnterp.testing import RemoteWorker, tiny_checkpoint, tiny_encoder_decoder, tiny_model, tiny_tokenizer
from nnterp.traced import TracedTransformer

from ..looped_modeling import looped_module

PROMPTS = ["The capital of France is", "A cat"]


def attributes(model):
    """Every attribute of a model and of the nnsight tree below it, by identity."""
    envoys = [model, *model.modules()]
    return {(envoy.path, name): id(value) for envoy in envoys for name, value in vars(envoy).items()}


def changed(before, after):
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "jamba", "xlnet"])
def test_nothing_but_the_constructor_and_the_proof_sets_attributes(model_type):
    model = StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    loaded = attributes(model)
    with torch.no_grad(), model.trace(PROMPTS[0]):
        model.layers_output[1].save()
        model.project_on_vocab(model.layers_output[2]).save()
    model.support()
    model.collect(PROMPTS, ["layers_output", "mlp_contributions"], positions=-1, progress=False)
    logit_lens(model, PROMPTS)
    target = torch.randn(model.vocab_size)
    activation_patching(model, [[9, 20, 31, 42]], [[9, 20, 33, 42]], lambda logits: logits.float() @ target)
    assert changed(loaded, attributes(model)) == set()
    model.validate()
    assert {name for _, name in changed(loaded, attributes(model))} == {"facts", "certificate"}


@pytest.mark.slow
def test_nor_does_a_model_without_weights(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    model = StandardizedTransformer(folder, remote=True)
    loaded, structural = attributes(model), model.facts
    with RemoteWorker(folder) as worker, worker.serving(), torch.no_grad():
        for _ in range(3):
            with model.trace(PROMPTS[0], remote=True):
                model.layers_output[1].save()
        assert {name for _, name in changed(loaded, attributes(model))} == {"facts"}
        assert (structural.proof, model.facts.proof) == ("structure", "twin")
        learnt = attributes(model)
        model.collect(PROMPTS, "attention_queries", positions=-1, remote=True)
        logit_lens(model, PROMPTS, remote=True)
        for _ in range(2):
            with model.trace(PROMPTS[0], remote=True):
                model.layers_output[1].save()
        assert changed(learnt, attributes(model)) == set()
        sizes = [request.size for request in worker.requests]
    assert abs(sizes[0] - sizes[1]) < 64  # nnsight itself numbers some names differently the first time
    assert sizes[1] == sizes[2]
    assert sizes[-1] == sizes[-2]


def test_the_weights_arrive_with_one_assignment(tmp_path):
    model = StandardizedTransformer(tiny_checkpoint("llama", tmp_path))
    assert model.facts.proof == "structure"
    plain = TransformersModel(tiny_checkpoint("llama", tmp_path), task="text-generation", tokenizer=tiny_tokenizer())
    loaded = {name: id(value) for name, value in vars(model).items()}
    model.dispatch()
    own = {name for name, value in vars(model).items() if loaded.get(name) != id(value)} - vars(plain).keys()
    assert own <= {"facts", "certificate", "loaded_files"}
    assert model.facts.proof == "weights"


def test_certifying_touches_nothing(tiny):
    model = tiny("gemma2")
    before, facts = attributes(model), model.facts
    certificate, found = certify(model)
    assert changed(before, attributes(model)) == set()
    assert model.facts is facts is not found
    assert len(certificate.lines) == len(CLAIMS)
    for field in dataclasses.fields(Facts):
        if not field.name.startswith("look_") and field.name not in ("places", "residual"):
            assert getattr(found, field.name) == getattr(facts, field.name), field.name


def test_facts_cannot_be_changed(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny("llama").facts.padding = "exact"
    with pytest.raises(AttributeError):
        tiny("llama").padding_is_exact = True


def test_facts_do_not_travel(tiny):
    """A request takes a whitelist: nnsight's own state, the bound names, and what the traced half of a model reads."""
    model = tiny("llama")
    _, _, state = model.__reduce_ex__(4)
    assert not any(isinstance(value, Facts) for value in state.values())
    bound = {"embed_tokens", "layers", "ln_final", "lm_head", "model", "generator"}
    made = {"directory", "edits", "sharing"}  # for the request
    assert state.keys() <= {*SENT, *SENT_OF_NNSIGHT, *made, *bound, *SENT_WHERE_NAMED}
    assert not any(hasattr(TracedTransformer, name) for name in SENT_WHERE_NAMED)  # their accessors come with the state
    annotated = {name for name in TracedTransformer.__annotations__ if name not in ("output", *bound, *VALUES)}
    assert {*SENT, *made} == annotated
    for name in SENT:
        pickle.dumps(state[name])


def test_what_nnsight_keeps_of_a_model_is_sent():
    """A new attribute of nnsight's own models must be put into `SENT_OF_NNSIGHT`, or left out on purpose."""
    plain = TransformersModel(tiny_model("llama"), tokenizer=tiny_tokenizer())
    children = {"model", "lm_head", "generator"}
    assert vars(plain).keys() - {"_parent"} - children <= {*SENT_OF_NNSIGHT}


def test_the_names_that_type_checkers_see_are_those_of_the_table():
    halves = (TracedTransformer, ReadTransformer)  # what travels, and what does not
    sources = [ast.parse(textwrap.dedent(inspect.getsource(half))) for half in halves]
    lines = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.AnnAssign)]
    lines = [line for line in lines if isinstance(line.target, ast.Name)]
    seen = {line.target.id: line.annotation for line in lines if line.target.id in VALUES}
    seen = {name: ast.unparse(annotation) for name, annotation in seen.items()}
    assert seen == {name: "LayerAccessor" if value.per_layer else "torch.Tensor" for name, value in VALUES.items()}


# -- check_renaming=False ------------------------------------------------------------------------------------------


@pytest.fixture
def unproven():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), check_renaming=False)


def test_unproven_facts_say_so(unproven, tiny):
    facts = unproven.facts
    assert (facts.proof, facts.padding, facts.readout.way) == ("none", "unproven", "unproven")
    assert unproven.certificate is None
    assert not unproven.padding_is_exact
    assert not unproven.readout.proven
    assert "unproven" in str(unproven.readout)
    assert unproven.residual_structures == ()


def test_without_a_proof_what_needs_only_a_name_is_served(unproven, tiny):
    rows = [value for value in VALUES.values() if value.stack == "layers"]
    names = [value.name for value in rows if value.side is not None and value.per_layer]
    proven = tiny("llama")
    found = []
    for model in (unproven, proven):
        with torch.no_grad(), model.trace(PROMPTS[0]):
            ordered = sorted(names, key=lambda name: VALUES[name].rank)
            values = nnsight.save([getattr(model, name)[1] for name in ordered])
            queries = model.attention_queries[2].save()
        found.append([*values, queries])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad(), unproven.trace(PROMPTS[0]):
        unproven.layers_output[1] = unproven.layers_output[1] * 0
        written = unproven.logits.save()
    with torch.no_grad(), proven.trace(PROMPTS[0]):
        proven.layers_output[1] = proven.layers_output[1] * 0
        expected = proven.logits.save()
    assert torch.equal(written, expected)


@pytest.mark.parametrize("name", ["attention_contributions", "mlp_contributions", "layers_mid"])
def test_without_a_proof_what_is_told_by_numbers_is_refused(unproven, name):
    with pytest.raises(Unproven, match=r"model\.validate\(\)"):
        unproven.place(name, 0)
    assert not unproven.support().available(name)


def test_without_a_proof_hidden_states_are_projected_with_a_warning(unproven, tiny):
    hidden = torch.randn(3, unproven.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with pytest.warns(UnprovenWarning, match=r"model\.validate\(\)"):
            logits = unproven.project_on_vocab(hidden)
        expected = tiny("llama").project_on_vocab(hidden)
    assert torch.equal(logits, expected)


def test_without_a_proof_padding_is_refused_and_functions_batch_equal_lengths(unproven, tiny):
    with pytest.raises(PaddingError, match=r"model\.validate\(\)"):  # noqa: SIM117
        with torch.no_grad(), unproven.trace(PROMPTS):
            unproven.logits.save()
    mine = unproven.collect([*PROMPTS, "A dog"], "layers_output", positions=-1)["layers_output"]
    other = tiny("llama").collect([*PROMPTS, "A dog"], "layers_output", positions=-1, batch_size=1)["layers_output"]
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_without_a_proof_layers_are_skipped_if_it_is_said_what_they_return(unproven, tiny):
    with pytest.raises(Unavailable, match="layer_returns_tuple"):  # noqa: SIM117
        with torch.no_grad(), unproven.trace(PROMPTS[0]):
            unproven.skip_layer(1)
    found = []
    for model, said in ((unproven, False), (tiny("llama"), None)):
        with torch.no_grad(), model.trace(PROMPTS[0]):
            model.skip_layers(1, 1, layer_returns_tuple=said)
            logits = model.logits.save()
        found.append(logits)
    assert torch.equal(*found)


def test_a_wrong_name_is_served_as_it_was_given_until_it_is_proven():
    wrong = RenameConfig(attn_name="mlp", mlp_name="self_attn")
    model = StandardizedTransformer(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=wrong, check_renaming=False
    )
    assert model.anatomy.blocks[0].self_attn.path.endswith("mlp")
    assert not model.validate().ok


EDGES = [value for value in VALUES.values() if value.stack == "layers" and value.side is not None]
ODD = {  # what names alone would get wrong
    "hrm_text": "model.L_module.layers.0 runs 6 times in a forward pass",
    "xlnet": r"its layers return \[11, 2, 64\] for an input of \[2, 11\]",
    "cpmant": r"its layers return \[2, 16, 64\]",  # a soft prompt in front
    "prophetnet": r"its layers return \[2, 33, 64\]",  # three streams in a row
    "gemma3n_text": r"its layers return \[4, 2, 11, 64\]",  # stacked streams
    "deepseek_v4": r"its layers return \[2, 11, 4, 64\]",
}


@pytest.mark.parametrize("model_type", [*ODD, "llama", "gpt2", "bert", "jamba", "t5"])
def test_without_a_proof_a_value_is_what_it_is_with_one_or_refused(model_type):
    """Names alone assume that layers run once, and on which axes the stream has batch and sequence."""
    module = tiny_encoder_decoder(model_type) if model_type == "t5" else tiny_model(model_type)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), check_renaming=False)
    layers = range(model.num_layers)
    asked = [(value.name, layer) for value in EDGES for layer in (layers if value.per_layer else [None])]
    alone = {}
    for at in asked:
        if model_type in ODD:
            with pytest.raises(Unproven, match=ODD[model_type]):
                model.place(*at)
        else:
            with contextlib.suppress(Unavailable):
                alone[at] = str(model.place(*at))
    assert bool(alone) == (model_type not in ODD)
    assert model.validate().ok
    assert alone == {at: str(model.place(*at)) for at in alone}
    assert str(model.place("layers_output", 0))


def test_without_a_proof_a_loop_is_refused_in_every_function():
    for model in (
        NamedTransformer(looped_module(), tokenizer=tiny_tokenizer(), task="text-generation"),
        StandardizedTransformer(looped_module(), tokenizer=tiny_tokenizer(), check_renaming=False),
    ):
        with pytest.raises(Unproven, match="runs 3 times"), torch.no_grad(), model.trace([[5, 9, 12]]):
            model.layers_output[1].save()
    vector = torch.ones(model.hidden_size)
    uses = [
        lambda: model.collect([[5, 9, 12]], "layers_output"),
        lambda: model.collect([[5, 9, 12]], "attention_queries[2]"),
        lambda: model.gradients([[5, 9, 12]], lambda logits: logits[:, -1, 3], "layers_output"),
        lambda: logit_lens(model, [[5, 9, 12]]),
        lambda: generated(model, lambda: model.steer(layers=1, steering_vector=vector)),
        lambda: generated(model, lambda: model.skip_layers(1, 1, layer_returns_tuple=False)),
        lambda: generated(model, lambda: model.ln_final_output.save()),  # it runs before each pass too
    ]
    for use in uses:
        with pytest.raises(Unproven, match=r"runs \d times in a forward pass.*model\.validate\(\)"):
            use()
    with model.steering(vector, layers=[1]), pytest.raises(Unproven, match="runs 3 times"), torch.no_grad():
        model._module(torch.tensor([[5, 9, 12]]))
    assert not model.support()["layers_output"]


def generated(model, use):
    with torch.no_grad(), model.trace([[5, 9, 12]]):
        use()


def test_without_a_proof_a_model_that_cannot_be_run_is_served_with_a_warning():
    module = tiny_model("llama")
    forward = module.forward

    def needs_more(*args, image=None, **kwargs):
        if image is None:
            raise ValueError("an image is needed")
        return forward(*args, **kwargs)

    module.forward = needs_more
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), check_renaming=False)
    with pytest.warns(UnprovenWarning, match="ran once.*ValueError: an image is needed"):
        model.place("layers_output", 1)


def test_without_a_proof_a_run_that_lacks_memory_says_nothing_of_the_model():
    module, calls = tiny_model("hrm_text"), []
    forward = module.forward

    def once_without_memory(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory is left")
        return forward(*args, **kwargs)

    module.forward = once_without_memory
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), check_renaming=False)
    with pytest.raises(torch.OutOfMemoryError):
        model.place("layers_output", 1)
    with pytest.raises(Unproven, match=ODD["hrm_text"]):
        model.place("layers_output", 1)


def test_validate_proves_what_was_not(unproven):
    assert unproven.validate().ok
    assert unproven.facts.proof == "weights"
    assert unproven.padding_is_exact
    assert unproven.readout.proven
    unproven.place("layers_mid", 0)
