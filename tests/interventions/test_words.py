"""Wrong arguments are refused in this library's words, before anything is loaded or run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nnterp
from nnterp import RenameConfig, StandardizedTransformer, get_rename_dict, nnsight_utils
from nnterp.certificate import Certificate
from nnterp.cli import main
from nnterp.collection import Collected
from nnterp.interventions import (
    Component,
    Result,
    TargetPrompt,
    ablate,
    activation_patching,
    components,
    logit_difference,
    logit_lens,
    logit_lens_table,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
    path_patching,
    repeat_prompt,
    target_probability,
)
from nnterp.positions import last_of
from nnterp.prompts import IncompleteRunError, Prompt, PromptResults, next_token_probs, run_prompts
from nnterp.testing import tiny_model, tiny_tokenizer

from ..words import error_of, is_ours

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
PARIS = logit_difference(" Paris", " Rome")
MLP = Component("mlps_output", 1)
WRONG = [
    *(None, "", [], [[]], float("nan"), b"ab", 1.5, -3, True, "nonsense", {}, {1, 2}, ("a", 1), [None], [""]),
    *(torch.zeros(2, 2, 2, 2), np.array([[1.5]]), object(), lambda *a, **k: None, 10**6, "cuda:99"),
]


def prompts_of(m):
    return [Prompt.from_strings(FRANCE, {"a": "Paris", "b": "Rome"}, m)]


# A call, the arguments that make it right, and those that are made wrong, one after the other.
CALLS = {
    "collect": (
        lambda m, **k: m.collect(**k),
        {"prompts": FRANCE, "values": "layers_output", "layers": [1]},
        "prompts values batch_size device dtype reduce progress",
    ),
    "gradients": (
        lambda m, **k: m.gradients(**k),
        {"prompts": FRANCE, "metric": lambda x: x[:, -1, 3].sum(), "values": "layers_output"},
        "prompts metric values device",
    ),
    "logit_lens": (
        logit_lens,
        {"prompts": FRANCE, "layers": [1]},
        "prompts targets top_k batch_size progress",
    ),
    "logit_lens_table": (logit_lens_table, {"prompts": FRANCE, "layers": [1]}, "top_k targets"),
    "patchscope_lens": (
        patchscope_lens,
        {"source_prompts": FRANCE, "layers": [1]},
        "source_prompts target_patch_prompts batch_size",
    ),
    "latents": (patchscope_lens, {"latents": torch.zeros(1, 1, 128), "layers": [1]}, "latents"),
    "patchscope_table": (patchscope_table, {"source_prompts": FRANCE, "layers": [1]}, "target_patch_prompts top_k"),
    "patchscope_generate": (
        patchscope_generate,
        {"source_prompts": FRANCE, "target_patch_prompt": repeat_prompt(), "max_new_tokens": 1, "layers": [1]},
        "source_prompts target_patch_prompt max_new_tokens batch_size",
    ),
    "patch_object_attn_lens": (
        patch_object_attn_lens,
        {"source_prompts": FRANCE, "target_patch_prompts": ITALY, "attn_idx_patch": -1, "num_patches": 1},
        "source_prompts target_patch_prompts attn_idx_patch num_patches batch_size",
    ),
    "activation_patching": (
        activation_patching,
        {"clean": FRANCE, "corrupted": ITALY, "metric": PARIS, "layers": [1], "positions": [-1]},
        "clean corrupted metric values direction batch_size progress",
    ),
    "path_patching": (
        path_patching,
        {"clean": FRANCE, "corrupted": ITALY, "sender": MLP, "receivers": "logits", "metric": PARIS},
        "clean corrupted sender receivers metric direction batch_size",
    ),
    "ablate": (ablate, {"prompts": FRANCE, "what": MLP}, "prompts what how metric reference seed batch_size"),
    "components": (components, {"value": "mlps_output", "layers": 1}, "value"),
    "logit_difference": (
        lambda m, **k: activation_patching(m, FRANCE, ITALY, logit_difference(**k), layers=[1], positions=[-1]),
        {"correct": " Paris", "wrong": " Rome"},
        "correct wrong",
    ),
    "target_probability": (
        lambda m, **k: activation_patching(m, FRANCE, ITALY, target_probability(**k), layers=[1], positions=[-1]),
        {"target": " Paris"},
        "target",
    ),
    "run_prompts": (
        lambda m, **k: run_prompts(m, **{"prompts": prompts_of(m), "progress": False, **k}),
        {},
        "prompts batch_size get_probs_func func_kwargs scoring answer_prefix resume",
    ),
    "next_token_probs": (next_token_probs, {"prompts": FRANCE}, "prompts targets"),
    "Prompt": (lambda m, **k: Prompt(**k), {"prompt": FRANCE, "target_tokens": {"a": [3]}}, "target_tokens"),
    "Prompt.from_strings": (
        lambda m, **k: Prompt.from_strings(**{"prompt": FRANCE, "target_strings": "Paris", "tokenizer": m, **k}),
        {},
        "target_strings tokenizer metadata",
    ),
    "get_token_activations": (nnsight_utils.get_token_activations, {"prompts": FRANCE}, "prompts idx"),
    "collect_token_activations_batched": (
        nnsight_utils.collect_token_activations_batched,
        {"prompts": [FRANCE], "batch_size": 1},
        "prompts batch_size idx",
    ),
    "compute_next_token_probs": (nnsight_utils.compute_next_token_probs, {"prompts": FRANCE}, "prompts"),
    "get_topk_closest_tokens": (
        lambda m, **k: m.get_topk_closest_tokens(torch.zeros(128), **k),
        {},
        "k",
    ),
    "explain": (lambda m, **k: m.explain(**k), {"name": "layers_output"}, "name layer"),
    "TargetPrompt": (lambda m, **k: TargetPrompt(**k), {"prompt": "a", "index_to_patch": -1}, "prompt index_to_patch"),
    "repeat_prompt": (lambda m, **k: repeat_prompt(**k), {}, "words rel sep placeholder index_to_patch"),
    "Result.load": (lambda m, **k: Result.load(**k), {}, "path"),
    "PromptResults.load": (lambda m, **k: PromptResults.load(**k), {}, "folder"),
    "Collected.load": (lambda m, **k: Collected.load(**k), {}, "path"),
    "Certificate.load": (lambda m, **k: Certificate.load(**k), {}, "path"),
    "rename_config": (
        lambda m, **k: StandardizedTransformer(m._module, tokenizer=m.tokenizer, **k),
        {},
        "rename_config",
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, call in CALLS.items() for argument in call[2].split()]
)
def test_a_wrong_argument_is_refused_in_words(toy, name, argument, capsys):
    """Either the value happens to be one that can be meant, or the error comes from a `raise` of this library."""
    call, right, _ = CALLS[name]
    for wrong in WRONG:
        error = error_of(lambda wrong=wrong: call(toy, **{**right, argument: wrong}))
        error = error.__cause__ if isinstance(error, IncompleteRunError) else error
        assert error is None or is_ours(error), f"{argument}={wrong!r:.60}: {type(error).__name__}: {error}"


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "4", None, float("nan"), [1]])
def test_counts(toy, bad):
    for call in (
        lambda: toy.collect(FRANCE, "layers_output", batch_size=bad),
        lambda: toy.collect(FRANCE, "layers_output", max_new_tokens=0 if bad is None else bad),
        lambda: logit_lens(toy, FRANCE, batch_size=bad),
        lambda: logit_lens(toy, FRANCE, top_k=0 if bad is None else bad),
        lambda: patchscope_table(toy, FRANCE, top_k=bad),
        lambda: patchscope_generate(toy, FRANCE, repeat_prompt(), bad),
        lambda: patchscope_generate(toy, FRANCE, repeat_prompt(), batch_size=bad),
        lambda: patch_object_attn_lens(toy, FRANCE, ITALY, -1, bad),
        lambda: run_prompts(toy, prompts_of(toy), batch_size=bad),
        lambda: toy.get_topk_closest_tokens(torch.zeros(128), bad),
    ):
        with pytest.raises((TypeError, ValueError), match=r"batch_size|max_new|top_k|num_pat|k is an"):
            call()


# -- before anything is loaded ---------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """Loading is an error."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("nnterp.named_transformer.NamedTransformer.__init__", load)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (None, TypeError, "hub id, a local folder or a HuggingFace module, not None"),
        (7, TypeError, "not 7"),
        (b"gpt2", TypeError, "hub id"),
        (["gpt2"], TypeError, "hub id"),
        ("", ValueError, "empty"),
        ("/no/such", FileNotFoundError, "There is no folder /no/such"),
        (Path("no/such"), FileNotFoundError, "no/such"),
        ("./no", FileNotFoundError, "There is no folder"),
    ],
)
def test_the_model_is_checked_first(unloaded, given, error, words):
    with pytest.raises(error, match=words):
        StandardizedTransformer(given)


def test_a_wrapped_model_and_a_dict_of_names(toy, unloaded):
    with pytest.raises(TypeError, match=r"give the module itself: StandardizedTransformer\(model._module"):
        StandardizedTransformer(toy)
    for given in ({"mlp_name": "ffn"}, "ffn", ["ffn"]):
        with pytest.raises(TypeError, match="rename_config is a RenameConfig"):
            StandardizedTransformer(toy._module, rename_config=given)
        with pytest.raises(TypeError, match="rename_config is a RenameConfig"):
            get_rename_dict(given)
    assert get_rename_dict(RenameConfig(mlp_name="ffn"))["ffn"] == "mlp"


def test_a_block_on_one_line_is_refused_before_the_weights_are_loaded():
    model = StandardizedTransformer(nnterp.toy_checkpoint(), allow_dispatch=False)
    assert not model.dispatched
    # fmt: off
    with pytest.raises(ValueError, match="a line of its own"):  # noqa: SIM117
        with model.trace(FRANCE): _ = model.logits.save()  # noqa: E701
    with pytest.raises(ValueError, match="a line of its own"):  # noqa: SIM117
        with torch.no_grad(), model.trace(FRANCE): _ = model.logits.save()  # noqa: E701
    # fmt: on
    with pytest.raises(ValueError, match="cannot begin with `try`"):  # noqa: SIM117
        with model.trace(FRANCE):
            try:
                _ = model.logits.save()
            finally:
                pass
    assert not model.dispatched
    with model.trace(
        FRANCE,
    ):
        logits = model.logits.save()
    assert model.dispatched
    assert logits.shape[-1] == model.vocab_size


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "/no/such"],
        ["check", ""],
        ["check", "./no/such"],
        ["lens", "/no/such", "Hello"],
        ["demo", "/no/such"],
        ["lens", "toy", "Hello", "--top-k", "0"],
        ["lens", "toy", "Hello", "--device", "nonsense"],
        ["lens", "toy", ""],
    ],
    ids=" ".join,
)
def test_commands_say_why_and_return_1(argv, capsys):
    with contextlib.suppress(SystemExit):
        assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith(("nnterp ", "usage:"))
    assert "Traceback" not in said


def test_outputs_are_checked_before_the_work(tmp_path, capsys, unloaded):
    (tmp_path / "file").write_text("x")
    absent = tmp_path / "absent" / "out"
    cases = {
        tmp_path / "file" / "below": f"there is no folder {tmp_path / 'file'}",
        absent: f"there is no folder {absent.parent}",
        tmp_path: f"{tmp_path} is a folder",
    }
    for argv in (["check", "llama", "--json"], ["lens", "toy", "Hello", "--html"], ["demo", "--html"]):
        for path, told in cases.items():
            assert main([*argv, str(path)]) == 1
            said = capsys.readouterr().err
            assert said.startswith(f"nnterp {argv[0]}: {argv[-1]} {path}")
            assert told in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_certificate_is_written_where_json_says(tmp_path, capsys):
    path = tmp_path / "certificate.json"
    assert main(["check", "llama", "--json", str(path)]) == 0
    assert Certificate.load(path).ok


# -- files -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named(toy, tiny, tmp_path):
    path = tmp_path / "certificate.json"
    tiny("llama").certificate.save(path)
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "", "[]", "{}", "null", json.dumps({"lines": [{}]}), '{"lines": 3}', "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"certificate\.json holds no certificate"):
            Certificate.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"certificate.json"):
        Certificate.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        Certificate.load(tmp_path / "missing.json")

    patching_numbers = activation_patching(toy, FRANCE, ITALY, PARIS, layers=[1], positions=[-1])
    collected = toy.collect(FRANCE, "layers_output", [1])
    for made, load in ((patching_numbers, Result.load), (collected, Collected.load)):
        file = tmp_path / f"{type(made).__name__}.safetensors"
        made.save(file)
        whole_bytes = file.read_bytes()
        for damaged in (b"", whole_bytes[:20], whole_bytes[:-5], whole_bytes[:-1] + bytes([whole_bytes[-1] ^ 1])):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=file.name):
                load(file)


# -- while it runs ---------------------------------------------------------------------------------------------------


def test_a_generation_that_returns_an_object(toy):
    plain = toy.collect(FRANCE, "layers_output", [1], max_new_tokens=2, do_sample=False)
    asked = toy.collect(FRANCE, "layers_output", [1], max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(plain.generated, asked.generated)
    assert torch.equal(plain["layers_output"], asked["layers_output"])
    options = {"max_new_tokens": 3, "layers": [2], "do_sample": False}
    expected = patchscope_generate(toy, FRANCE, repeat_prompt(), **options)[2]
    found = patchscope_generate(toy, FRANCE, repeat_prompt(), **options, return_dict_in_generate=True)[2]
    assert torch.equal(expected, found)
    for setting in ("num_beams", "num_return_sequences"):
        with pytest.raises(ValueError, match=f"{setting}=2: each prompt has one answer"):
            toy.collect(FRANCE, "layers_output", max_new_tokens=2, **{setting: 2})
        with pytest.raises(ValueError, match=f"{setting}=2: each prompt has one answer"):
            patchscope_generate(toy, FRANCE, repeat_prompt(), **{setting: 2})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mamba"])
def test_a_plain_backward_fills_in_the_gradients_of_what_was_read(model_type):
    """The reference: HuggingFace's module and a hook."""
    module = tiny_model(model_type)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    seen = {}

    def keep(_module, _args, output):
        seen["h"] = output if isinstance(output, torch.Tensor) else output[0]
        seen["h"].retain_grad()

    handle = module.get_submodule(model.layer_paths[0]).register_forward_hook(keep)
    module(input_ids=ids).logits[:, -1, 3].sum().backward()
    handle.remove()
    expected = seen["h"].grad
    with model.trace({"input_ids": ids}):
        inside = model.layers_output[0]
        model.logits[:, -1, 3].sum().backward()
        found_inside = inside.grad.save()
    with model.trace({"input_ids": ids}):
        after = model.layers_output[0].save()
        score = model.logits[:, -1, 3].sum().save()
    score.backward()
    with model.trace({"input_ids": ids}):
        within = model.layers_output[0]
        with model.logits[:, -1, 3].sum().backward():
            found_within = within.grad.save()
    for found in (found_inside, after.grad, found_within):
        torch.testing.assert_close(found, expected)


def test_patterns_of_other_lengths_are_refused_before_the_run(monkeypatch):
    model = StandardizedTransformer(nnterp.toy_checkpoint(), enable_attention_probs=True)
    model.dispatch()
    long = FRANCE + " now"
    runs = []
    monkeypatch.setattr("nnterp.interventions._patching.states_of", lambda *a, **k: runs.append(a))
    with pytest.raises(ValueError, match=r"attention_probabilities has an axis of keys.*5 tokens.*7"):
        activation_patching(model, FRANCE, long, PARIS, "attention_probabilities", positions=last_of("is"))
    pattern = Component("attention_probabilities", 1, 0)
    with pytest.raises(ValueError, match=r"attention_probabilities has an axis of keys.*no other reference prompt"):
        ablate(model, FRANCE, pattern, "resample", reference=[long])
    assert not runs
    monkeypatch.undo()
    drawn = ablate(model, FRANCE, pattern, "resample", reference=[long, ITALY])
    only = ablate(model, FRANCE, pattern, "resample", reference=[ITALY])
    assert torch.equal(drawn["scores"], only["scores"])


def test_the_fallback_on_memory_is_a_warning_that_names_the_sizes(toy, monkeypatch):
    from nnterp.interventions import _lens

    read, sizes = _lens._read, []

    def limited(model, batch, *rest):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(model, batch, *rest)

    monkeypatch.setattr(_lens, "_read", limited)
    with pytest.warns(UserWarning, match="Memory ran out with 2 rows in a batch; going on with 1"):
        logit_lens(toy, [FRANCE, ITALY], layers=[1])
    assert sizes == [2, 1, 1]
