"""An architecture that transformers does not know, with names nobody would guess. Also used as remote code."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, width=32, beams=4, storeys=3, words=509, **kwargs):
        self.width, self.beams, self.storeys, self.words = width, beams, storeys, words
        super().__init__(**kwargs)


class Weaver(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.beams = config.beams
        self.warp = nn.Linear(config.width, 3 * config.width)
        self.weft = nn.Linear(config.width, config.width)

    def forward(self, x, mask):
        b, s, w = x.shape
        q, k, v = self.warp(x).view(b, s, 3, self.beams, w // self.beams).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / (w // self.beams) ** 0.5
        pattern = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.weft((pattern @ v).transpose(1, 2).reshape(b, s, w))


class Ponder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.width, 3 * config.width)
        self.back = nn.Linear(3 * config.width, config.width)

    def forward(self, x):
        return self.back(torch.tanh(self.out(x)))


class Storey(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.calm_a = nn.LayerNorm(config.width)
        self.braid = Weaver(config)
        self.calm_b = nn.LayerNorm(config.width)
        self.muse = Ponder(config)

    def forward(self, x, mask):
        x = x + self.braid(self.calm_a(x), mask)
        return x + self.muse(self.calm_b(x))


class OddPreTrainedModel(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "tower"

    def _init_weights(self, module):
        pass


class Tower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lexicon = nn.Embedding(config.words, config.width)
        self.storeys = nn.ModuleList(Storey(config) for _ in range(config.storeys))
        self.roof = nn.LayerNorm(config.width)

    def forward(self, ids, attention_mask):
        s = ids.shape[1]
        mask = torch.ones(s, s, dtype=torch.bool, device=ids.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool() | torch.eye(s, dtype=torch.bool, device=ids.device)
        x = self.lexicon(ids)
        for storey in self.storeys:
            x = storey(x, mask)
        return self.roof(x)


class OddForCausalLM(OddPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.tower = Tower(config)
        self.speak = nn.Linear(config.width, config.words)
        self.post_init()

    def get_input_embeddings(self):
        return self.tower.lexicon

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.speak(self.tower(input_ids, attention_mask)))
