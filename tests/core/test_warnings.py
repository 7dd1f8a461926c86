"""The line that a warning shows is the user's, wherever in nnterp it comes from."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.interventions import logit_lens
from nnterp.prompts import Prompt, get_first_tokens
from nnterp.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def unproven():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), check_renaming=False)


def project(model):
    return model.project_on_vocab(model.layers_output[1])  # in a function


def outside(model):
    model.project_on_vocab(torch.zeros(1, 1, model.hidden_size))  # outside


def in_a_trace(model):
    with model.trace("a b"):
        hidden = model.layers_output[1]
        model.project_on_vocab(hidden).save()  # in a trace


def in_an_invoke(model):
    with model.trace() as tracer:
        with tracer.invoke("b a"):
            model.layers_output[1].save()
        with tracer.invoke("a b"):
            model.project_on_vocab(model.layers_output[1]).save()  # in an invoke


def in_a_function_of_the_block(model):
    with model.trace("a b"):
        project(model).save()


def in_a_trace_of_nnterp(model):
    logit_lens(model, "a b")  # in a trace of nnterp


def deprecated_in_a_trace(model):
    with model.trace("a b"):
        model.steer(layers=1, steering_vector=torch.zeros(model.hidden_size), positions=-1)  # deprecated


def through_a_decorator(model):
    ids = torch.tensor([[1, 2, model.tokenizer.pad_token_id], [1, 2, 3]])
    model.collect(ids, "layers_output")  # padding


def of_words(model):
    get_first_tokens(["b c", "b d"], model)  # words


def of_a_prompt(model):
    Prompt.from_strings("a", {"x": "b", "y": "b"}, model)  # prompt


@pytest.mark.parametrize(
    ("call", "marked"),
    [
        (outside, "# outside"),
        (in_a_trace, "# in a trace\n"),
        (in_an_invoke, "# in an invoke"),
        (in_a_function_of_the_block, "# in a function"),
        (in_a_trace_of_nnterp, "# in a trace of nnterp"),
        (deprecated_in_a_trace, "# deprecated"),
        (through_a_decorator, "# padding"),
        (of_words, "# words"),
        (of_a_prompt, "# prompt"),
    ],
)
def test_it_is_shown_at_the_user_s_line(unproven, call, marked):
    lines, first = inspect.getsourcelines(project if call is in_a_function_of_the_block else call)
    expected = next(first + i for i, line in enumerate(lines) if marked in line)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(unproven)
    said = [w for w in told if "nnterp" in str(w.category) or w.category in (UserWarning, DeprecationWarning)]
    assert said
    for warning in said:
        assert (warning.filename, warning.lineno) == (__file__, expected), warning.message


SCRIPT = """
import torch
from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer

model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), check_renaming=False)
vector = torch.zeros(model.hidden_size)
for _ in range(2):
    with model.trace("a b"):
        model.steer(layers=1, steering_vector=vector, positions=-1)
"""


def test_python_shows_what_is_deprecated_in_a_script_and_once_for_each_line(processes):
    """Python's own filters show a `DeprecationWarning` of `__main__` alone, also from inside a trace."""
    _, said, code = processes.run(SCRIPT)
    told = [line for line in said.splitlines() if "DeprecationWarning" in line and "nnterp" not in line.split(":")[0]]
    assert code == 0, said
    assert [line.split("/")[-1].partition(": use")[0] for line in told] == [
        "program.py:10: DeprecationWarning: `steer(positions=)` is deprecated and goes away in 3.0"
    ]
