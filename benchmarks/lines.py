"""Every cost that is measured, for one model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
from measuring import Line, Run
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnterp import StandardizedTransformer
from nnterp.interventions import (
    activation_patching,
    attribution_patching,
    direct_logit_attribution,
    edge_attribution,
    logit_difference,
    logit_lens,
    patchscope_lens,
    repeat_prompt,
)
from nnterp.prompts import Prompt, run_prompts
from nnterp.testing import tiny_tokenizer

METRIC = logit_difference(7, 8)
SHAPES = {
    "gpt2": GPT2Config(),
    "135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
    "1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


def build(shape: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> StandardizedTransformer:
    """A model of a shape with random weights."""
    config = type(SHAPES[shape])(**SHAPES[shape].to_diff_dict())
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    family = GPT2LMHeadModel if isinstance(config, GPT2Config) else LlamaForCausalLM
    with torch.device(device):
        module = family._from_config(config, dtype=dtype).eval()
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer())


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids that are no special tokens, `[rows, length]`."""
    return torch.randint(10, 500, (rows, length), generator=torch.Generator().manual_seed(seed))


def forward(model: StandardizedTransformer, tokens: torch.Tensor, body: bool = False) -> Run:
    """A plain forward pass, with logits or without."""
    module = model._module.base_model if body else model._module
    tokens = tokens.to(model.device)

    @torch.no_grad()
    def run() -> None:
        module(input_ids=tokens, use_cache=False)

    return run


def every(model: StandardizedTransformer, tokens: int) -> Iterator[Line]:
    """All lines."""
    yield from reading(model, 32, 32)
    yield from lenses(model, 8, 8)
    yield from patching(model, 16)
    yield from attribution(model, 16)
    yield from generation(model, tokens)
    yield from loading(model)


def reading(model: StandardizedTransformer, prompts: int, length: int) -> Iterator[Line]:
    """Values of many prompts."""
    tokens = ids(prompts, length)
    collect = partial(model.collect, tokens.tolist(), "layers_output", batch_size=prompts, progress=False)
    body, whole = forward(model, tokens, body=True), forward(model, tokens)
    shape = f"{prompts} prompts × {length} tokens"
    last = partial(collect, positions=-1)
    peers = {"plain hooks": _hooked(model, whole, lambda out: out[:, -1])} | _interp_engine(model, tokens)
    yield Line("reading", f"last token of all layers, {shape}", whole, last, 1, 1, peers)
    hooks = {"plain hooks": _hooked(model, body, lambda out: out[:, -1])}
    yield Line("reading", "the same, in forward passes without the head", body, last, 1, 1.02, hooks)
    hooks = {"plain hooks": _hooked(model, body, lambda out: out)}
    yield Line("reading", "all tokens of all layers, without the head", body, collect, 1, 1.10, hooks)


def lenses(model: StandardizedTransformer, prompts: int, length: int) -> Iterator[Line]:
    """Lenses and patchscopes."""
    tokens = ids(prompts, length)
    plain, shape = forward(model, tokens), f"{prompts} prompts × {length} tokens"
    lens = partial(logit_lens, model, tokens, progress=False)
    body = forward(model, tokens, body=True)
    peers = {"plain hooks and the head": _hooked_lens(model, body), "products alone": _products(model, body, prompts)}
    yield Line("lenses", f"logit lens of all layers, {shape}", plain, lens, 1, 1.15, peers)
    yield Line("lenses", f"the same, targets and top 5, {shape}", plain, partial(lens, targets=5, top_k=5), 1, 1.15)
    many = ids(128, 16, 3).tolist()
    asked = [Prompt(row, {"target": [5], "other": [6]}, {}) for row in many]
    run = partial(run_prompts, model, asked, batch_size=32, get_probs_func=logit_lens, tqdm=None)
    batches = [forward(model, torch.tensor(many[k : k + 32])) for k in range(0, 128, 32)]
    yield Line(
        "lenses", "run_prompts with the lens, 128 prompts × 16 tokens", lambda: [b() for b in batches], run, 1, 1.1
    )
    target = repeat_prompt()
    width = len(model.tokenizer(target.prompt).input_ids)
    patchscope = partial(patchscope_lens, model, tokens, target)
    name = f"patchscope lens, {prompts} sources × {model.num_layers} layers into {width} tokens"
    yield Line("lenses", name, forward(model, ids(prompts, width)), patchscope, 1, 1.3)


def patching(model: StandardizedTransformer, length: int) -> Iterator[Line]:
    """Sweeps, per cell."""
    clean, corrupted = ids(1, length, 4), ids(1, length, 5)
    sweep = partial(activation_patching, model, clean, corrupted, METRIC, progress=False)
    plain = forward(model, corrupted)
    cells = model.num_layers * length
    yield Line("patching", f"layer × position, {cells} cells; per cell", plain, sweep, cells, 0.1)
    heads = partial(sweep, values="attention_head_outputs", heads="all")
    cells = model.num_layers * (model.num_heads or 1)
    yield Line("patching", f"layer × head, {cells} cells; per cell", plain, heads, cells, 0.2)


def attribution(model: StandardizedTransformer, length: int) -> Iterator[Line]:
    """Attribution of nodes and edges."""
    prompts, (clean, corrupted) = ids(8, length), (ids(4, length, 4), ids(4, length, 5))
    for by in ("layer", "sublayer", "head"):
        work = partial(direct_logit_attribution, model, prompts, (7, 8), by, progress=False)
        yield Line("attribution", f"direct logit attribution by {by}, 8 prompts", forward(model, prompts), work, 1, 1.3)
    plain = forward(model, corrupted)
    nodes = partial(attribution_patching, model, clean, corrupted, METRIC, audit=0, progress=False)
    yield Line("attribution", "all streams by position, 4 pairs", plain, nodes, 1, 4)
    heads = partial(nodes, "attention_head_outputs", heads="all", positions=list(range(length)))
    yield Line("attribution", "all heads by position, 4 pairs", plain, heads, 1, 4)
    pair = partial(attribution_patching, model, clean[:1], corrupted[:1], METRIC, progress=False)
    for value, units in (("layers_output", None), ("attention_head_outputs", "all")):
        own = partial(pair, value, heads=units)
        name = f"audit of 50 of {value}, with the estimates, 1 pair"
        estimates = {"the estimates alone": partial(own, audit=0)}
        yield Line("attribution", name, forward(model, corrupted[:1]), own, 1, None, estimates)
    edges = partial(edge_attribution, model, clean, corrupted, METRIC, audit=0, progress=False)
    yield Line("attribution", "all edges, one gradient, 4 pairs", plain, edges, 1, 6)


def generation(model: StandardizedTransformer, count: int) -> Iterator[Line]:
    """Generations, in plain generations of the same prompt."""
    module, layer = model._module, model.num_layers // 2
    vector = torch.randn(model.hidden_size, dtype=module.dtype, device=model.device)
    tokens = ids(1, 16).to(model.device)
    encoding = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    block = module.get_submodule(model.layer_paths[layer])

    @torch.no_grad()
    def plain() -> None:
        module.generate(**encoding, **settings)

    def hook() -> None:
        handle = block.register_forward_hook(lambda m, a, out: _plus(out, vector))
        try:
            plain()
        finally:
            handle.remove()

    def steering() -> None:
        with model.steering(vector, layer):
            model.generate(encoding, **settings)

    def steer() -> None:
        with model.generate(encoding, **settings):
            model.steer(layer, vector)

    def nothing() -> None:
        with model.generate(encoding, **settings):
            pass

    collect = partial(model.collect, tokens.tolist(), "layers_output", progress=False, **settings)
    peers = {"plain hook": hook}
    yield Line("generation", f"steered at every step, {count} tokens", plain, steering, 1, 1.06, peers)
    peers = {"a trace of nnsight in which nothing is done": nothing}
    yield Line("generation", f"steered in a trace, {count} tokens", plain, steer, 1, 1.06, peers)
    hooks = {"plain hooks": _hooked(model, plain, lambda out: out[:, -1])}
    yield Line("generation", f"collecting all layers, {count} tokens", plain, collect, 1, 1.10, hooks)


def loading(model: StandardizedTransformer) -> Iterator[Line]:
    """Loading from a folder, in loads of the plain model."""
    if model.device.type != "cpu" or sum(p.numel() for p in model._module.parameters()) > 5e8:
        return
    folder, kept = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
    model._module.save_pretrained(folder.name)
    model.tokenizer.save_pretrained(folder.name)

    def plain() -> None:
        AutoModelForCausalLM.from_pretrained(folder.name)

    def proven() -> None:
        StandardizedTransformer(folder.name).dispatch()

    def unproven() -> None:
        StandardizedTransformer(folder.name, check_renaming=False).dispatch()

    def restored() -> None:
        with _proofs_in(kept.name):
            proven()

    others = {"with the proofs of an earlier load": restored, "without checks": unproven}
    with _proofs_in("off"):
        yield Line("loading", "load with the certificate", plain, proven, 1, None, others)
    folder.cleanup()
    kept.cleanup()


@contextlib.contextmanager
def _proofs_in(folder: str) -> Iterator[None]:
    """Keep proofs in a folder while the block runs; "off" keeps none."""
    before = os.environ.get("NNTERP_CACHE")
    os.environ["NNTERP_CACHE"] = folder
    try:
        yield
    finally:
        os.environ.pop("NNTERP_CACHE") if before is None else os.environ.__setitem__("NNTERP_CACHE", before)


def _plus(output: object, vector: torch.Tensor) -> object:
    return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector


def _kept_by_hooks(model: StandardizedTransformer, run: Run, take: object) -> list[torch.Tensor]:
    """A copy of a part of each layer's output, kept by a hook while `run` runs."""
    found: list[torch.Tensor] = []

    def keep(module: object, args: object, out: object) -> None:
        found.append(take(out[0] if isinstance(out, tuple) else out).clone())

    handles = [model._module.get_submodule(path).register_forward_hook(keep) for path in model.layer_paths]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _hooked(model: StandardizedTransformer, run: Run, take: object) -> Run:
    """A run with a hook on each layer that copies a part of its output."""

    def hooked() -> None:
        found = _kept_by_hooks(model, run, take)
        torch.stack(found).cpu() if len({f.shape for f in found}) == 1 else [f.cpu() for f in found]

    return hooked


def _hooked_lens(model: StandardizedTransformer, run: Run) -> Run:
    """A lens by hooks: the last token of all layers, then the final norm, the head and probabilities, all at once."""
    after = [model._module.get_submodule(path) for path in (model.readout.ln_final, model.readout.lm_head) if path]

    @torch.no_grad()
    def lens() -> None:
        logits = torch.stack(_kept_by_hooks(model, run, lambda out: out[:, -1]), dim=1)
        for module in after:
            logits = module(logits)
        logits.float().softmax(-1).cpu()

    return lens


def _products(model: StandardizedTransformer, body: Run, prompts: int) -> Run:
    """What any lens has to multiply: the layers, and the last token of all layers with the head."""
    head = model._module.get_submodule(model.readout.lm_head)
    states = torch.randn(prompts * model.num_layers, model.hidden_size, dtype=model._module.dtype, device=model.device)

    @torch.no_grad()
    def products() -> None:
        body()
        head(states)

    return products


def _interp_engine(model: StandardizedTransformer, tokens: torch.Tensor) -> dict[str, Run]:
    """The last token of all layers with interp-engine, where it is installed."""
    if not importlib.util.find_spec("interp_engine"):
        return {}
    from interp_engine.address import Address
    from interp_engine.capture import capture
    from interp_engine.model import EagerModel

    engine = EagerModel("benchmark", hf_model=model._module, tokenizer=model.tokenizer)
    points = [Address("resid_post", layer) for layer in range(model.num_layers)]
    return {"interp-engine": lambda: capture(engine, tokens.to(model.device), points)}
