"""What makes a run another one: arguments, code, model and weights. A checkpoint of another run is not taken up."""

import copy
import functools
import os
import runpy
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.identity import checksum, checksum_of_tensors, digest, parts_of_function
from nnterp.interventions import logit_lens
from nnterp.prompts import IncompleteRunError, Prompt, PromptResults, next_token_probs, run_prompts
from nnterp.testing import tiny_model, tiny_tokenizer

TEXTS = ["The capital of France is", "The", "One", "Paris, Rome and"]


def make(model):
    return [Prompt.from_strings(text, {"target": "Paris", "other": ["London", "Madrid"]}, model) for text in TEXTS]


def fresh(model_type="gpt2"):
    return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer())


def run(model, function=None, kwargs=None, **options):
    return run_prompts(model, make(model), 2, function, kwargs, tqdm=None, **options)


def same_run(folder, model, function=None, kwargs=None):
    """Run with a checkpoint that is complete: nothing may be computed."""
    handle = model._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        return run(model, function, kwargs, checkpoint=folder)
    finally:
        handle.remove()


def other_run(folder, match, model, function=None, kwargs=None):
    for ways in ({"checkpoint": folder}, {"resume": folder}, {"resume": PromptResults.load(folder)}):
        with pytest.raises(ValueError, match=f"Cannot resume: .*{match}") as info:
            run(model, function, kwargs, **ways)
        assert not isinstance(info.value, IncompleteRunError)


@pytest.fixture
def gpt2(tiny):
    return tiny("gpt2")


# -- arguments ---------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    layer: int
    names: frozenset = frozenset({"a", "b", "c"})


class Slots:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


def linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 3)


def big(value):
    tensor = torch.arange(100_000.0)
    tensor[54_321] += value
    return tensor


VALUES = {
    "a list": ([0], [1]),
    "a tuple": ((0, 1), (1, 0)),
    "a number": (0, 1),
    "a truth value": (1, True),
    "a text": ("a", "b"),
    "a long text": ("a" * 300 + "b", "a" * 300 + "c"),
    "nested": ({"a": [1, {2: 3}]}, {"a": [1, {2: 4}]}),
    "a set": ({"a", "b"}, {"a", "c"}),
    "a slice": (slice(0, 3), slice(0, 4)),
    "NaN": (float("nan"), float("inf")),
    "a tensor": (torch.arange(5.0), torch.arange(5.0).flip(0)),
    "one number of a tensor": (big(0), big(1)),
    "a dtype": (torch.float32, torch.float64),
    "a shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "an array": (np.arange(4), np.arange(4)[::-1].copy()),
    "bfloat16": (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)),
    "an object": (Choice(0), Choice(1)),
    "slots": (Slots(0), Slots(1)),
    "a module": (linear(0), linear(1)),
    "a function": (lambda x: x + 1, lambda x: x + 2),
    "a partial": (functools.partial(max, 1), functools.partial(max, 2)),
}


def taking(model, prompts, remote=False, value=None):
    return next_token_probs(model, prompts)


@pytest.mark.parametrize(("first", "second"), VALUES.values(), ids=VALUES)
def test_arguments_of_the_function(gpt2, tmp_path, first, second):
    results = run(gpt2, taking, {"value": first}, checkpoint=tmp_path)
    again = same_run(tmp_path, gpt2, taking, {"value": copy.deepcopy(first)})
    assert torch.equal(again.log_probs, results.log_probs)
    other_run(tmp_path, r"func_kwargs\['value'\]", gpt2, taking, {"value": second})
    other_run(tmp_path, r"func_kwargs\['value'\]", gpt2, taking)
    other_run(tmp_path, r"argument 'value'", gpt2, functools.partial(taking, value=first))


def test_layers_of_a_lens(gpt2, tmp_path):
    """The folder of a run over one layer does not answer for another; each equals its column of the whole lens."""
    whole = run(gpt2, logit_lens)["target"]
    for layer in range(gpt2.num_layers):
        results = run(gpt2, logit_lens, {"layers": [layer]}, checkpoint=tmp_path / str(layer))
        assert (results["target"][:, 0] - whole[:, layer]).abs().max() < 1e-6
    other_run(
        tmp_path / "0", r"func_kwargs\['layers'\] = '\[0\].*this run has '\[1\]", gpt2, logit_lens, {"layers": [1]}
    )
    partials = [functools.partial(logit_lens, layers=[layer]) for layer in (0, 1)]
    run(gpt2, partials[0], checkpoint=tmp_path / "partial")
    same_run(tmp_path / "partial", gpt2, functools.partial(logit_lens, layers=[0]))
    other_run(tmp_path / "partial", r"argument 'layers' of get_probs_func = '\[0\]", gpt2, partials[1])
    other_run(tmp_path / "partial", "argument 'layers'", gpt2, functools.partial(partials[0], layers=[1]))
    other_run(tmp_path / "partial", "get_probs_func='logit_lens'", gpt2, next_token_probs)
    other_run(tmp_path / "partial", "get_probs_func='logit_lens'", gpt2)


# -- code --------------------------------------------------------------------------------------------------------------

BODY = """
from nnterp.prompts import next_token_probs

FACTOR = {factor}
TABLE = dict(a=[1, 2])

def helper(values):
    return values {operation}

def deep(values):
    return helper(values)

def function(model, prompts, remote=False, *, keyword={keyword}, default=0):
    "{text}"
    values = deep(next_token_probs(model, prompts))
    assert "a" in {{"c", "b", "a"}} and TABLE
    return values * FACTOR
"""
AS_IT_IS = {"factor": 1, "operation": "* 1", "keyword": "[0]", "text": "A docstring."}


def written(**changes):
    """A function out of a module of its own."""
    module = types.ModuleType("written")
    exec(BODY.format(**{**AS_IT_IS, **changes}), module.__dict__)
    return module.function


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"factor": 1.0}, "global variable 'FACTOR' of get_probs_func = 1, and this run has 1.0"),
        ({"operation": "* 1.0"}, "code of 'helper' of 'deep' of get_probs_func"),
        ({"keyword": "[1]"}, "default of 'keyword' of get_probs_func"),
        ({"text": "Another."}, "code of get_probs_func"),
    ],
)
def test_code_of_the_function(gpt2, tmp_path, changes, match):
    run(gpt2, written(), checkpoint=tmp_path)
    same_run(tmp_path, gpt2, written())
    other_run(tmp_path, match, gpt2, written(**changes))


def over(layer):
    def function(model, prompts, remote=False):
        return logit_lens(model, prompts, layers=layer)

    return function


def with_default(layer):
    def function(model, prompts, remote=False, layer=layer):
        return logit_lens(model, prompts, layers=layer)

    return function


class Method:
    def __init__(self, layer):
        self.layer = layer

    def read(self, model, prompts, remote=False):
        return logit_lens(model, prompts, layers=self.layer)

    def __call__(self, model, prompts, remote=False):
        return logit_lens(model, prompts, layers=self.layer)


@pytest.mark.parametrize(("maker", "match"), [(over, "variable 'layer'"), (with_default, "default 1")])
def test_closure_and_defaults(gpt2, tmp_path, maker, match):
    wanted = run(gpt2, logit_lens)["target"]
    run(gpt2, maker([0]), checkpoint=tmp_path)
    found = same_run(tmp_path, gpt2, maker([0]))
    assert (found["target"][:, 0] - wanted[:, 0]).abs().max() < 1e-6
    other_run(tmp_path, match, gpt2, maker([1]))


@pytest.mark.parametrize("maker", [Method, lambda layer: Method(layer).read], ids=["object", "method"])
def test_attributes_of_an_object_are_named_in_a_warning(gpt2, tmp_path, maker):
    """They may be counters or caches, so they do not make it another run."""
    run(gpt2, maker([0]), checkpoint=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_run(tmp_path, gpt2, maker([0]))
    with pytest.warns(UserWarning, match=r"attribute 'layer' of get_probs_func = '\[0\].*start anew") as caught:
        same_run(tmp_path, gpt2, maker([1]))
    assert caught[0].filename == __file__


def test_a_module_that_is_called(gpt2, tmp_path):
    class Probe(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([value]))

        def forward(self, model, prompts, remote=False):
            return next_token_probs(model, prompts)

    run(gpt2, Probe(0.0), checkpoint=tmp_path)
    same_run(tmp_path, gpt2, Probe(0.0))
    other_run(tmp_path, "weights of get_probs_func", gpt2, Probe(1.0))


# -- what the run itself changes ---------------------------------------------------------------------------------------

COUNT = [0]


def counting(at, calls=()):
    """Functions that count their calls, in a closure and in a global variable; the one numbered `at` fails."""
    calls = list(calls)

    def closure(model, prompts, remote=False):
        calls.append(len(prompts))
        if len(calls) == at:
            raise ValueError("no")
        return next_token_probs(model, prompts)

    def outside(model, prompts, remote=False):
        COUNT[0] += 1
        if COUNT[0] == at:
            raise ValueError("no")
        return next_token_probs(model, prompts)

    return closure, outside


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("renewed", [False, True])
def test_counters_are_no_arguments(gpt2, tmp_path, which, renewed):
    """A run that broke off is resumed by the same function, in the same process or (counting anew) in another."""
    COUNT[0] = 0
    function = counting(2)[which]
    with pytest.raises(IncompleteRunError) as info:
        run(gpt2, function, checkpoint=tmp_path)
    for resume in (info.value.partial, tmp_path):
        if renewed:
            COUNT[0] = 7
            function = counting(2, [0] * 7)[which]
        results = run(gpt2, function, resume=resume)
        assert (results["target"] - run(gpt2)["target"]).abs().max() < 1e-6


def decorated(layer, calls):
    """A counter and an argument side by side, in a decorated function."""

    @torch.no_grad()
    def function(model, prompts, remote=False):
        calls.append(1)
        return logit_lens(model, prompts, layers=layer)

    return function


def test_a_counter_hides_no_argument(gpt2, tmp_path):
    calls = []
    run(gpt2, decorated([0], calls), checkpoint=tmp_path)
    assert calls
    same_run(tmp_path, gpt2, decorated([0], []))
    other_run(tmp_path, r"variable 'layer' of variable 'func' of get_probs_func = '\[0\]", gpt2, decorated([1], calls))


LAYER = [0]


class ByGlobal:
    def __call__(self, model, prompts, remote=False):
        return logit_lens(model, prompts, layers=LAYER)


class ByGlobalModule(torch.nn.Module):
    def forward(self, model, prompts, remote=False):
        return logit_lens(model, prompts, layers=LAYER)


@pytest.mark.parametrize("kind", [ByGlobal, ByGlobalModule, lambda: ByGlobal().__call__])
def test_global_variables_of_callable_objects(gpt2, tmp_path, monkeypatch, kind):
    run(gpt2, kind(), checkpoint=tmp_path)
    same_run(tmp_path, gpt2, kind())
    monkeypatch.setitem(globals(), "LAYER", [1])
    other_run(tmp_path, r"global variable 'LAYER' of get_probs_func = '\[0\]", gpt2, kind())


# -- the model ---------------------------------------------------------------------------------------------------------


def nudge(model):
    weight = model._module.transformer.h[1].mlp.c_fc.weight
    weight[17, 33] = torch.nextafter(weight[17, 33], weight[17, 33] + 1)


def swap(model):
    weight = model._module.transformer.h[1].mlp.c_fc.weight
    weight[[0, 1]] = weight[[1, 0]]


def bias(model):
    model._module.transformer.ln_f.bias[-1] += 1


def buffer(model):
    model._module.register_buffer("more", torch.ones(3))


def dtype(model):
    model._module.to(torch.bfloat16)


def config(model):
    model._module.config.layer_norm_epsilon *= 2


def revision(model):
    model.revision = "other"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (nudge, "weights="),
        (swap, "weights="),
        (bias, "weights="),
        (buffer, "weights="),
        (dtype, "dtype='torch.float32', and this run has 'torch.bfloat16'"),
        (config, "config="),
        (revision, "revision=None, and this run has 'other'"),
    ],
)
@pytest.mark.parametrize("function", [None, logit_lens])
def test_another_model(tmp_path, change, match, function):
    run(fresh(), function, checkpoint=tmp_path)
    model = fresh()
    same_run(tmp_path, model, function)
    with torch.no_grad():
        change(model)
    other_run(tmp_path, match, model, function)


def test_an_edited_model(tmp_path):
    model = fresh()
    results = run(model, checkpoint=tmp_path / "plain")
    strength = 3.0
    with model.edit() as (_, edited):
        edited.layers_output[0] = edited.layers_output[0] * strength
    changed = run(edited, checkpoint=tmp_path / "edited")
    assert (changed["target"] - results["target"]).abs().max() > 1e-4
    same_run(tmp_path / "plain", model)
    same_run(tmp_path / "edited", edited)
    other_run(tmp_path / "plain", "edits=", edited)
    other_run(tmp_path / "edited", "edits=", model)
    strength = 4.0
    with model.edit() as (_, stronger):
        stronger.layers_output[0] = stronger.layers_output[0] * strength
    other_run(tmp_path / "edited", "edits=", stronger)


def test_weights_that_are_loaded_late(tmp_path):
    """A model that is not loaded yet is the same as one that is."""
    import nnterp

    late = StandardizedTransformer(nnterp.toy_checkpoint(), allow_dispatch=False)
    assert not late.dispatched
    run(late, checkpoint=tmp_path)
    loaded = StandardizedTransformer(nnterp.toy_checkpoint())
    loaded.dispatch()
    same_run(tmp_path, loaded)
    with torch.no_grad():
        loaded._module.model.layers[3].mlp.down_proj.weight.zero_()
    other_run(tmp_path, "weights=", loaded)


def test_results_that_do_not_say_how_they_were_made(gpt2):
    results = run(gpt2)
    for key in ("function", "revision", "dtype", "config", "edits", "weights"):
        del results.settings[key]
    with pytest.raises(ValueError, match="did not record"):
        run(gpt2, resume=results)


# -- digests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba", "mixtral", "gemma3n_text"])
def test_checksum_sees_every_parameter(model_type):
    module = tiny_model(model_type)
    before = checksum(module)
    assert checksum(tiny_model(model_type)) == before
    for name, parameter in module.named_parameters():
        flat = parameter.data.view(-1)
        at = len(flat) * 2 // 3
        kept = flat[at].clone()
        flat[at] += 1
        assert checksum(module) != before, name
        flat[at] = kept
    assert checksum(module) == before


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_checksum_of_any_dtype(dtype):
    tensor = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).to(dtype)
    other = tensor.clone()
    other[1, 2] = 1

    def of(value):
        return checksum_of_tensors([("a", value)])

    assert of(tensor) == of(tensor.clone()) == of(tensor.t().contiguous().t())
    assert of(tensor[:, 1:4]) == of(tensor[:, 1:4].clone())
    seen = [of(t) for t in (tensor, other, tensor[:, :4], tensor.view(-1), tensor[0], tensor[0, 0], tensor[:0])]
    assert len(set(seen)) == len(seen)
    sparse = torch.eye(4)
    assert of(sparse.to_sparse()) == of(sparse)


def test_digests_are_the_same_in_every_process(tmp_path, capsys):
    """Whatever order sets have there."""
    program = tmp_path / "program.py"
    program.write_text(
        "import functools, string, torch\n"
        "from nnterp.interventions import logit_lens\n"
        "from nnterp.identity import digest\n"
        "from nnterp.identity import parts_of_function\n"
        f"exec({BODY.format(**AS_IT_IS)!r})\n"
        "letters = {*string.ascii_letters}\n"
        "values = [letters, {'x': {1, 2}, 'y': frozenset('abc')}, logit_lens, function, torch.arange(3)]\n"
        "print([digest(value) for value in values], parts_of_function(functools.partial(logit_lens, layers=[1])))\n"
        "print(*letters)\n"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    elsewhere = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    runpy.run_path(str(program), run_name="__main__")
    here = capsys.readouterr().out.splitlines()
    assert len(here) == 2
    assert here[1] != elsewhere[1], "sets have the same order in the two processes"
    assert here[0] == elsewhere[0]


def test_values_that_hold_themselves_or_cannot_be_pickled():
    import threading

    loop = [1]
    loop.append(loop)
    other = [2]
    other.append(other)
    assert digest(loop) != digest(other)
    assert digest(threading.Lock()) == digest(threading.Lock())
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert digest(deep)

    def recursive(n):
        return recursive(n - 1) if n else loop

    assert parts_of_function(recursive)["code"]
