"""A model of which a part is kept on disk and brought in layer by layer is proven and served like any other."""

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.interventions import activation_patching, logit_lens
from nnterp.testing import tiny_checkpoint
from nnterp.values import VALUES

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    placed = {"model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "disk"}
    near = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.3", "lm_head")
    offloaded = StandardizedTransformer(
        folder,
        device_map={**dict.fromkeys(near, "cpu"), **placed},
        offload_folder=str(tmp_path_factory.mktemp("offloaded")),
        enable_attention_probs=True,
    )
    offloaded.dispatch()
    whole = StandardizedTransformer(folder, enable_attention_probs=True)
    whole.dispatch()
    assert any(p.device.type == "meta" for p in offloaded._module.parameters()), "nothing was offloaded"
    return offloaded, whole


def test_every_line_holds(both):
    assert both[0].certificate.complete
    assert all(line.status == "passed" for line in both[0].certificate.lines)
    assert both[0].certificate.device == "cpu"


def test_every_value_is_the_same(both):
    offloaded, whole = both
    for name, value in VALUES.items():
        layers = whole.support()[name]
        assert offloaded.support()[name] == layers
        if not layers or not value.per_layer:
            continue
        found = []
        for model in both:
            with torch.no_grad(), model.trace(PROMPT):
                found.append(getattr(model, name)[2].save())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}")


def test_functions_give_the_same(both):
    offloaded, whole = both
    state = torch.randn(3, whole.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(offloaded.project_on_vocab(state), whole.project_on_vocab(state))
    assert torch.equal(logit_lens(offloaded, PROMPT), logit_lens(whole, PROMPT))
    corrupted = "The capital of Japan is"
    scores = [activation_patching(m, PROMPT, corrupted, lambda logits: logits[:, 7])["scores"] for m in both]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
