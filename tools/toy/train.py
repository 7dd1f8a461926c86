"""Train the toy model that nnterp ships, from nothing and on the CPU.

    uv run python tools/toy/train.py --out DIR

Builds the tokenizer and the training text (both seeded, no download), trains a small Llama, saves it as
float16 weights that load as float32, and prints the accuracies of the saved and re-loaded checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import corpus
import evaluate
from tokenizer import SPACE, build_tokenizer

ROW_LENGTH = 96
BATCH_ROWS = 32
STEPS = 900
WARMUP_STEPS = 60
MATRIX_LEARNING_RATE = 5e-3
OTHER_LEARNING_RATE = 2.5e-3
WEIGHT_DECAY = 0.05
TOKENIZE_AT_ONCE = 2_000


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of eight narrow layers."""
    end_of_text = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    model = LlamaForCausalLM(config).float()
    _relate_spaced_tokens(model.get_input_embeddings().weight, tokenizer)
    return model


@torch.no_grad()
def _relate_spaced_tokens(embedding: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start " river" as "river" plus one vector shared by all words, so that copying across the two generalises."""
    vocabulary = tokenizer.get_vocab()
    shared = torch.randn(embedding.shape[1]) * embedding.std()
    for token, index in vocabulary.items():
        if token.startswith(SPACE) and (bare := vocabulary.get(token.removeprefix(SPACE))) is not None:
            embedding[index] = embedding[bare] + shared


def packed_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Rows of ``ROW_LENGTH`` tokens; each starts with the start of a document, as a prompt does."""
    stream = corpus.documents(seed)
    row: list[int] = []
    while True:
        batch = [next(stream) for _ in range(TOKENIZE_AT_ONCE)]
        for tokens in tokenizer(batch, return_attention_mask=False)["input_ids"]:
            row += [*tokens, tokenizer.eos_token_id]
            if len(row) >= ROW_LENGTH:
                yield row[:ROW_LENGTH]
                row = []


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Next-token training on the packed stream."""
    optimizers = build_optimizers(model)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps)) for optimizer in optimizers
    ]
    rows = packed_rows(tokenizer, seed)
    model.train()
    progress = tqdm(range(steps), desc="training", mininterval=5)
    for step in progress:
        batch = torch.tensor([next(rows) for _ in range(BATCH_ROWS)])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write float16 weights beside a config that asks for float32, so that the checkpoint loads as float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    _edit_json(out / "config.json", {"dtype": "float32"})
    # The class name that transformers 4 knows as well as transformers 5.
    _edit_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, drop=("backend",))


def _edit_json(path: Path, changes: dict, drop: tuple[str, ...] = ()) -> None:
    content = json.loads(path.read_text()) | changes
    content = {key: value for key, value in content.items() if key not in drop}
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train, save, and print what the saved checkpoint knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)
    wall, cpu = time.perf_counter(), time.process_time()
    tokenizer = build_tokenizer(arguments.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model, tokenizer, arguments.steps, arguments.seed + 1)
    save(model, tokenizer, arguments.out)
    print(f"{time.perf_counter() - wall:.0f} s wall clock, {time.process_time() - cpu:.0f} s CPU time")
    evaluate.report(arguments.out)


if __name__ == "__main__":
    main()
