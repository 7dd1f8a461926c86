"""The code of nnterp's two published texts, as printed there: the 1.2.2 README and the NDIF integration post.

Only model ids are replaced: by the folder of a random GPT-2 of the same depth, and by the toy checkpoint where a
trained model has to know something. Each result is held against plain HuggingFace with plain torch hooks.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nnterp
from nnterp import StandardizedTransformer
from nnterp.testing import tiny_checkpoint

EXACT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder that stands for the hub id "gpt2"."""
    return str(tiny_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2"), num_layers=12))


@pytest.fixture(scope="module")
def model(gpt2):
    return StandardizedTransformer(gpt2)


class Plain:
    """The same checkpoint in HuggingFace alone."""

    def __init__(self, folder: str) -> None:
        self.module = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, prompt: str):
        return self.module(**self.tokenizer(prompt, return_tensors="pt"), output_hidden_states=True)

    def unembed(self, hidden):
        return self.module.lm_head(self.module.transformer.ln_f(hidden))

    @contextmanager
    def hooked(self, **edits):
        """`layer_3=edit`: what layer 3 returns is replaced by `edit(it)`."""
        handles = [
            self.module.transformer.h[int(name.removeprefix("layer_"))].register_forward_hook(
                lambda _module, _args, output, edit=edit: edit(output)
            )
            for name, edit in edits.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module")
def plain(gpt2):
    return Plain(gpt2)


class TestReadme:
    """The README of nnterp 1.2.2, block by block."""

    def test_load_and_access(self, gpt2, plain):
        from nnterp import StandardizedTransformer

        model = StandardizedTransformer(gpt2)  # or "meta-llama/Llama-2-7b-hf", etc.

        with model.trace("The Eiffel Tower is in the city of"):
            # Unified interface across all models (must follow forward pass order!)
            attention_output = model.attentions_output[3]
            mlp_output = model.mlps_output[3]
            layer_5_output = model.layers_output[5]

            # Built-in utilities
            logits = model.logits.save()

            _ = attention_output.save(), mlp_output.save(), layer_5_output.save()

        expected = plain("The Eiffel Tower is in the city of")
        torch.testing.assert_close(logits, expected.logits, **EXACT)
        torch.testing.assert_close(layer_5_output, expected.hidden_states[6], **EXACT)
        assert attention_output.shape == mlp_output.shape == layer_5_output.shape

    def test_standardized_naming(self, model, plain):
        with model.trace("Hello world"):
            # Attention and MLP components (access in forward pass order!)
            attn_out = model.attentions_output[3]
            mlp_out = model.mlps_output[3]
            layer_3_output = model.layers_output[3]

            # Layer I/O - works for GPT-2, LLaMA, Gemma, etc.
            layer_5_output = model.layers_output[5]

            # Direct interventions - add residual from layer 3 to layer 10
            model.layers_output[10] = model.layers_output[10] + layer_3_output

            logits = model.logits.save()
            _ = attn_out.save(), mlp_out.save(), layer_5_output.save()

        clean = plain("Hello world")
        torch.testing.assert_close(layer_5_output, clean.hidden_states[6], **EXACT)
        assert attn_out.shape == mlp_out.shape == layer_5_output.shape
        with plain.hooked(layer_10=lambda stream: stream + clean.hidden_states[4]):
            torch.testing.assert_close(logits, plain("Hello world").logits, **EXACT)
        assert not torch.allclose(logits, clean.logits, **EXACT)

    def test_built_in_interventions(self, model, plain):
        from nnterp.interventions import logit_lens, patchscope_lens, steer

        # Logit lens: decode hidden states at each layer
        layer_probs = logit_lens(model, ["The capital of France is"])
        # Shape: (batch, layers, vocab_size)
        assert layer_probs.shape == (1, 12, model.vocab_size)
        check_lens(layer_probs, plain)

        # Patchscope: patch hidden states across prompts
        from nnterp.interventions import TargetPrompt

        target = TargetPrompt("The capital of France is", index_to_patch=-1)
        patchscope_probs = patchscope_lens(
            model, source_prompts=["The capital of England is"], target_patch_prompts=target, layer_to_patch=10
        )
        check_patchscope(patchscope_probs, plain)

        # Activation steering
        import torch

        with model.trace("Hello, how are you?"):
            steering_vector = torch.randn(model.hidden_size)
            model.steer(layers=[5, 10], steering_vector=steering_vector, factor=1.5)
            vector = steering_vector.save()
            logits = model.logits.save()
        with plain.hooked(layer_5=lambda s: s + 1.5 * vector, layer_10=lambda s: s + 1.5 * vector):
            torch.testing.assert_close(logits, plain("Hello, how are you?").logits, **EXACT)

        with model.trace("Hello, how are you?"):  # the function that the block imports does the same
            steer(model, [5, 10], vector, factor=1.5)
            same = model.logits.save()
        torch.testing.assert_close(same, logits, **EXACT)

    def test_prompt_and_target_tracking(self, model, plain):
        from nnterp.interventions import logit_lens
        from nnterp.prompt_utils import Prompt, run_prompts

        prompts = [
            Prompt.from_strings(
                "The capital of France is", {"target": "Paris", "other": ["London", "Madrid"]}, model.tokenizer
            )
        ]

        # Get probabilities for all target categories
        results = run_prompts(model, prompts)
        # Returns: {"target": tensor([0.85]), "other": tensor([0.12])}

        probs = plain("The capital of France is").logits[0, -1].softmax(-1)
        assert set(results) == {"target", "other"}
        for category, found in results.items():
            tokens = prompts[0].target_tokens[category]
            torch.testing.assert_close(found, probs[tokens].sum()[None], **EXACT)

        # Combine with interventions
        results = run_prompts(model, prompts, get_probs_func=logit_lens)
        # Returns probabilities across all layers
        lens = reference_lens(plain)
        for category, found in results.items():
            tokens = prompts[0].target_tokens[category]
            torch.testing.assert_close(found, lens[:, tokens].sum(-1)[None], **EXACT)

    def test_prompt_and_target_tracking_of_a_fact_the_model_knows(self, toy):
        from nnterp.interventions import logit_lens
        from nnterp.prompt_utils import Prompt, run_prompts

        model = toy
        prompts = [
            Prompt.from_strings(
                "The capital of France is", {"target": "Paris", "other": ["London", "Madrid"]}, model.tokenizer
            )
        ]
        results = run_prompts(model, prompts)
        assert results["target"].shape == (1,)
        assert results["target"].item() > 0.9
        assert results["other"].item() < 0.1

        results = run_prompts(model, prompts, get_probs_func=logit_lens)
        assert results["target"].shape == (1, model.num_layers)
        assert results["target"][0, -1].item() > 0.9
        assert results["target"][0, 0].item() < 0.5


class TestIntegrationPost:
    """The post that welcomes nnterp to NDIF, block by block."""

    def test_the_tree(self, model, plain):
        native = plain.module.transformer
        assert model.embed_tokens.path.endswith("wte")
        assert len(model.layers) == len(native.h)
        for i, block in enumerate(native.h):
            assert repr(model.layers[i].self_attn._module) == repr(block.attn)
            assert repr(model.layers[i].mlp._module) == repr(block.mlp)
        assert repr(model.ln_final._module) == repr(native.ln_f)
        assert repr(model.lm_head._module) == repr(plain.module.lm_head)

    def test_properties(self, model, plain, capsys):
        print(model.num_layers)  # Number of transformer layers
        print(model.hidden_size)  # Dimensionality of hidden states
        print(model.num_heads)  # Number of attention heads
        print(model.vocab_size)  # Vocabulary size
        config = plain.module.config
        assert [int(line) for line in capsys.readouterr().out.split()] == [
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.vocab_size,
        ]

    def test_accessing_internals(self, model, plain):
        with model.trace("The Eiffel Tower is in the city of"):
            # Layer outputs — same syntax for every model
            layer_5_output = model.layers_output[5]
            # Attention and MLP outputs at a specific layer
            attn_output = model.attentions_output[3]
            mlp_output = model.mlps_output[3]
            # Built-in logit access
            logits = model.logits.save()
            _ = attn_output.save(), mlp_output.save(), layer_5_output.save()

        expected = plain("The Eiffel Tower is in the city of")
        torch.testing.assert_close(logits, expected.logits, **EXACT)
        torch.testing.assert_close(layer_5_output, expected.hidden_states[6], **EXACT)
        assert attn_output.shape == mlp_output.shape == layer_5_output.shape

    def test_the_remote_block_here(self, model, plain):
        with model.trace("hello"):
            layer_5_output = model.layers_output[5]
            model.layers_output[10] = layer_5_output
            logits = model.logits.save()
        clean = plain("hello")
        with plain.hooked(layer_10=lambda _stream: clean.hidden_states[6]):
            torch.testing.assert_close(logits, plain("hello").logits, **EXACT)

    def test_skip_layers(self, model, plain):
        with model.trace("Hello world"):
            model.skip_layer(1)  # Zero out layer 1's contribution
            model.skip_layers(2, 3)  # Skip layers 2 through 3
            logits = model.logits.save()
        clean = plain("Hello world")
        with plain.hooked(layer_3=lambda _stream: clean.hidden_states[1]):
            torch.testing.assert_close(logits, plain("Hello world").logits, **EXACT)

    def test_skip_with_saved_activations(self, model, plain):
        # First, save activations from a clean run
        with model.trace("Hello world") as tracer:
            layer_6_out = model.layers_output[6].save()
            tracer.stop()

        # Then, skip early layers and inject the saved activations
        with model.trace("Hello world"):
            model.skip_layers(0, 6, skip_with=layer_6_out)
            result = model.logits.save()

        torch.testing.assert_close(result, plain("Hello world").logits, **EXACT)

    def test_project_to_vocabulary(self, model, plain):
        with model.trace("The capital of France is"):
            hidden = model.layers_output[5]
            logits = model.project_on_vocab(hidden).save()
        expected = plain.unembed(plain("The capital of France is").hidden_states[6])
        torch.testing.assert_close(logits, expected, **EXACT)

    def test_activation_steering(self, model, plain):
        steering_vector = torch.randn(model.hidden_size)
        with model.trace("The weather today is"):
            model.steer(layers=[1, 3], steering_vector=steering_vector, factor=0.5)
            logits = model.logits.save()
        step = 0.5 * steering_vector
        with plain.hooked(layer_1=lambda s: s + step, layer_3=lambda s: s + step):
            torch.testing.assert_close(logits, plain("The weather today is").logits, **EXACT)

    def test_logit_lens_and_patchscopes(self, model, plain):
        from nnterp.interventions import TargetPrompt, logit_lens, patchscope_lens

        # Logit lens across all layers
        layer_probs = logit_lens(model, ["The capital of France is"])
        check_lens(layer_probs, plain)

        # Patchscope: patch representations across prompts
        target = TargetPrompt("The capital of France is", index_to_patch=-1)
        patchscope_probs = patchscope_lens(
            model,
            source_prompts=["The capital of England is"],
            target_patch_prompts=target,
            layer_to_patch=10,
        )
        check_patchscope(patchscope_probs, plain)

    def test_the_answer_emerges_over_depth(self):
        from nnterp.interventions import logit_lens

        model = StandardizedTransformer(nnterp.toy_checkpoint())
        layer_probs = logit_lens(model, ["The capital of France is"])
        paris = model.tokenizer(" Paris", add_special_tokens=False).input_ids[0]
        assert layer_probs[0, -1].argmax().item() == paris
        assert layer_probs[0, 0].argmax().item() != paris


@torch.no_grad()
def reference_lens(plain: Plain) -> torch.Tensor:
    """`[layers, vocab]` at the last token, one layer at a time."""
    seen = plain("The capital of France is")
    inner = [plain.unembed(hidden[0, -1]).softmax(-1) for hidden in seen.hidden_states[1:-1]]
    return torch.stack([*inner, seen.logits[0, -1].softmax(-1)])  # HuggingFace's last hidden state is normed already


def check_lens(layer_probs: torch.Tensor, plain: Plain) -> None:
    torch.testing.assert_close(layer_probs, reference_lens(plain)[None], **EXACT)


def check_patchscope(probs: torch.Tensor, plain: Plain) -> None:
    source = plain("The capital of England is").hidden_states[11][:, -1]

    def patch(stream):
        stream = stream.clone()
        stream[:, -1] = source
        return stream

    with plain.hooked(layer_10=patch):
        expected = plain("The capital of France is").logits[:, -1].softmax(-1)
    torch.testing.assert_close(probs, expected[:, None], **EXACT)
