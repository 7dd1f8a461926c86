"""What a sweep holds at a time: bounded by its batch, whatever the number of its cells."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from nnterp import StandardizedTransformer
from nnterp.interventions import (
    TargetPrompt,
    ablate,
    activation_patching,
    components,
    logit_difference,
    logit_lens,
    patchscope_table,
)
from nnterp.testing import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _collector():
    """Python's own thresholds: the other tests collect more rarely, and what is held until then is counted here."""
    others = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*others)


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on, and the most that are there at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key)
        return result

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def peak(run):
    with Held() as held:
        run()
    return held.peak


def prompts(count, length=6, first=20):
    return [[(first + 7 * i + 3 * k) % 480 + 10 for k in range(length)] for i in range(count)]


def patching(model, count, batch_size):
    metric = logit_difference(5, 9)
    return lambda: activation_patching(model, prompts(count), prompts(count, first=90), metric, batch_size=batch_size)


def ablating(model, count, batch_size):
    what = components(model, "mlps_output", positions=-1) * 3
    return lambda: ablate(model, prompts(count), what, "zero", logit_difference(5, 9), batch_size=batch_size)


def reading(model, count, batch_size):
    target = TargetPrompt("The capital of France is", -1)
    return lambda: patchscope_table(model, prompts(count), target, batch_size=batch_size)


@pytest.mark.parametrize(
    ("what", "model_type"), [(patching, "llama"), (ablating, "llama"), (reading, "llama"), (patching, "mamba")]
)
def test_memory_does_not_grow_with_the_cells(tiny, what, model_type):
    model = tiny(model_type)
    what(model, 1, 8)()  # what is found out once
    some, more = peak(what(model, 8, 8)), peak(what(model, 24, 8))
    assert more < 1.25 * some, f"{some} bytes for 8 prompts, {more} for 24"
    wide = peak(what(model, 24, 96))
    assert wide > 1.3 * more, f"the count does not see the batch: {more} bytes in batches of 8, {wide} in batches of 96"


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_no_more_rows_than_asked_for(tiny, model_type):
    """Rows that join on the way count as well."""
    model, rows = tiny(model_type), []
    patching(model, 1, 5)()  # what is found out once
    handles = [
        model._module.get_submodule(block.path).register_forward_hook(
            lambda m, args, out: rows.append(len(out if isinstance(out, torch.Tensor) else out[0]))
        )
        for block in model.anatomy.blocks
    ]
    try:
        patching(model, 3, 5)()
    finally:
        for handle in handles:
            handle.remove()
    assert max(rows) == 5


def test_rows_of_a_long_prompt_share_what_stands_before_their_edits():
    """Rows at the last position copy the prefix's keys and values in the layer that runs, and not in all layers."""
    layers, rows, length = 12, 32, 400
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, vocab_size=512
    )
    model = StandardizedTransformer(LlamaForCausalLM(config).eval(), tokenizer=tiny_tokenizer())
    clean, corrupted = prompts(1, length), prompts(1, length, first=90)
    metric = logit_difference(5, 9)

    def run(batch_size):
        return lambda: activation_patching(
            model,
            clean,
            corrupted,
            metric,
            heads="all",
            values="attention_head_outputs",
            positions=[-2, -1],
            batch_size=batch_size,
            progress=False,
        )

    run(2)()  # what is found out once
    few, many = peak(run(2)), peak(run(rows))
    one_layer = (rows - 2) * length * 2 * config.hidden_size * 4
    assert many - few < 4 * one_layer < layers * one_layer


def test_what_does_not_fit_is_refused_with_its_size_before_it_is_computed(monkeypatch):
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    monkeypatch.setattr("nnterp.memory.free_memory", lambda device: 3 << 20)
    with pytest.raises(MemoryError, match=r"whole vocabulary .* would take \d+ MiB, and 3 MiB are free"):
        logit_lens(model, prompts(400))
    logit_lens(model, prompts(400), top_k=1)
    with pytest.raises(MemoryError, match=r"200 prompts would take \d+ MiB, and 3 MiB .*fewer layers"):
        model.collect(prompts(200, 40), "layers_output")
    eager = StandardizedTransformer(model._module, tokenizer=model.tokenizer, enable_attention_probs=True)
    with pytest.raises(MemoryError, match=r"Attention of 16 prompts of 200 tokens, \d+ heads.*Lower batch_size"):
        eager.collect(prompts(16, 200), "attention_scores", positions=-1)
