"""Skipping a layer, on every architecture, equals the model whose layer hands its input on."""

import pytest
import torch

from nnterp.errors import Unavailable
from nnterp.testing import model_types, tiny_model

from ..looped_modeling import LOOPED
from .test_certificate_zoo import REFUSED

IDS = torch.arange(20, 32)[None]

# Layers that hand on a state of their own beside the stream: compared with the model from which the layer is removed,
# or which is told by hand what the layer hands on.
STATEFUL = {"rwkv", "xlstm", "zaya"}
LENDERS = {"gemma3n_text": {0, 1}, "hy_v4": {1}}
IDLE = {"mllama": {1, 3}}


@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in {*REFUSED, *LOOPED, *STATEFUL}])
def test_skipping_equals_handing_the_input_on(model_type, tiny):
    model = tiny(model_type)
    module = model._module
    layers = set(range(model.num_layers)) - LENDERS.get(model_type, set()) - IDLE.get(model_type, set())
    for layer in sorted(layers)[:: max(1, len(layers) // 2)]:
        block = module.get_submodule(model.anatomy.blocks[layer].path)

        def hand_on(_, args, kwargs, output):
            stream = args[0] if args else kwargs["hidden_states"]
            return stream if isinstance(output, torch.Tensor) else type(output)((stream, *output[1:]))

        handle = block.register_forward_hook(hand_on, with_kwargs=True)
        with torch.no_grad():
            expected = module(input_ids=IDS).logits
        handle.remove()
        with torch.no_grad(), model.trace(IDS):
            model.skip_layer(layer)
            skipped = model.logits.save()
        torch.testing.assert_close(skipped, expected)
        with torch.no_grad():
            assert (module(input_ids=IDS).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["rwkv", "xlstm"])
def test_skipping_a_recurrent_layer_equals_removing_it(model_type, tiny):
    model = tiny(model_type)
    for layer in range(1, model.num_layers):
        shorter = tiny_model(model_type)
        del shorter.get_submodule(model.anatomy.layers)[layer]
        shorter.config.num_hidden_layers -= 1
        with torch.no_grad():
            expected = shorter(input_ids=IDS, use_cache=False).logits
            with model.trace(IDS):
                model.skip_layer(layer)
                skipped = model.logits.save()
        torch.testing.assert_close(skipped, expected)


def test_skipping_hands_a_routers_state_on(tiny):
    model = tiny("zaya")
    for layer, block in enumerate(model._module.model.layers):
        handle = block.register_forward_hook(lambda m, args, output: (args[0], args[1]))
        with torch.no_grad():
            expected = model._module(input_ids=IDS).logits
        handle.remove()
        with torch.no_grad(), model.trace(IDS):
            model.skip_layer(layer)
            skipped = model.logits.save()
        torch.testing.assert_close(skipped, expected)


@pytest.mark.parametrize(("model_type", "layers"), LENDERS.items())
def test_a_layer_that_others_borrow_from_is_not_skipped_alone(model_type, layers, tiny):
    model = tiny(model_type)
    for layer in layers:
        with pytest.raises(Unavailable, match=f"Layer {layer} .* cannot be skipped alone"), model.trace(IDS):
            model.skip_layer(layer)
    with torch.no_grad(), model.trace(IDS):
        model.skip_layers(min(layers), model.num_layers - 1)
        logits = model.logits.save()
    assert logits.isfinite().all()


def test_skipping_works_while_generating(tiny):
    model = tiny("llama")
    module = model._module
    handle = module.model.layers[1].register_forward_hook(lambda m, args, output: args[0])
    expected = module.generate(IDS, max_new_tokens=4, do_sample=False)
    handle.remove()
    with model.generate(IDS, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:4]:
            model.skip_layer(1)
        generated = tracer.result.save()
    assert generated.tolist() == expected.tolist()
