"""A looped model: Llama's layers, of which some run several times, with the prompt added again before each pass."""

import copy
import inspect

import torch
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from nnterp.testing import tiny_model

# Types of transformers that run layers several times, tested in core/test_looped.py.
LOOPED = frozenset({"dory", "hrm_text", "inkling2_loop", "inkling2_loop_text"})
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"  # before 5.24
PRELUDE, CORE, PASSES = 1, 2, 3  # layers before the loop, in it, and how often they run; one more layer comes after it


class OfPass:
    """A cache as one pass sees it: each pass keeps keys and values of its own."""

    def __init__(self, cache, offset):
        self.cache, self.offset = cache, offset

    def update(self, keys, values, layer, *args, **kwargs):
        return self.cache.update(keys, values, layer + self.offset, *args, **kwargs)


class LoopedModel(LlamaModel):
    mix = staticmethod(
        torch.add
    )  # what a pass begins with, of what the one before it left and of what entered the loop

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        cache = cache if cache is not None or not use_cache else DynamicCache(config=self.config)
        if cache is not None:
            while len(cache.layers) < PRELUDE + CORE * PASSES + 1:
                cache.layers.append(copy.deepcopy(cache.layers[-1]))
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(embedded.shape[1], device=embedded.device) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        rotations = self.rotary_emb(embedded, position_ids)

        def run(layer, x, offset=0):
            own = None if cache is None else OfPass(cache, offset)
            return layer(
                x,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotations,
                **{CACHE: own},
                **kwargs,
            )

        x = embedded
        for layer in self.layers[:PRELUDE]:
            x = run(layer, x)
        begun = self.norm(x)
        for turn in range(PASSES):
            x = self.mix(self.norm(x), begun)
            for layer in self.layers[PRELUDE : PRELUDE + CORE]:
                x = run(layer, x, turn * CORE)
        for layer in self.layers[PRELUDE + CORE :]:
            x = run(layer, x, (PASSES - 1) * CORE)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})


class LoopedForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = LoopedModel(config)
        self.post_init()


def looped_module():
    """The model with the loud weights of a tiny Llama of four layers."""
    plain = tiny_model("llama", num_layers=PRELUDE + CORE + 1)
    module = LoopedForCausalLM(plain.config)
    module.load_state_dict(plain.state_dict())
    return module.eval()
