"""The logit lens on vLLM, and the probabilities of targets after many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.inputs import Row, encode, token_ids
from nnterp.vllm._errors import raise_first

if TYPE_CHECKING:
    from nnterp.vllm._engine import TracedVLLM

Groups: TypeAlias = Sequence[Sequence[int]]  # token ids whose probabilities are added up


class Asked(Protocol):
    """A prompt with its targets, as `nnterp.prompts.Prompt`."""

    prompt: Any
    target_tokens: Any


def logit_lens(model: TracedVLLM, prompts: Any, targets: Sequence[Groups] | None = None) -> torch.Tensor:
    """What each layer predicts after the last token: the final norm and the head, applied to the stream leaving it.

    Args:
        model: The model.
        prompts: As in `StandardizedTransformer.collect`; vLLM batches them.
        targets: For each prompt, lists of token ids, as many lists for every prompt. The engine then sends back only
            the summed probability of each list, and not the whole vocabulary.

    Returns:
        Probabilities `[prompts, layers, vocab]`; with `targets`, `[prompts, layers, lists]`. On the CPU, in the model's
        dtype. The lens is that of nostalgebraist, "interpreting GPT: the logit lens", 2020.

    Raises:
        InsideTraceError: Called inside a trace.
        ValueError: There is not one entry of `targets` for each prompt, their lengths differ, or the model does not
            have one of the ids.

    Example:
        >>> lens = logit_lens(model, ["The capital of France is"])  # [1, layers, vocab]
    """
    return _probabilities(model, prompts, targets, True, "logit_lens()")


def run_prompts(model: TracedVLLM, prompts: Sequence[Asked], over_layers: bool = False) -> dict[str, torch.Tensor]:
    """The probability of each category of target tokens after each prompt; only these leave the engine.

    Args:
        model: The model.
        prompts: Prompts of `nnterp.prompts`, all with the same categories.
        over_layers: Read every layer with the logit lens. If False, read the model's own next-token distribution.

    Returns:
        `{category: [prompts]}`, or `{category: [prompts, layers]}`, float32 on the CPU, in the order of the prompts.

    Raises:
        InsideTraceError: Called inside a trace.
        ValueError: There are no prompts, or their categories differ.

    Example:
        >>> prompt = Prompt.from_strings("The capital of France is", {"right": "Paris"}, model.tokenizer)
        >>> run_prompts(model, [prompt])["right"]  # [1]
    """
    if not prompts:
        raise ValueError("No prompts were given: pass a list with at least one nnterp.prompts.Prompt.")
    names = list(prompts[0].target_tokens)
    for i, prompt in enumerate(prompts):
        if set(prompt.target_tokens) != set(names):
            raise ValueError(f"Prompt {i} has the categories {list(prompt.target_tokens)}, and prompt 0 has {names}.")
    targets = [[list(dict.fromkeys(prompt.target_tokens[name])) for name in names] for prompt in prompts]
    found = _probabilities(model, [p.prompt for p in prompts], targets, over_layers, "run_prompts()").float()
    return {name: found[..., i] if over_layers else found[:, 0, i] for i, name in enumerate(names)}


def _probabilities(
    model: TracedVLLM, prompts: Any, targets: Sequence[Groups] | None, over_layers: bool, what: str
) -> torch.Tensor:
    model.require_no_trace(what)
    rows = encode(model, prompts)  # type: ignore[arg-type]
    groups, spans = (None, []) if targets is None else _grouped(rows, targets, model.vocabulary)
    with model.edit() as (_, edit):
        lens = read_lens(model, groups, over_layers)
        lens.save()  # type: ignore[attr-defined]  # every object has it in a trace
    try:
        outputs = model.run([row.ids for row in rows])
    finally:
        edit.clear()
    found = [saved(output, "lens") for output in outputs]
    return torch.stack([one[:, span] for one, span in zip(found, spans, strict=True)] if spans else found)


def _grouped(
    rows: Sequence[Row], targets: Sequence[Groups], vocabulary: int | None
) -> tuple[dict[tuple[int, ...], list], list[slice]]:
    """The token ids of a prompt → all groups asked of it; and for each prompt, which of these groups are its own."""
    if len(targets) != len(rows) or len({len(own) for own in targets}) != 1:
        raise ValueError(
            f"targets has {len(targets)} entries for {len(rows)} prompts; give each the same number of lists."
        )
    groups: dict[tuple[int, ...], list] = {}
    spans = []
    for i, (row, own) in enumerate(zip(rows, targets, strict=True)):
        mine = groups.setdefault(row.ids, [])
        spans.append(slice(len(mine), len(mine) + len(own)))
        mine.extend([list(token_ids(group, vocabulary, f"Targets of prompt {i}: a list")) for group in own])
    return groups, spans


def read_lens(model: TracedVLLM, groups: dict[tuple[int, ...], list] | None, over_layers: bool) -> torch.Tensor:
    """Probabilities after the last token of the running pass, `[layers, vocab]` or `[layers, groups]`, on the CPU.

    `groups` maps the token ids of a prompt to its groups; None keeps the vocabulary. Without `over_layers` there is one
    row, the model's own distribution.
    """
    own = None if groups is None else groups[tuple(model.input_ids[0].tolist())]
    if over_layers:
        last = torch.cat([model.layers_output[i][:, -1] for i in range(model.num_layers)])
        probs = model.project_on_vocab(last).softmax(-1)
    else:
        probs = model.next_token_probs
    return (probs if own is None else torch.stack([probs[:, group].sum(-1) for group in own], -1)).cpu()


def saved(output: Any, name: str) -> Any:
    """What a block that is installed in the engine saved for one request, under `name`.

    Raises:
        OutOfOrderError: The block did not finish: it waited for a value that the pass had already gone past, or that it
            never computes.
        Exception: The block raised it, see `raise_first`.
    """
    raise_first([output])
    if name not in getattr(output, "saves", {}):  # nnsight drops a block that waits for what does not come
        raise OutOfOrderError(
            "The pass ended before the values that were asked for came in the order expected of them."
        )
    return output.saves[name]
