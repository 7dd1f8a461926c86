"""Mutation-test the certificate: give it wrong names for a model's parts, and see that it refuses every one of them.

    uv run python tools/mutations.py            # the report, per architecture
    uv run python tools/mutations.py llama opt  # some architectures only

A mutation is a `RenameConfig` that names a module which does not play the part: attention and MLP swapped, a norm for a
sublayer, an inner projection for the whole, a layer's norm for the final one, another matrix for the head, a list of
layers that lacks one, is shifted, reversed, copied, or belongs to a side tower. A wrong name whose module is handed and
returns the very tensors of the right one is no mutation and is left out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nnterp import RenameConfig, StandardizedTransformer
from nnterp.discovery import Recording, quiet, record
from nnterp.errors import RenamingError
from nnterp.testing import tiny_model, tiny_tokenizer

ARCHITECTURES = (
    "gpt2 llama mistral gemma gemma2 gemma3_text qwen2 qwen3 phi phi3 gpt_neox gptj opt falcon mpt cohere "
    "cohere2 granite olmo2 stablelm starcoder2 glm4 mixtral qwen3_moe gpt_oss deepseek_v3 exaone4 smollm3 "
    "nemotron codegen gpt_bigcode biogpt gpt_neo apertus jamba qwen3_next hrm_text dory inkling2_loop_text llava"
).split()


@dataclass(frozen=True)
class Mutation:
    """One wrong map of one model."""

    what: str
    config: RenameConfig


@dataclass
class Outcome:
    """What became of the maps of one architecture."""

    model_type: str
    caught: list[str]
    missed: list[str]
    false_alarms: list[str]


def run(model_type: str) -> Outcome:
    """Try every mutation of one architecture, and the right maps."""
    outcome = Outcome(model_type, [], [], [])
    module = tiny_model(model_type)
    right = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    decoys(module, right)
    for name, config in right_maps(right):
        try:
            load(module, config)
        except RenamingError as error:
            outcome.false_alarms.append(f"{name}: {error}")
    for mutation in mutations(module, right):
        try:
            load(module, mutation.config)
        except RenamingError:
            outcome.caught.append(mutation.what)
        else:
            outcome.missed.append(f"{mutation.what}: {mutation.config}")
    return outcome


def load(module: nn.Module, config: RenameConfig | None) -> StandardizedTransformer:
    """The model under these names, or the error that refuses them."""
    return StandardizedTransformer(module, tokenizer=tiny_tokenizer(), rename_config=config)


def right_maps(right: StandardizedTransformer) -> Iterator[tuple[str, RenameConfig | None]]:
    """The names nnterp finds by itself, given as the user's."""
    anatomy, block = right.anatomy, right.anatomy.blocks[0]
    yield "no names", None
    yield "the list of layers", RenameConfig(layers_name=anatomy.layers)
    yield "the head", RenameConfig(lm_head_name=anatomy.lm_head)
    if anatomy.ln_final:
        yield "the final norm", RenameConfig(ln_final_name=anatomy.ln_final)
    if block.self_attn and block.self_attn.path:
        yield "the attention", RenameConfig(attn_name=block.self_attn.path.removeprefix(f"{block.path}."))
    if block.mlp and block.mlp.path:
        yield "the MLP", RenameConfig(mlp_name=block.mlp.path.removeprefix(f"{block.path}."))


def decoys(module: nn.Module, right: StandardizedTransformer) -> None:
    """Modules that a careless name could pick: wrong lists of layers, another head and another norm."""
    layers = list(module.get_submodule(right.anatomy.layers))
    module.add_module("decoy_shifted", nn.ModuleList(layers[1:]))
    module.add_module("decoy_short", nn.ModuleList(layers[:-1]))
    module.add_module("decoy_reversed", nn.ModuleList(layers[::-1]))
    module.add_module("decoy_copied", copy.deepcopy(nn.ModuleList(layers)))
    module.add_module("decoy_single", nn.ModuleList(layers[:1]))
    head = module.get_output_embeddings()
    module.add_module("decoy_head", copy.deepcopy(head))
    if right.anatomy.ln_final:
        module.add_module("decoy_norm", copy.deepcopy(module.get_submodule(right.anatomy.ln_final)))


def mutations(module: nn.Module, right: StandardizedTransformer) -> Iterator[Mutation]:
    """Every wrong map that is tried."""
    anatomy, block = right.anatomy, right.anatomy.blocks[0]
    paths = {path for path, _ in module.named_modules(remove_duplicate=False) if path}
    ids = torch.arange(5, 17)[None]
    with quiet(module):
        recording = record(module, lambda: module(input_ids=ids, use_cache=False), modules=sorted(paths))
    inner = [
        name
        for name, child in module.get_submodule(block.path).named_modules()
        if name and not isinstance(child, nn.ModuleList)
    ]
    relative = {
        role: part.path.removeprefix(f"{block.path}.")
        for role, part in (("attn", block.self_attn), ("mlp", block.mlp))
        if part is not None and part.path is not None
    }
    if len(relative) == 2:
        yield Mutation("attention and MLP swapped", RenameConfig(attn_name=relative["mlp"], mlp_name=relative["attn"]))
    for role, part in (("attn", block.self_attn), ("mlp", block.mlp)):
        for name in inner:
            path = f"{block.path}.{name}"
            if part is not None and not same_ends(recording, path, part.entry, part.exit):
                yield Mutation(f"{role} = {name}", RenameConfig(**{f"{role}_name": name}))
    norms = [
        path
        for path in sorted(paths)
        if "norm" in type(module.get_submodule(path)).__name__.lower() and not _has_children(module, path)
    ]
    for path in norms:
        if path != anatomy.ln_final and (
            path == "decoy_norm" or path.startswith((anatomy.blocks[0].path, anatomy.blocks[-1].path))
        ):
            yield Mutation(f"final norm = {path}", RenameConfig(ln_final_name=path))
    width = module.get_output_embeddings().weight.shape
    for path in ("decoy_head", anatomy.embed_tokens, *(f"{block.path}.{name}" for name in inner)):
        weight = getattr(module.get_submodule(path), "weight", None) if path else None
        if (
            path
            and path != anatomy.lm_head
            and isinstance(weight, torch.Tensor)
            and (weight.shape == width or weight.dim() == 2)
        ):
            yield Mutation(f"head = {path}", RenameConfig(lm_head_name=path))
    for name in ("decoy_shifted", "decoy_short", "decoy_reversed", "decoy_copied", "decoy_single"):
        yield Mutation(f"layers = {name}", RenameConfig(layers_name=name))


def same_ends(recording: Recording, path: str, entry: str, exit_: str) -> bool:
    """Whether a module is given and returns the tensors of the part it would stand for."""
    mine, first, last = recording.call(path), recording.call(entry), recording.call(exit_)
    if mine is None or first is None or last is None:
        return False
    return _same(mine.stream_in, first.stream_in) and _same(mine.stream_out, last.stream_out)


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


def _has_children(module: nn.Module, path: str) -> bool:
    return next(module.get_submodule(path).children(), None) is not None


def main() -> int:
    """Print the report; fails if a wrong map passed or a right one did not."""
    torch.set_num_threads(1)
    caught = missed = alarms = 0
    for model_type in sys.argv[1:] or ARCHITECTURES:
        outcome = run(model_type)
        caught, missed, alarms = (
            caught + len(outcome.caught),
            missed + len(outcome.missed),
            alarms + len(outcome.false_alarms),
        )
        tried = len(outcome.caught) + len(outcome.missed)
        print(
            f"{model_type:16} caught {len(outcome.caught):3} of {tried:3}, false alarms {len(outcome.false_alarms)}",
            flush=True,
        )
        for line in (*outcome.missed, *outcome.false_alarms):
            print(f"    {line}")
    print(f"caught {caught} of {caught + missed} wrong maps, {alarms} false alarms")
    return 1 if missed or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
