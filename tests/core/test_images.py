"""Runs with an image: every image-text type of transformers, its tower and projector, and models that are wrong."""

from __future__ import annotations

import contextlib
from functools import cache

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from nnterp import StandardizedTransformer
from nnterp.errors import CertificateError, Unavailable, Unproven
from nnterp.inputs import encode
from nnterp.positions import at, image, resolve
from nnterp.testing import (
    image_model_types,
    model_types_without_images,
    tiny_checkpoint,
    tiny_image_inputs,
    tiny_model,
    tiny_tokenizer,
)

from ..conftest import transformers_is_older

NO_TOWER = {  # no list of layers with attention
    "emu3": "codes of a convolution",
    "fuyu": "one matrix",
    "gemma4_unified": "one matrix",
    "inkling_mm_model": "folded patches",
    "lfm3_vl": "mixers without a name of attention",
}
NO_PROJECTOR = {
    "apertus1p5": "an image becomes tokens",
    "deepseek_ocr2": "features of two views are put together",
    "emu3": "an image becomes tokens",
    "exaone4_5": "merged windows are put back in order",
    "granite4_vision": "features of several layers are spread over the stream",
    "kosmos-2.5": "features are scaled one by one",
    "llava_next": "rows of features get new lines between them",
    "llava_next_video": "rows of features get new lines between them",
    "llava_onevision": "rows of features get new lines between them",
    "mllama": "attended to",
    "molmo2": "features are added to what is embedded",
    "ovis2": "a table of visual words is read between the two",
    "qwen2_5_omni_thinker": "merged windows are put back in order",
    "qwen2_5_vl": "merged windows are put back in order",
    "qwen4_exp": "several streams enter layer 0",
    "unlimited_ocr": "rows of features get new lines between them",
}
NO_COPIES = {"hunyuan_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}
LINES = 9


@cache
def loaded(model_type):
    return StandardizedTransformer(tiny_model(model_type, images=True), tokenizer=tiny_tokenizer())


def test_the_mapping_is_partitioned():
    built, not_built = set(image_model_types()), model_types_without_images()
    assert built.isdisjoint(not_built)
    assert built | set(not_built) == set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert len(built) >= 70 or transformers_is_older()
    assert len(built) >= 0.7 * len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert all(not_built.values())
    with pytest.raises(KeyError, match="blip"):
        tiny_model("blip", images=True)


@pytest.mark.parametrize("model_type", image_model_types())
def test_runs_with_an_image_are_proven(model_type):
    """On text when it is loaded, and with an image."""
    model = StandardizedTransformer(tiny_model(model_type, images=True), tokenizer=tiny_tokenizer())
    assert model.certificate.ok
    prompt = tiny_image_inputs(model._module)
    certificate = model.validate_images(prompt)
    assert certificate.ok, str(certificate)
    assert len(certificate.lines) == LINES
    skipped = {line.name.partition(",")[0] for line in certificate.lines if line.status == "skipped"}
    vision = model.facts.vision
    assert (not vision.layers) == (model_type in NO_TOWER)
    assert (vision.projector is None) == (model_type in NO_PROJECTOR)
    assert (not vision.copies) == (model_type in NO_COPIES)
    assert len(skipped) <= 3
    with torch.no_grad():
        expected = model._module(**prompt).logits
        with model.trace(prompt):
            logits = model.logits.save()  # without gradients too: attention has another kernel with them
    torch.testing.assert_close(logits, expected)


def returned(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@contextlib.contextmanager
def hooked(module, function):
    """`function` of what a module returns; what it returns, unless None, replaces it, before transformers keeps it."""

    def hook(_, args, output):
        new = function(returned(output))
        if new is None:
            return None
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


# Where HuggingFace's code has the layers of the tower, their attention, and the projector.
TOWERS = {
    "llava": ("model.vision_tower.encoder.layers", "self_attn", "model.multi_modal_projector"),
    "qwen2_vl": ("model.visual.blocks", "attn", "model.visual.merger"),
    "qwen3_vl": ("model.visual.blocks", "attn", "model.visual.merger"),
    "gemma3": ("model.vision_tower.encoder.layers", "self_attn", "model.multi_modal_projector"),
    "mllama": ("model.vision_model.transformer.layers", "self_attn", None),
}


@pytest.mark.parametrize("model_type", TOWERS)
def test_values_of_the_tower_equal_plain_hooks(model_type):
    model = loaded(model_type)
    layers, attention, projector = TOWERS[model_type]
    prompt, module = tiny_image_inputs(model._module), model._module
    stack = module.get_submodule(layers)
    model.validate_images(prompt)
    assert model.num_vision_layers == len(model.vision_layers_output) == len(stack) == 3
    kept = {}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for i, layer in enumerate(stack):
            hooks.enter_context(hooked(layer, lambda x, i=i: kept.__setitem__(("layer", i), x.clone())))
            own = layer.get_submodule(attention)
            hooks.enter_context(hooked(own, lambda x, i=i: kept.__setitem__(("attention", i), x.clone())))
        if projector:
            hooks.enter_context(
                hooked(module.get_submodule(projector), lambda x: kept.__setitem__("features", x.clone()))
            )
        module(**prompt)
    with model.trace(prompt):
        first = model.vision_layers_input[1].save()
        attended = model.vision_attentions_output[1].save()
        left = model.vision_layers_output[1].save()
        if projector:
            features = model.image_features.save()
    torch.testing.assert_close(first, kept["layer", 0])
    torch.testing.assert_close(attended, kept["attention", 1])
    torch.testing.assert_close(left, kept["layer", 1])
    if projector:
        torch.testing.assert_close(features, kept["features"])
    with model.trace(prompt):
        model.vision_layers_output[0] = model.vision_layers_output[0] * 1.5
        model.vision_attentions_output[1] = model.vision_attentions_output[1].flip(-1)
        if projector:
            model.image_features = model.image_features + 0.5
        logits = model.logits.save()
    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(hooked(stack[0], lambda x: x * 1.5))
        hooks.enter_context(hooked(stack[1].get_submodule(attention), lambda x: x.flip(-1)))
        if projector:
            hooks.enter_context(hooked(module.get_submodule(projector), lambda x: x + 0.5))
        expected = module(**prompt).logits
    torch.testing.assert_close(logits, expected)
    with torch.no_grad():
        assert not torch.allclose(logits, module(**prompt).logits, atol=1e-2)


def test_values_of_images_without_an_image():
    model = StandardizedTransformer(tiny_model("llava"), tokenizer=tiny_tokenizer())
    with pytest.raises(Unproven, match="validate_images"), model.trace("The cat"):
        model.vision_layers_output[0].save()
    assert not model.support().available("vision_layers_output")
    model.validate_images(tiny_image_inputs(model._module))
    assert model.support()["vision_layers_output"] == (0, 1, 2)
    with pytest.raises(IndexError, match="3 layers"), model.trace(tiny_image_inputs(model._module)):
        model.vision_layers_output[3].save()
    with pytest.raises(ValueError, match="read it in a trace"):
        model.collect(tiny_image_inputs(model._module), "image_features")
    crossed = loaded("mllama")
    crossed.validate_images(tiny_image_inputs(crossed._module))
    with pytest.raises(Unavailable, match="attends to the image"):
        crossed.place("image_features")


def test_positions_of_an_image():
    model = loaded("llava")
    row, twice = encode(model, [tiny_image_inputs(model._module), [5, 9, 12]], images=True)
    assert resolve(model, row, image()) == tuple(range(4, 20))
    assert resolve(model, row, [image(0), -1]) == (*range(4, 20), 24)
    with pytest.raises(ValueError, match="1 runs"):
        resolve(model, row, image(1))
    with pytest.raises(ValueError, match="no image tokens"):
        resolve(model, twice, image())
    with pytest.raises(TypeError, match="image"):
        image("first")
    with pytest.raises(ValueError, match="only token ids"):
        resolve(model, row, at("cat"))


def test_a_processor_makes_prompts_of_pairs():
    """A processor is whatever gives the tensors of a text and its images."""
    module = tiny_model("llava", images=True)

    def processor(text, images, return_tensors):
        assert return_tensors == "pt"
        own = tiny_tokenizer()(text).input_ids
        return tiny_image_inputs(module, ids=tuple(own)) | {"pixel_values": images[None]}

    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), processor=processor)
    picture = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(4))
    given = processor("What is this?", picture, "pt")
    with torch.no_grad():
        expected = module(**given).logits
    with model.trace(("What is this?", picture)):
        logits = model.logits.save()
    torch.testing.assert_close(logits, expected)
    found = model.collect([("What is this?", picture), given], "logits")["logits"]
    torch.testing.assert_close(found, expected.expand(2, -1, -1).float())


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])
def test_a_trace_passes_positions_on(model_type):
    model = loaded(model_type)
    prompt = tiny_image_inputs(model._module)
    prompt["position_ids"] = torch.arange(prompt["input_ids"].shape[1])[None] * 2 + 3
    with torch.no_grad():
        expected = model._module(**prompt).logits
    with model.trace(prompt):
        logits = model.logits.save()
    torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="position_ids of the encoding are not"):
        model.collect(prompt, "logits")


def test_what_runs_no_images_says_so(tmp_path):
    model = loaded("llava")
    prompt = tiny_image_inputs(model._module)
    listed = prompt | {"input_ids": prompt["input_ids"].tolist()}
    with torch.no_grad():
        expected = model._module(**prompt).logits
    with model.trace(listed):
        logits = model.logits.save()
    torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="was given a list: trace them one by one"), model.trace([prompt, prompt]):
        pass
    without_mask = {name: tensor for name, tensor in prompt.items() if name != "attention_mask"}
    for given in (prompt, [prompt, without_mask], (one for one in [without_mask])):
        with pytest.raises(TypeError, match="has an image, and this function runs texts"):
            model.collect(given, "layers_output", to=tmp_path / "out", progress=False)


def test_encodings_of_texts_are_stored(tmp_path):
    """As a tokenizer gives each: ids `[1, seq]`, with a mask or without."""
    model, ids = loaded("llava"), torch.tensor([[5, 9, 12]])
    given = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids}]
    stored = model.collect(given, "layers_output", layers=[1], to=tmp_path / "out", progress=False)
    expected = model.collect(ids, "layers_output", layers=[1])["layers_output"].reshape(3, -1)
    found = torch.as_tensor(stored["layers_output", 1][:])
    torch.testing.assert_close(found, expected.repeat(2, 1))


# -- models that are wrong with an image, and right on text ------------------------------------------------------------


def pixels_of(module):
    """Where the pixels of the forward pass that runs are kept; None in one on a text."""
    seen = {}
    module.register_forward_pre_hook(lambda m, a, kwargs: seen.update(now=kwargs.get("pixel_values")), with_kwargs=True)
    return lambda: seen.get("now")


def text_layers(module):
    return module.model.language_model.layers


def blind(module, pixels):
    module.model.multi_modal_projector.register_forward_hook(lambda m, a, out: out * 0)


def leaks_into_the_text(module, pixels):
    def leak(m, args, kwargs):
        if pixels() is None:
            return None
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + pixels().mean()}

    module.model.language_model.register_forward_pre_hook(leak, with_kwargs=True)


def head_sees_pixels(module, pixels):
    module.register_forward_hook(
        lambda m, a, out: type(out)(**{**out, "logits": out.logits + pixels().mean()}) if pixels() is not None else out
    )


def adds_between_layers(module, pixels):
    def add(m, args, kwargs):
        return None if pixels() is None else ((args[0] + 0.3, *args[1:]), kwargs)

    text_layers(module)[2].register_forward_pre_hook(add, with_kwargs=True)


WRONG = {
    blind: "enters the stream",
    leaks_into_the_text: "enters the stream",
    head_sees_pixels: "project_on_vocab",
    adds_between_layers: "each layer reads",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
@pytest.mark.parametrize("model_type", ["llava", "aya_vision", "gemma3", "mistral3"])
def test_wrong_models_are_refused(model_type, change):
    module = tiny_model(model_type, images=True)
    change(module, pixels_of(module))
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.certificate.ok
    prompt = tiny_image_inputs(module)
    certificate = model.validate_images(prompt)
    assert WRONG[change] in certificate.failures[0].name
    assert model.facts.vision is None
    for run in (lambda: model.collect(prompt, "layers_output"), lambda: model.trace(prompt)):
        with pytest.raises(CertificateError):
            run()


def late_nonlinearity(module):
    """What the projector returns is changed on its way to the stream."""
    make = module.model.get_image_features

    def changed(*args, **kwargs):
        made = make(*args, **kwargs)
        made.pooler_output = [features.tanh() for features in made.pooler_output]
        return made

    module.model.get_image_features = changed


def test_a_projector_whose_output_is_changed_on_the_way_is_not_served():
    module = tiny_model("llava", images=True)
    late_nonlinearity(module)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.validate_images(tiny_image_inputs(module)).ok
    with pytest.raises(Unavailable, match="no module returns"):
        model.place("image_features")


def test_a_tower_that_runs_in_another_order_is_not_served():
    module = tiny_model("llava", images=True)
    tower = module.model.vision_tower.encoder
    run = list(tower.layers)
    tower.layers = torch.nn.ModuleList([run[0], run[2], run[1]])
    order = [run[0], run[1], run[2]]
    type_forward = type(tower).forward

    def forward(inputs_embeds, *args, **kwargs):
        tower.layers._modules, kept = {str(i): layer for i, layer in enumerate(order)}, tower.layers._modules
        try:
            return type_forward(tower, inputs_embeds, *args, **kwargs)
        finally:
            tower.layers._modules = kept

    tower.forward = forward
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.validate_images(tiny_image_inputs(module)).ok
    with pytest.raises(Unavailable, match="is not given what"):
        model.place("vision_layers_output", 0)


def test_loading_is_silent_about_the_task(tmp_path, caplog):
    """transformers would list hundreds of classes, because nnsight asks for text generation."""
    from transformers import AutoModelForImageTextToText
    from transformers.pipelines.base import logger

    folder = tiny_checkpoint("llava", tmp_path)
    logger.addHandler(caplog.handler)
    try:
        StandardizedTransformer(folder, automodel=AutoModelForImageTextToText).dispatch()
        StandardizedTransformer(tiny_model("llava"), tokenizer=tiny_tokenizer())
    finally:
        logger.removeHandler(caplog.handler)
    assert "text-generation" not in caplog.text
