"""Labelled results: their labels, their figures, and what long runs show and hold."""

import pytest
import torch

from nnterp.interventions import (
    Component,
    Result,
    ablate,
    activation_patching,
    components,
    logit_difference,
    logit_lens,
    logit_lens_table,
    patchscope_table,
    path_patching,
)

CLEAN, CORRUPTED = [11, 42, 57, 93, 130, 200], [11, 42, 99, 93, 130, 201]


def test_shapes_and_labels_must_agree():
    with pytest.raises(ValueError, match=r"scores has shape \[2, 3\]"):
        Result({"scores": torch.zeros(2, 3)}, {"scores": ("a", "b")}, {"a": (0, 1), "b": (0, 1)})


def test_access_names_what_there_is():
    result = Result({"scores": torch.tensor([1.0, -3.0])}, {"scores": ("a",)}, {"a": ("x", "y")})
    assert result.values is result["scores"]
    with pytest.raises(KeyError, match="it has scores"):
        result["score"]
    assert result.top(5) == [{"a": "y", "scores": -3.0}, {"a": "x", "scores": 1.0}]
    assert repr(result).startswith("Result(scores [a 2]")


def test_a_row_names_one_layer_and_an_axis_many():
    result = Result(
        {"scores": torch.tensor([[1.0, -3.0]])}, {"scores": ("layers", "heads")}, {"layers": (4,), "heads": (0, 1)}
    )
    assert result.to_dataframe().to_dict("records") == [
        {"layer": 4, "head": 0, "scores": 1.0},
        {"layer": 4, "head": 1, "scores": -3.0},
    ]
    best = result.top(1)[0]
    assert best == {"layer": 4, "head": 1, "scores": -3.0}
    with pytest.warns(DeprecationWarning, match="key 'heads' .* use \"head\"") as told:
        assert best["heads"] == 1
    assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="key 'heads'"):
        assert best.get("heads", 0) == 1, "a default would be a wrong number"
    assert "heads" in best
    assert "positions" not in best
    assert best.get("positions", 5) == 5
    with pytest.raises(KeyError, match="positions"):
        best["positions"]


def test_a_notebook_shows_tensors_and_the_strongest_cells(tiny):
    result = Result(
        {"top_ids": torch.tensor([[7, 9]]), "scores": torch.tensor([[1.5, -3.00004]])},
        {"top_ids": ("prompts", "positions"), "scores": ("prompts", "positions")},
        {"prompts": ("<b>one</b>",), "positions": (0, 1)},
        tokens=(("a", " <i>"),),
        about={"function": "f", "model": "m"},
    )
    shown = result._repr_html_()
    assert "Result of f on m" in shown
    assert "prompts 1 × positions 2" in shown
    assert "<b>one</b>" not in shown
    assert "&lt;b&gt;one&lt;/b&gt;" in shown
    below = shown[shown.index("scores: the 2 of largest magnitude") :]
    assert below.index(">-3<") < below.index(">1.5<")
    lens = logit_lens_table(tiny("llama"), [CLEAN, CLEAN[:3]], 3)
    numbers = next(name for name, tensor in lens.tensors.items() if tensor.is_floating_point())
    assert f">{lens.top(1, numbers)[0][numbers]:.4g}<" in lens._repr_html_()


def test_figures(tiny):
    pytest.importorskip("nnterp.display")
    from plotly.graph_objects import Figure

    model = tiny("llama")
    metric = logit_difference(5, 9)
    results = [
        logit_lens_table(model, [CLEAN, CLEAN[:3]], 3),
        logit_lens(model, [CLEAN, CLEAN[:3]], top_k=2, targets=5, ranks=True),
        patchscope_table(model, [CLEAN, CORRUPTED], layers=[0, 2]),
        activation_patching(model, CLEAN, CORRUPTED, metric).normalized(),
        activation_patching(model, CLEAN, CORRUPTED, metric, "attention_head_outputs", heads="all"),
        ablate(model, CLEAN, Component("mlps_output", 1)),
        ablate(model, CLEAN, components(model, "attention_head_outputs", heads="all"), "mean", metric),
        path_patching(model, CLEAN, CORRUPTED, Component("mlps_output", 1), "logits", metric),
    ]
    for result in results:
        assert isinstance(result.plot(), Figure)


def test_batches_are_bounded(tiny):
    model = tiny("llama")
    sizes = []
    handle = model._module.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        activation_patching(model, [CLEAN] * 3, [CORRUPTED] * 3, logit_difference(5, 9), batch_size=5)
        logit_lens(model, [CLEAN] * 7, batch_size=5)
    finally:
        handle.remove()
    assert max(sizes) == 5


def test_progress_bars_can_be_turned_off(tiny, capsys):
    model = tiny("llama")
    logit_lens(model, [CLEAN], progress=True)
    activation_patching(model, CLEAN, CORRUPTED, logit_difference(5, 9), progress=True)
    shown = capsys.readouterr().err
    assert "logit lens" in shown
    assert "activation patching" in shown
    logit_lens(model, [CLEAN], progress=False)
    activation_patching(model, CLEAN, CORRUPTED, logit_difference(5, 9), progress=False)
    assert capsys.readouterr().err == ""
