"""A model that is not what was proven: proven anew with a warning, or refused."""

import copy
import json
import pickle
import re
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import nnterp
from nnterp import StandardizedTransformer
from nnterp.certificate import FILLED
from nnterp.errors import AnotherThreadError, CertificateError, ChangedModelError, ChangedModelWarning
from nnterp.rename_utils import get_vocab_size
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer

IDS = torch.arange(5, 13)[None]


def loaded(model_type, **options):
    return StandardizedTransformer(tiny_model(model_type, **options), tokenizer=tiny_tokenizer())


def reads_out(model):
    """Whether the last layer, projected on the vocabulary, is what HuggingFace gives; computed without nnsight."""
    hidden = model.collect(IDS, "layers_output", layers=[-1], progress=False)["layers_output"][0]
    with torch.no_grad():
        return torch.allclose(model.project_on_vocab(hidden), model._module(input_ids=IDS).logits, atol=1e-5)


def without_a_layer(module):
    module.model.layers = module.model.layers[:3]


def reversed_layers(module):
    module.model.layers = nn.ModuleList(list(module.model.layers)[::-1])


def another_mlp(module):
    module.model.layers[2].mlp = copy.deepcopy(module.model.layers[1].mlp)


def another_head(module):
    module.lm_head = nn.Linear(64, 600, bias=False)


def eager(module):
    module.set_attn_implementation("eager")


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.added = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + 0.1 * self.added(x)


def adapters(module):
    for layer in module.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)


CHANGES = [
    ("gemma2", lambda module: setattr(module.config, "final_logit_softcapping", None), "final_logit_softcapping"),
    ("cohere", lambda module: setattr(module, "logit_scale", 3.0), "logit_scale was 0.75 and is 3.0"),
    ("cohere", lambda module: setattr(module.config, "logit_scale", 3.0), "config.logit_scale"),
    ("granite", lambda module: setattr(module.model.layers[1], "residual_multiplier", 0.3), "residual_multiplier"),
    ("llama", without_a_layer, "model.layers is another module"),
    ("llama", reversed_layers, "model.layers is another module"),
    ("llama", another_mlp, "model.layers.2.mlp is another module"),
    ("llama", another_head, "lm_head is another module"),
    ("llama", eager, "is 'eager'"),
    ("llama", adapters, "an Adapter|a Adapter"),
]


@pytest.mark.parametrize(("model_type", "change", "what"), CHANGES)
def test_a_change_is_noticed_and_proven_anew(model_type, change, what):
    model = loaded(model_type)
    assert reads_out(model)
    change(model._module)
    with pytest.warns(ChangedModelWarning, match=what):
        assert reads_out(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangedModelWarning)
        assert reads_out(model)  # once
        assert model.validate().ok
    assert model.vocab_size == model._module(input_ids=IDS).logits.shape[-1]
    assert model.num_layers == len(model._module.get_submodule(model.anatomy.layers))


def test_a_change_is_noticed_by_a_trace_and_by_validate():
    model = loaded("llama")
    adapters(model._module)
    assert model.validate().ok
    another_mlp(model._module)
    with pytest.warns(ChangedModelWarning), torch.no_grad(), model.trace(IDS):
        made = model.layers[2].mlp.down_proj.base_layer.output.save()
        served = model.mlps_output[2].save()
    assert made.shape == served.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.model.layers.__setitem__(2, nn.Identity()),
        lambda module: module.model.layers.__setitem__(2, module.model.layers[1]),
        lambda module: module.compile(),
    ],
)
def test_what_cannot_be_proven_anew_is_refused_each_time(change):
    model = loaded("llama")
    change(model._module)
    for _ in range(2):
        with pytest.raises(ChangedModelError, match="changed since it was proven"):
            model.collect(IDS, "layers_output", progress=False)


def test_a_compiled_model_is_refused_as_such():
    with pytest.raises(TypeError, match=r"torch\.compile.*_orig_mod"):
        StandardizedTransformer(torch.compile(tiny_model("llama")), tokenizer=tiny_tokenizer())


def test_what_changes_no_name_is_no_change():
    model = loaded("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangedModelWarning)
        model._module.requires_grad_(False)
        model._module.config.pad_token_id = 3
        model._module.generate(IDS, max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            model._module.lm_head.weight.mul_(2)
        assert reads_out(model)
        model._module.to(torch.bfloat16)
        model.collect(IDS, "layers_output", progress=False)


def test_noticing_costs_little():
    model = loaded("llama", num_layers=32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        model.notice_changes()
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


# -- before the weights are there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        lambda module: torch.no_grad()(module.model.layers[3].mlp.down_proj.weight.zero_)(),
        lambda module: module.model.layers[3].mlp.down_proj.weight.data.zero_(),
        lambda module: setattr(module.model.layers[3].mlp.down_proj, "weight", nn.Parameter(torch.zeros(4, 4))),
        lambda module: setattr(module.config, "rms_norm_eps", 0.5),
        lambda module: setattr(module.model.layers[3], "mlp", nn.Identity()),
    ],
)
def test_an_edit_before_the_weights_are_loaded_is_not_lost_without_a_word(edit):
    model = StandardizedTransformer(nnterp.toy_checkpoint(), device_map="cpu")
    edit(model._module)
    with pytest.raises(ChangedModelError, match="before its weights were loaded"):
        model.collect("Hello", "layers_output", layers=[0])
    model.dispatch()
    assert model.certificate.ok


def test_looking_at_absent_weights_is_no_edit():
    model = StandardizedTransformer(nnterp.toy_checkpoint(), device_map="cpu")
    assert model.layers[3]._module.mlp.down_proj.weight.data.shape[0] == model.hidden_size
    with model.scan("Hello"):
        model.layers_output[1].save()
    model.support()
    model.dispatch()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_hidden_layers": 6}, "18 weights are not in the checkpoint and are random"),
        ({"num_hidden_layers": 3}, "9 weights of the checkpoint have no place"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "8 weights are not in the checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fill_its_config_fails(tmp_path, config, what):
    folder = tiny_checkpoint("llama", tmp_path)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))
    model = StandardizedTransformer(folder)
    with pytest.raises(CertificateError, match=re.escape(what)):
        model.dispatch()


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bloom", "opt", "mixtral", "phi"])
def test_a_whole_checkpoint_passes(tmp_path, model_type):
    model = StandardizedTransformer(tiny_checkpoint(model_type, tmp_path), dispatch=True)
    assert model.certificate[FILLED].status == "passed"


def test_fewer_layers_may_be_asked_for(tmp_path):
    model = StandardizedTransformer(tiny_checkpoint("llama", tmp_path), num_hidden_layers=2, dispatch=True)
    assert model.num_layers == 2
    assert "have no place in the model" in model.certificate[FILLED].detail


# -- threads and pickles -----------------------------------------------------------------------------------------------


def test_another_thread_is_refused_with_the_reason():
    model, started, done, refused = loaded("llama"), threading.Event(), threading.Event(), []

    def wait(_):
        started.set()
        done.wait(60)

    handle = model._module.model.layers[1].register_forward_hook(lambda *_: wait(_))

    def run():
        with torch.no_grad(), model.trace(IDS):
            model.logits.save()

    thread = threading.Thread(target=run, name="first")
    thread.start()
    assert started.wait(60)
    uses = (run, lambda: model.generate(IDS, max_new_tokens=1), lambda: model.collect(IDS, "logits"), model.support)
    for use in uses:
        try:
            use()
        except AnotherThreadError as error:
            refused.append("'first' is running this model" in str(error))
    handle.remove()
    done.set()
    thread.join()
    assert refused == [True] * len(uses)
    assert reads_out(model)  # the turn was given back


def test_threads_with_a_lock_get_the_right_numbers():
    model, lock, wrong = loaded("llama"), threading.Lock(), []
    right = [model.collect(IDS + k, "layers_output", progress=False)["layers_output"] for k in range(3)]

    def work(k):
        for _ in range(3):
            with lock:
                if not torch.equal(model.collect(IDS + k, "layers_output", progress=False)["layers_output"], right[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_pickle_is_refused_or_whole():
    model = loaded("llama")
    for refused in (model, model.layers_output, model.attentions):
        with pytest.raises(TypeError, match="save_pretrained"):
            pickle.dumps(refused)
    with pytest.raises(TypeError, match=r"model\.certificate"):
        pickle.dumps(model.facts)
    for whole in (model.certificate, model.anatomy, model.anatomy.sizes):
        assert pickle.loads(pickle.dumps(whole)) == whole


# -- sizes and loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [300, 700])
def test_the_vocabulary_is_as_wide_as_the_logits(width):
    module = tiny_model("marian", decoder_vocab_size=width)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.vocab_size == module(input_ids=IDS).logits.shape[-1] == get_vocab_size(module)


def test_layers_that_run_in_a_loop_are_told_by_running_them():
    class Loop(nn.ModuleList):
        def __getitem__(self, index):
            layers = list(self._modules.values())
            return [layers[i] for i in (0, 1, 2, 1, 2, 3)] if isinstance(index, slice) else layers[index]

    module = tiny_model("llama", use_cache=False)
    module.model.layers = Loop(module.model.layers)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.passes == (1, 2, 2, 1)
    assert model.anatomy.seams == ()  # each reads what the one before it wrote
