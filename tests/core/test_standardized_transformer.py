"""StandardizedTransformer on GPT-2 and Llama, from a module and from a folder, against HuggingFace and plain hooks."""

from functools import cache

import numpy as np
import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from transformers import AutoModelForCausalLM

import nnterp
from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError, OutsideTraceError, PaddingError, ShapeError
from nnterp.loading import check_options
from nnterp.readout import Chain
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer

PROMPT = "The capital of France is the city of"
SHORT = "Hello there"
TYPES = ("gpt2", "llama")


@cache
def folder(model_type: str) -> str:
    import tempfile

    return str(tiny_checkpoint(model_type, tempfile.mkdtemp()))


@cache
def build(model_type: str, source: str) -> StandardizedTransformer:
    if source == "folder":
        return StandardizedTransformer(folder(model_type))
    return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer())


@pytest.fixture(params=[(t, s) for t in TYPES for s in ("module", "folder")], ids="-".join)
def model(request):
    return build(*request.param)


@pytest.fixture
def plain(model):
    """The plain HuggingFace model with the same weights, never touched by nnsight."""
    return _plain(model.anatomy.model_type)


@cache
def _plain(model_type: str):
    return AutoModelForCausalLM.from_pretrained(folder(model_type)).eval()


def ids_of(model, text=PROMPT):
    return model.tokenizer(text, return_tensors="pt").input_ids


def test_nothing_is_dispatched_until_the_first_trace():
    model = StandardizedTransformer(folder("llama"))
    assert not model.dispatched
    assert model.certificate.ok
    assert not model.certificate.complete
    with model.scan(PROMPT):
        assert model.layers_output[1].shape[-1] == model.hidden_size
    assert not model.dispatched
    with model.trace(PROMPT):
        model.logits.save()
    assert model.dispatched
    assert model.certificate.complete


def test_layer_outputs_and_logits_equal_huggingface(model, plain):
    with torch.no_grad():
        reference = plain(ids_of(model), output_hidden_states=True)
        with model.trace(PROMPT):
            embeddings = model.token_embeddings.save()
            states = [model.layers_output[i] for i in range(model.num_layers)].save()
            logits = model.logits.save()
            probs = model.next_token_probs.save()
    for state, expected in zip(states[:-1], reference.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, reference.logits, rtol=0, atol=0)
    torch.testing.assert_close(embeddings, plain.get_input_embeddings()(ids_of(model)))
    torch.testing.assert_close(probs, reference.logits[:, -1].softmax(-1))
    torch.testing.assert_close(model.project_on_vocab(states[-1]), reference.logits)


def test_sizes_and_inputs(model):
    assert (model.num_layers, model.hidden_size, model.num_heads, model.vocab_size) == (4, 64, 4, 509)
    assert model.intermediate_size == 112
    with model.trace([PROMPT, SHORT]):
        ids = model.input_ids.save()
        size = model.input_size
        mask = model.attention_mask.save()
        kept = torch.tensor(list(size)).save()
    assert ids.shape == mask.shape == tuple(kept.tolist())
    assert mask[1].sum() == ids_of(model, SHORT).shape[1]


ACCESSORS = (
    "token_embeddings",
    "layers_input",
    "attentions_input",
    "attentions_output",
    "mlps_input",
    "mlps_output",
    "layers_output",
    "ln_final_output",
)


def native(plain, name, layer):
    """The plain model's module and side for a value, written down by hand."""
    if plain.config.model_type == "gpt2":
        top, block = plain.transformer, plain.transformer.h[layer]
        modules = {
            "token_embeddings": top.wte,
            "ln_final_output": top.ln_f,
            "attentions": block.attn,
            "mlps": block.mlp,
        }
    else:
        top, block = plain.model, plain.model.layers[layer]
        modules = {
            "token_embeddings": top.embed_tokens,
            "ln_final_output": top.norm,
            "attentions": block.self_attn,
            "mlps": block.mlp,
        }
    modules["layers"] = block
    return modules[name] if name in modules else modules[name.split("_")[0]], "input" if name.endswith(
        "_input"
    ) else "output"


@pytest.mark.parametrize("name", ACCESSORS)
@pytest.mark.parametrize("layer", [0, -2])
def test_writes_do_what_a_torch_hook_does(model, plain, name, layer):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, generator=generator)
    module, side = native(plain, name, layer)

    def on_output(_, args, output):
        return output + noise if isinstance(output, torch.Tensor) else (output[0] + noise, *output[1:])

    def on_input(_, args, kwargs):
        if args:
            return (args[0] + noise, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + noise}

    if side == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    with torch.no_grad():
        expected = plain(ids_of(model)).logits
        handle.remove()
        clean = plain(ids_of(model)).logits
        with model.trace(PROMPT):
            if hasattr(type(model), name) and name in ("token_embeddings", "ln_final_output"):
                setattr(model, name, getattr(model, name) + noise)
            else:
                getattr(model, name)[layer] = getattr(model, name)[layer] + noise
            written = model.logits.save()
        with model.trace(PROMPT):
            value = (
                getattr(model, name) if name in ("token_embeddings", "ln_final_output") else getattr(model, name)[layer]
            )
            value += noise
            in_place = model.logits.save()
    torch.testing.assert_close(written, expected, rtol=0, atol=0)
    torch.testing.assert_close(in_place, expected, rtol=0, atol=0)
    assert (written - clean).abs().max() > 0.1


def test_logits_can_be_written(model):
    with model.trace(PROMPT) as tracer:
        model.logits = model.logits * 2
        doubled = model.logits.save()
        result = tracer.result.save()
    with model.trace(PROMPT):
        plain = model.logits.save()
    torch.testing.assert_close(doubled, 2 * plain)
    torch.testing.assert_close(result.logits, 2 * plain)


@pytest.mark.parametrize("prompts", [[PROMPT, SHORT, "word"], [SHORT, PROMPT]])
def test_left_padded_batch_gives_single_run_probabilities(model, prompts):
    with torch.no_grad():
        with model.trace(prompts):
            together = model.next_token_probs.save()
        for row, prompt in enumerate(prompts):
            with model.trace(prompt):
                alone = model.next_token_probs.save()
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-6)


def test_right_padding_refuses_next_token_probs():
    model = StandardizedTransformer(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), tokenizer_kwargs={"padding_side": "right"}
    )
    assert model.tokenizer.padding_side == "right"
    with pytest.raises(ValueError, match="Pad on the left"), model.trace([PROMPT, SHORT]):
        model.next_token_probs.save()


def test_padding_is_refused_where_it_is_not_exact(tiny):
    model = tiny("bart")
    with pytest.raises(PaddingError, match="different lengths"), model.trace([PROMPT, SHORT]):
        model.logits.save()
    with model.trace([SHORT, SHORT]):
        logits = model.logits.save()
    assert logits.shape[0] == 2


def test_the_users_tokenizer_is_not_touched():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    before = (tokenizer.padding_side, tokenizer.pad_token)
    model = StandardizedTransformer(tiny_model("gpt2"), tokenizer=tokenizer)
    assert (tokenizer.padding_side, tokenizer.pad_token) == before
    assert model.tokenizer is not tokenizer
    assert model.tokenizer.padding_side == "left"


def test_module_without_tokenizer_says_what_to_pass():
    module = tiny_model("gpt2")
    module.config._name_or_path = ""
    with pytest.raises(ValueError, match="tokenizer="):
        StandardizedTransformer(module)


@pytest.mark.parametrize("bad", [4, -5, 99])
def test_bad_layer_is_an_index_error(model, bad):
    with pytest.raises(IndexError, match=rf"layers_output\[{bad}\].*4 layers.*-4 to 3"), model.trace(PROMPT):
        model.layers_output[bad].save()
    with pytest.raises(IndexError, match="4 layers"):
        model.attentions[bad]


def test_wrong_shape_is_refused_with_both_shapes(model):
    with pytest.raises(ShapeError, match=r"\[1, \d+, 64\].*\[1, 1, 64\]"), model.trace(PROMPT):
        model.layers_output[1] = model.layers_output[1][:, :1]
    for other in (0.0, np.zeros((1, 1, 64))):
        with pytest.raises(TypeError, match=rf"{type(other).__name__}.*torch\.as_tensor"), model.trace(PROMPT):
            model.layers_output[1] = other


def test_outside_a_trace_says_so(model):
    for read in (
        lambda: model.layers_output[0],
        lambda: model.logits,
        lambda: model.token_embeddings,
        lambda: model.input_ids,
    ):
        with pytest.raises(OutsideTraceError, match=r"model\.trace"):
            read()
    with pytest.raises(OutsideTraceError):
        model.layers_output[0] = torch.zeros(1)


def test_out_of_order_says_so_in_our_words(model):
    with pytest.raises(OutOfOrderError, match=r"layers_output\[0\].*forward order"), model.trace(PROMPT):
        for layer in (2, 0):  # not constant, so the block is run as it stands
            model.layers_output[layer].save()


def test_open_generation_loop_still_ends_with_a_warning(model):
    with pytest.warns(UserWarning), model.generate(SHORT, max_new_tokens=3, do_sample=False) as tracer:
        steps = [].save()
        for _ in tracer.iter[:]:
            steps.append(model.layers_output[1][:, -1])
    assert len(steps) == 3


def test_nested_trace_is_refused(model):
    with pytest.raises(InsideTraceError, match="inside a trace"), model.trace(PROMPT):
        model.validate()


def test_skip_layers_equals_the_model_without_them(model, plain):
    with torch.no_grad():
        with model.trace(PROMPT):
            model.skip_layers(1, 2)
            skipped = model.logits.save()
        blocks = plain.get_submodule(model.anatomy.layers)
        handles = [b.register_forward_hook(lambda m, args, out: args[0]) for b in blocks[1:3]]
        expected = plain(ids_of(model)).logits
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(skipped, expected)


def test_saved_activations_skipped_into_the_start_give_the_same_logits(model):
    with model.trace(PROMPT) as tracer:
        saved = model.layers_output[2].save()
        tracer.stop()
    with model.trace(PROMPT):
        model.skip_layers(0, 2, skip_with=saved)
        result = model.logits.save()
    with model.trace(PROMPT):
        plain = model.logits.save()
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    with pytest.raises(ShapeError), model.trace(PROMPT):
        model.skip_layer(0, skip_with=saved[:, :1])
    with pytest.raises(ValueError, match="before the first"), model.trace(PROMPT):
        model.skip_layers(2, 1)


def test_steer_everywhere_at_positions_and_in_rows(model, plain):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    block = plain.get_submodule(model.anatomy.layers)[1]
    prompts = [PROMPT, PROMPT]
    ids = ids_of(model, prompts)
    for token_positions, batch_index in [(None, None), (-1, None), ([0, 2], None), (None, 1), (3, 0)]:
        mask = torch.zeros(2, ids.shape[1], 1)
        rows = slice(None) if batch_index is None else batch_index
        columns = slice(None) if token_positions is None else token_positions
        mask[rows, columns] = 1
        handle = block.register_forward_hook(lambda m, a, out, mask=mask: out + mask * 1.5 * vector)
        with torch.no_grad():
            expected = plain(ids).logits
        handle.remove()
        with torch.no_grad(), model.trace(prompts):
            before = model.layers_output[1].save()
            kept = before.clone().save()
            model.steer(1, vector, factor=1.5, token_positions=token_positions, batch_index=batch_index)
            steered = model.logits.save()
        torch.testing.assert_close(steered, expected)
        torch.testing.assert_close(before, kept, rtol=0, atol=0)  # what was saved before is not changed


def test_steer_many_layers_in_any_order_and_bad_vectors(model):
    vector = torch.randn(64)
    with model.trace(PROMPT):
        model.steer([2, 0, 2], vector, factor=0.5)
        model.logits.save()
    with pytest.raises(ShapeError, match="64"), model.trace(PROMPT):
        model.steer(1, torch.randn(63))
    with pytest.warns(DeprecationWarning, match="3.0: use `token_positions=`") as told, model.trace(PROMPT):
        model.steer(1, vector, positions=-1)
        older = model.logits.save()
    assert [warning.filename for warning in told] == [__file__]  # where Python shows it
    with model.trace(PROMPT):
        model.steer(1, vector, token_positions=-1)
        newer = model.logits.save()
    torch.testing.assert_close(older, newer, rtol=0, atol=0)
    with pytest.raises(IndexError), model.trace(PROMPT):
        model.steer(7, vector)


def test_project_on_vocab_in_a_trace_leaves_the_trace_alone(model):
    with torch.no_grad(), model.trace(PROMPT):
        early = model.project_on_vocab(model.layers_output[1]).save()
        norm = model.ln_final_output.save()
        logits = model.logits.save()
    with torch.no_grad(), model.trace(PROMPT):
        stream = model.layers_output[1].save()
        untouched = model.logits.save()
    torch.testing.assert_close(logits, untouched, rtol=0, atol=0)
    torch.testing.assert_close(early, model.project_on_vocab(stream))
    assert norm.shape == stream.shape
    with pytest.raises(ShapeError, match="64"):
        model.project_on_vocab(torch.zeros(1, 63))


@pytest.mark.parametrize(
    ("model_type", "chain"), [("gemma2", Chain(1.0, 4.0)), ("cohere", Chain(0.75)), ("granite", None)]
)
def test_project_on_vocab_includes_softcaps_and_scales(tiny, model_type, chain):
    model = tiny(model_type)
    if chain is not None:
        assert model.readout.chain == chain
    assert model.readout.chain != Chain()
    with torch.no_grad(), model.trace(PROMPT):
        last = model.layers_output[-1].save()
        logits = model.logits.save()
    torch.testing.assert_close(model.project_on_vocab(last), logits)
    bare = model._module.lm_head(model._module.get_submodule(model.anatomy.ln_final)(last))
    assert (bare - logits).abs().max() > 0.1


def test_topk_closest_tokens(model):
    with torch.no_grad(), model.trace(PROMPT):
        last = model.layers_output[-1].save()
        probs = model.next_token_probs.save()
    one = model.get_topk_closest_tokens(last[0, -1], k=3)
    best = probs[0].topk(3)
    assert list(one) == model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert list(one.values()) == pytest.approx(best.values.tolist(), rel=1e-4)
    assert model.get_topk_closest_tokens(last[0, -2:], k=3)[1] == pytest.approx(one, rel=1e-4)
    with pytest.raises(ShapeError):
        model.get_topk_closest_tokens(last)


def test_generate_session_scan_edit_and_invokes(model, plain):
    with model.generate(SHORT, max_new_tokens=4, do_sample=False) as tracer:
        out = tracer.result.save()
    expected = plain.generate(ids_of(model, SHORT), max_new_tokens=4, do_sample=False)
    assert out.tolist() == expected.tolist()
    with model.session():
        with model.trace(PROMPT):
            hidden = model.layers_output[1]
        with model.trace(PROMPT):
            model.layers_output[1] = hidden
            same = model.logits.save()
    with model.edit() as (_, edited):
        edited.layers_output[1] = edited.layers_output[1] * 0
    with edited.trace(PROMPT):
        zeroed = edited.logits.save()
    with model.trace(PROMPT):
        clean = model.logits.save()
    torch.testing.assert_close(same, clean)
    assert (zeroed - clean).abs().max() > 0.1
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            first = model.layers_output[2][:, -1].save()
        with tracer.invoke(SHORT):
            second = model.layers_output[2][:, -1].save()
    with model.trace(SHORT):
        alone = model.layers_output[2][:, -1].save()
    assert first.shape == second.shape
    torch.testing.assert_close(second, alone, rtol=1e-4, atol=1e-5)


def test_standard_names_are_the_native_modules(model):
    block = model.anatomy.blocks[1]
    assert model.layers[1]._module is model._module.get_submodule(block.path)
    assert model.layers[1].self_attn._module is model._module.get_submodule(block.self_attn.path)
    assert model.attentions[1] is model.layers[1].self_attn
    assert model.mlps[-1] is model.layers[-1].mlp
    assert model.embed_tokens._module is model._module.get_input_embeddings()
    assert "lm_head" in repr(model)


def test_dtype_and_attention_implementation_pass_through():
    model = StandardizedTransformer(folder("llama"), dtype=torch.bfloat16, attn_implementation="eager", dispatch=True)
    assert model._module.dtype == torch.bfloat16
    assert model._module.config._attn_implementation == "eager"
    assert model.certificate.ok


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "The prompt has no tokens"),
        ([PROMPT, ""], "Prompt 1 of 2 has no tokens"),
        (torch.zeros(2, 0, dtype=torch.long), "The prompt has no tokens"),
    ],
)
def test_a_trace_of_no_tokens_says_so(prompt, words):
    model = build("llama", "module")
    with pytest.raises(ValueError, match=words), model.trace(prompt):
        model.logits.save()
    with pytest.raises(ValueError, match=words), model.generate(prompt, max_new_tokens=2) as tracer:
        tracer.result.save()
    with pytest.raises(ValueError, match=words):  # without a block
        model.generate(prompt, max_new_tokens=2)
    with torch.no_grad():  # nothing is left of it
        with model.trace(PROMPT):
            logits = model.logits.save()
        assert torch.equal(logits, model._module(ids_of(model)).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": "cuda:63"}, r"device_map='cuda:63': there is no such device here"),
        ({"device_map": 63}, r"device_map=63: there is no such device here"),
        ({"device_map": {"": torch.device("cuda:63")}}, "no such device here"),
        ({"device": "gpu"}, r"device='gpu': there is no such device here.*'balanced'"),
        ({"dtype": "bf16"}, r"dtype='bf16' is no dtype\. Did you mean bfloat16\?.*'auto'"),
        ({"torch_dtype": "flaot16"}, r"torch_dtype='flaot16' is no dtype\. Did you mean float16"),
        ({"dtype": "nn"}, r"dtype='nn' is no dtype\. Give"),  # torch.nn is there, and is none
    ],
)
def test_devices_and_dtypes_that_are_not_there_are_said_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as raised:
        StandardizedTransformer(nnterp.toy_checkpoint(), **options)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_names_of_devices_and_dtypes_that_are_there_pass():
    with pytest.raises(TypeError, match="is no dtype"):
        check_options({"dtype": 16}, False)
    check_options({"device_map": "cuda:63"}, True)  # a remote model's weights are not loaded here
    for placed in ("auto", "sequential", "cpu", None, {"": "cpu", "lm_head": "disk"}, torch.device("cpu"), "meta"):
        check_options({"device_map": placed}, False)
    for dtype in ("auto", "bfloat16", "half", torch.float16, {"": "float32"}, None):
        check_options({"dtype": dtype}, False)


def test_remote_models_load_no_weights():
    model = StandardizedTransformer(folder("llama"), remote=True)
    assert not model.dispatched
    assert model.certificate.ok


def test_no_modelling_file_is_imported_before_a_model_is_loaded(processes):
    code = (
        "import sys, nnterp; "
        "print([m for m in sys.modules if m.split('.')[0] in ('plotly', 'pandas') or '.modeling_' in m and "
        "'transformers.models' in m])"
    )
    out, said, failed = processes.run(code)
    assert not failed, said
    assert out.strip() == "[]"
