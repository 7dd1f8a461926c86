"""A model that does not fit here is loaded by name: nothing is allocated, and the service knows it by its name."""

import json
import subprocess
import sys
from types import SimpleNamespace

import nnsight
import pytest
from transformers import LlamaConfig

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_tokenizer

pytestmark = pytest.mark.slow

SCRIPT = """
import json, resource, sys, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
import torch._dynamo
from nnterp import StandardizedTransformer
from nnterp.testing import tiny_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

tiny = StandardizedTransformer(sys.argv[2], remote=True)  # whatever loading imports is imported
before = peak()
model = StandardizedTransformer(sys.argv[1], remote=True)
print(json.dumps({
    "grown": peak() - before,
    "parameters": sum(p.numel() for p in model._module.parameters()),
    "meta": all(p.device.type == "meta" for p in model._module.parameters()),
    "layers": model.num_layers,
    "dispatched": model.dispatched,
    "verdict": model.certificate.verdict,
}))
"""


def seventy_billion(folder):
    """The configuration of a Llama of 70 billion parameters, and no weights."""
    config = LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_seventy_billion_parameters_take_no_memory(tmp_path, pairs):
    script = tmp_path / "load.py"
    script.write_text(SCRIPT, encoding="utf-8")
    folder = seventy_billion(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), pairs("llama").folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["parameters"] > 70e9
    assert seen["meta"]
    assert not seen["dispatched"]
    assert seen["layers"] == 80
    assert "as far as it can be checked without weights" in seen["verdict"]
    assert seen["grown"] < 150, f"{seen['grown']:.0f} MB for a model of which nothing is here"


def test_the_service_is_asked_for_the_plain_model(pairs, monkeypatch):
    one = pairs("gpt2")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **_: SimpleNamespace(id=name))
    plain = nnsight.TransformersModel(one.folder, task="text-generation", tokenizer=tiny_tokenizer())
    assert one.there.to_model_key() == plain.to_model_key()
    assert "nnsight.modeling.transformers.TransformersModel" in one.there.to_model_key()


def test_the_attention_that_was_asked_for_is_asked_of_the_service(pairs):
    one = pairs("gpt2")
    assert one.there._remoteable_get_env()["attn_implementation"] == "eager"
    plain = StandardizedTransformer(one.folder, remote=True)
    assert plain._remoteable_get_env()["attn_implementation"] == "sdpa"
