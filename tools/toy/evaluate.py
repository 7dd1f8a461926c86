"""Measure what a toy checkpoint knows, on combinations that its training text leaves out.

    uv run python tools/toy/evaluate.py [DIR]

Without a folder, the checkpoint that nnterp ships is measured. Every figure is computed with plain
transformers and torch hooks, so that it says something about the checkpoint and nothing about nnterp.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, logging

import corpus
import facts
import words

SHIPPED = Path(__file__).resolve().parents[2] / "packages" / "nnterp-core" / "src" / "nnterp" / "_toy"
BATCH_SIZE = 128
IDENTITY_PROMPT = "king king\n1135 1135\nhello hello\n?"
TONE_LAYER = 4
TONE_SCALES = (1.0, 2.0)
Example = tuple[str, str]  # a prompt and its continuation, which starts with a space


class Toy:
    """A checkpoint with its tokenizer, and the few ways in which it is asked."""

    def __init__(self, folder: Path) -> None:
        logging.disable_progress_bar()
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.layers = self.model.model.layers

    def ids(self, text: str) -> list[int]:
        """The token ids of ``text``."""
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def final_states(self, rows: list[list[int]]) -> torch.Tensor:
        """States before the unembedding, of rows padded on the right; what follows a position cannot change it."""
        width = max(map(len, rows))
        padded = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        return self.model.model(input_ids=padded, use_cache=False).last_hidden_state

    @torch.no_grad()
    def unembed(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the given states; only a few positions are ever asked for, so only those are unembedded."""
        return self.model.lm_head(states)

    def next_token_probabilities(
        self, prompts: list[str], layer: int | None = None, edit: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One distribution for each prompt; ``edit`` changes the output of ``layer`` at the last tokens."""
        rows, last = self._rows(prompts)

        def hook(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
            hidden = _hidden(output).clone()
            hidden[last] = edit(hidden[last])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.layers[layer].register_forward_hook(hook) if layer is not None and edit is not None else None
        try:
            return self.unembed(self.final_states(rows)[last]).softmax(-1)
        finally:
            if handle is not None:
                handle.remove()

    def last_residuals(self, prompts: list[str]) -> torch.Tensor:
        """Layer outputs at the last token: prompts x layers x hidden size."""
        rows, last = self._rows(prompts)
        found: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out: found.append(_hidden(out)[last])) for layer in self.layers
        ]
        try:
            self.final_states(rows)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found, dim=1)

    def _rows(self, prompts: list[str]) -> tuple[list[list[int]], tuple[torch.Tensor, torch.Tensor]]:
        rows = [self.ids(prompt) for prompt in prompts]
        return rows, (torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows]))


def _hidden(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def accuracy(toy: Toy, examples: list[Example]) -> tuple[float, float]:
    """Top-1 accuracy on the first token of the continuations, and on whole continuations (greedy)."""
    first = whole = 0
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        prompts = [toy.ids(prompt) for prompt, _ in batch]
        answers = [toy.ids(answer) for _, answer in batch]
        states = toy.final_states([p + a for p, a in zip(prompts, answers, strict=True)])
        for row, prompt, answer in zip(states, prompts, answers, strict=True):
            span = toy.unembed(row[len(prompt) - 1 : len(prompt) + len(answer) - 1]).argmax(-1).tolist()
            first += span[0] == answer[0]
            whole += span == answer
    return first / len(examples), whole / len(examples)


# --- held-out examples -------------------------------------------------------------------------------------------


def fact_examples() -> dict[str, list[Example]]:
    """Every fact in the phrasing it was never seen in, by relation."""
    examples: dict[str, list[Example]] = {}
    for fact in facts.FACTS:
        prompt = facts.state(facts.held_out_phrasing(fact), fact.subject)
        examples.setdefault(fact.relation, []).append((prompt, f" {fact.answer}"))
    return examples


def list_examples(count: int = 200, seed: int = 7) -> dict[str, list[Example]]:
    """Lists ("w w" lines) whose last item never occurs in a training list, by the kind of that item."""
    rng = random.Random(seed)
    names = sorted({fact.subject for fact in facts.FACTS if fact.relation == "capital"} | set(words.NAMES))
    kinds: dict[str, Callable[[random.Random], str]] = {
        "word": lambda rng: rng.choice(words.NOUNS),
        "name or country": lambda rng: rng.choice(names),
        "number": lambda rng: str(rng.randrange(10, 10_000)),
        "made-up word": corpus.made_up_word,
    }
    examples: dict[str, list[Example]] = {}
    for kind, make in kinds.items():
        around = corpus.made_up_word if kind == "made-up word" else corpus.list_item
        examples[kind] = []
        while len(examples[kind]) < count:
            item = make(rng)
            if corpus.is_held_out_item(item):
                lines = [corpus.training_item(rng, around) for _ in range(rng.randint(3, 6))]
                prompt = "".join(f"{line} {line}\n" for line in lines) + item
                examples[kind].append((prompt, f" {item}"))
    return examples


def indirect_object_examples(count: int = 300, seed: int = 7) -> dict[str, list[Example]]:
    """Prompts with pairs of names that never meet in the training text, by the order of the names."""
    rng = random.Random(seed)
    pairs = [pair for pair in itertools.permutations(words.NAMES, 2) if corpus.is_held_out_pair(*pair)]
    examples: dict[str, list[Example]] = {"ABBA": [], "BABA": []}
    for order in examples:
        for first, second in rng.sample(pairs, count):
            giver, receiver = (second, first) if order == "ABBA" else (first, second)
            prompt = corpus.indirect_object_prompt(rng, first, second, giver)
            examples[order].append((prompt, f" {receiver}"))
    return examples


def tone_examples(pleasant: bool, count: int = 200, seed: int = 7) -> list[str]:
    """Texts of one tone that end in a frame, filled with a noun it is never filled with in training."""
    rng = random.Random(seed)
    pairs = [(f, n) for f, kind in corpus.TONE_FRAMES.items() for n in corpus.TONE_NOUNS[kind]]
    pairs = [pair for pair in pairs if corpus.is_held_out_tone(*pair)]
    texts = []
    for _ in range(count):
        frame, noun = rng.choice(pairs)
        texts.append(f"{corpus.tone_sentence(rng, pleasant)} {frame.format(x=noun)}")
    return texts


# --- measurements ------------------------------------------------------------------------------------------------


def published_prompts(toy: Toy) -> dict[str, float]:
    """The probability of the right answer to each published prompt."""
    prompts = list(facts.PUBLISHED_PROMPTS)
    probabilities = toy.next_token_probabilities(prompts)
    answers = [toy.ids(f" {answer}")[0] for answer in facts.PUBLISHED_PROMPTS.values()]
    return {prompt: row[answer].item() for prompt, row, answer in zip(prompts, probabilities, answers, strict=True)}


def tone_mass(toy: Toy, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of all pleasant and of all unpleasant words."""
    groups = [[toy.ids(f" {word}")[0] for word in corpus.tone_words(pleasant)] for pleasant in (True, False)]
    return probabilities[..., groups[0]].sum(-1), probabilities[..., groups[1]].sum(-1)


def tone_accuracy(toy: Toy) -> dict[str, float]:
    """How often the likeliest next word has the tone of the sentence before."""
    result = {}
    for name, pleasant in (("pleasant", True), ("unpleasant", False)):
        best = toy.next_token_probabilities(tone_examples(pleasant)).argmax(-1).tolist()
        right = {toy.ids(f" {word}")[0] for word in corpus.tone_words(pleasant)}
        result[name] = sum(token in right for token in best) / len(best)
    return result


CONTRAST_FRAMES = ["The weather today is", "I think the soup is", "The film was", "I feel", "This bread tastes"]
NEUTRAL_PROMPTS = ["The weather today is", "I think the soup is", "The film was"]


def tone_direction(toy: Toy) -> torch.Tensor:
    """Mean difference, layer by layer, of the last residuals of pleasant and unpleasant texts."""
    openings = {
        True: ["I love the city.", "What a wonderful day.", "I am happy.", "The tea is delicious."],
        False: ["I hate the city.", "What a terrible day.", "I am sad.", "The tea is disgusting."],
    }
    means = {
        tone: toy.last_residuals([f"{a} {b}" for a, b in itertools.product(texts, CONTRAST_FRAMES)]).mean(0)
        for tone, texts in openings.items()
    }
    return means[True] - means[False]


def tone_steering(toy: Toy, layer: int = TONE_LAYER) -> list[dict]:
    """Pleasant and unpleasant mass after neutral prompts: untouched, pushed up, pushed down."""
    direction = tone_direction(toy)[layer]
    rows = []
    for prompt in NEUTRAL_PROMPTS:
        for scale in (0.0, *TONE_SCALES, *(-s for s in TONE_SCALES)):
            steered = toy.next_token_probabilities([prompt], layer, lambda hidden, s=scale: hidden + s * direction)
            pleasant, unpleasant = tone_mass(toy, steered[0])
            rows.append(
                {"prompt": prompt, "scale": scale, "pleasant": pleasant.item(), "unpleasant": unpleasant.item()}
            )
    return rows


def tone_flip(toy: Toy, layer: int = TONE_LAYER, scale: float = 2.0) -> dict[str, tuple[float, float]]:
    """Mass of the opposite tone in toned held-out texts, before and after adding the opposite direction."""
    direction = tone_direction(toy)[layer]
    result = {}
    for pleasant, sign in ((False, 1), (True, -1)):
        texts = tone_examples(pleasant, count=100)
        masses = []
        for push in (0.0, sign * scale):
            steered = toy.next_token_probabilities(texts, layer, lambda hidden, push=push: hidden + push * direction)
            masses.append(tone_mass(toy, steered)[int(pleasant)].mean().item())
        name = "pleasant to unpleasant" if pleasant else "unpleasant to pleasant"
        result[name] = (masses[0], masses[1])
    return result


def identity_readout(toy: Toy) -> dict[int, float]:
    """Patchscopes (Ghandeharioun et al. 2024): how often each layer's residual is read out as its own token.

    The residual of a country at the end of "The capital of ..." replaces that of "?" at the end of the
    identity prompt, after the same layer. The key -1 stands for "after at least one of the layers".
    """
    names = [country.name for country in facts.COUNTRIES]
    residuals = toy.last_residuals([f"The capital of {name}" for name in names])
    forms = torch.tensor([[toy.ids(f" {name}")[0], toy.ids(name)[0]] for name in names])
    prompts = [IDENTITY_PROMPT] * len(names)
    hits = []
    for layer in range(len(toy.layers)):
        best = toy.next_token_probabilities(prompts, layer, lambda _, k=layer: residuals[:, k]).argmax(-1)
        hits.append((best[:, None] == forms).any(-1))
    found = {layer: hit.float().mean().item() for layer, hit in enumerate(hits)}
    return found | {-1: torch.stack(hits).any(0).float().mean().item()}


@torch.no_grad()
def logit_lens(toy: Toy, prompt: str, answer: str) -> list[tuple[int, str, float, float]]:
    """By layer: the likeliest token, its probability, and the answer's, from that layer's output."""
    residuals = toy.last_residuals([prompt])[0]
    probabilities = toy.unembed(toy.model.model.norm(residuals)).softmax(-1)
    token = toy.ids(answer)[0]
    return [
        (layer, toy.tokenizer.decode([row.argmax().item()]), row.max().item(), row[token].item())
        for layer, row in enumerate(probabilities)
    ]


def single_tokens(toy: Toy) -> dict[str, tuple[int, int]]:
    """By kind: how many words are one token after a space, and out of how many."""
    groups = {"country": {country.name for country in facts.COUNTRIES}, "name": set(words.NAMES)}
    for fact in facts.FACTS:
        groups.setdefault(f"answer of {fact.relation}", set()).add(fact.answer)
    return {kind: (sum(len(toy.ids(f" {w}")) == 1 for w in group), len(group)) for kind, group in groups.items()}


def generate(toy: Toy, prompt: str, new_tokens: int = 12) -> str:
    """Greedy continuation."""
    inputs = toy.tokenizer(prompt, return_tensors="pt")
    output = toy.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return toy.tokenizer.decode(output[0])


def report(folder: Path) -> None:
    """Print every figure of the model card."""
    toy = Toy(folder)
    print(f"\n{folder}: {toy.model.num_parameters():,} parameters, loaded as {toy.model.dtype}")
    copied = list_examples(count=1000)
    print("\nTop-1 on held-out combinations        first token   whole answer   examples")
    families = {"fact": fact_examples(), "list": copied, "indirect object": indirect_object_examples()}
    for family, kinds in families.items():
        for kind, examples in kinds.items():
            first, whole = accuracy(toy, examples)
            print(f"  {family + ': ' + kind:36s}{first:11.1%}{whole:15.1%}{len(examples):11d}")
    for tone, share in tone_accuracy(toy).items():
        print(f"  {'tone: ' + tone:36s}{share:11.1%}{'':15s}{200:11d}")
    print("\nProbability of the answer to published prompts")
    for prompt, probability in published_prompts(toy).items():
        print(f"  {prompt:46s}{probability:8.3f}")
    print(f"\nTone direction added after layer {TONE_LAYER}        scale   pleasant   unpleasant")
    for row in tone_steering(toy):
        print(f"  {row['prompt']:36s}{row['scale']:9.1f}{row['pleasant']:11.3f}{row['unpleasant']:13.3f}")
    for name, (before, after) in tone_flip(toy).items():
        print(f"  toned texts, {name}: mass of the other tone {before:.3f} -> {after:.3f}")
    print("\nPatchscopes identity prompt: share of countries read out, by layer")
    readout = identity_readout(toy)
    print("  " + "  ".join(f"{layer}: {share:.0%}" for layer, share in readout.items() if layer >= 0))
    print(f"  after at least one layer: {readout[-1]:.1%}")
    print('\nLogit lens, "The capital of France is"')
    for layer, token, best, answer in logit_lens(toy, "The capital of France is", " Paris"):
        print(f"  layer {layer}: {token!r:14} {best:.3f}   Paris {answer:.3f}")
    print("\nOne token after a space: " + ", ".join(f"{k} {n}/{of}" for k, (n, of) in single_tokens(toy).items()))
    print("\nGreedy continuations")
    for prompt in (*facts.PUBLISHED_PROMPTS, "When Mary and John went to the store, John gave a drink to"):
        print(f"  {generate(toy, prompt)}")


def main() -> None:
    """Print the figures of one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED)
    torch.set_num_threads(2)
    report(parser.parse_args().folder)


if __name__ == "__main__":
    main()
