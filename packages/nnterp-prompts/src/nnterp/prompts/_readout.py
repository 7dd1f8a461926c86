"""Asking the model: log-probabilities of tokens at positions, reduced inside the trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp.inputs import Batch, batches, encode
from nnterp.prompts._plan import Question

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PLACES = 256  # positions whose logits exist at the same time
_RANKED = 64  # questions compared with the whole vocabulary at the same time


@dataclass
class Inquiry:
    """Questions about at most `PLACES` positions of one batch, as tensors.

    Attributes:
        rows, columns: The positions, `[places]` each.
        place: For each question its position among these, `[questions]`.
        tokens: Its tokens, `[questions, most tokens]`, filled up with the first.
        extra: True where `tokens` is filled up.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    place: torch.Tensor
    tokens: torch.Tensor
    extra: torch.Tensor


def inquiries(batch: Batch, questions: Sequence[Sequence[Question]]) -> list[Inquiry]:
    """The questions of a batch (for each row a list), in the order of rows."""
    made: list[Inquiry] = []
    places: dict[tuple[int, int], int] = {}
    place: list[int] = []
    tokens: list[tuple[int, ...]] = []

    def close() -> None:
        most = max(map(len, tokens))
        rows, columns = (torch.tensor(side) for side in zip(*places, strict=True))
        filled = torch.tensor([[*ids, *[ids[0]] * (most - len(ids))] for ids in tokens])
        extra = torch.arange(most) >= torch.tensor([[len(ids)] for ids in tokens])
        made.append(Inquiry(rows, columns, torch.tensor(place), filled, extra))
        for filled_up in (places, place, tokens):
            filled_up.clear()

    for row, asked in enumerate(questions):
        for question in asked:
            key = (row, batch.starts[row] + question.position)
            if key not in places and len(places) == PLACES:
                close()
            place.append(places.setdefault(key, len(places)))
            tokens.append(question.tokens)
    if tokens:
        close()
    return made


@torch.no_grad()
def ask(
    model: StandardizedTransformer, batch: Batch, questions: Sequence[Sequence[Question]], remote: Any = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass for the questions of a batch.

    Where it is proven what the model does after its last layer, only the positions asked about are projected on the
    vocabulary and the model's own head does not run: `[batch, seq, vocab]` is never built.

    Args:
        model: The model.
        batch: The rows.
        questions: For each row its questions.
        remote: Passed to the trace.

    Returns:
        For each question, in the order of rows: the log-probability that the next token is one of its tokens, float32,
        and the rank of the best of them in the vocabulary (1 is the most probable), int64. Both on the CPU.
    """
    asked = inquiries(batch, questions)
    short, flags = projects(model, remote), forward_flags(model)
    with torch.no_grad(), model.trace(batch.encoding, remote=remote, **flags) as tracer:
        if short:
            logs, ranks = answer_all(asked, model.layers_output[-1], model.project_on_vocab)
        else:
            logs, ranks = answer_all(asked, model.logits, None)
        logs = logs.save()
        ranks = ranks.save()
        tracer.stop()
    return logs, ranks


@torch.no_grad()
def last_probabilities(model: StandardizedTransformer, batch: Batch, remote: Any = False) -> torch.Tensor:
    """Distribution after each row's last token, `[batch, vocab]`, float32 on the CPU."""
    rows, columns = torch.arange(len(batch)), batch.last
    short, flags = projects(model, remote), forward_flags(model)
    with torch.no_grad(), model.trace(batch.encoding, remote=remote, **flags) as tracer:
        if short:
            logits = model.project_on_vocab(model.layers_output[-1][rows, columns][:, None])[:, 0]
        else:
            logits = model.logits[rows, columns]
        probs = logits.float().softmax(-1).cpu().save()
        tracer.stop()
    return probs


def answer_all(
    asked: Sequence[Inquiry], source: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers from the last layer's output (`project` given) or from the logits, `[batch, seq, ...]`; see `ask`."""
    logs, ranks = [], []
    for inquiry in asked:
        picked = source[inquiry.rows, inquiry.columns]
        logits = (picked if project is None else project(picked[:, None])[:, 0]).float()
        tokens, extra = inquiry.tokens.to(logits.device), inquiry.extra.to(logits.device)
        place = inquiry.place.to(logits.device)
        normaliser = logits.logsumexp(-1)
        chosen = logits[place[:, None], tokens].masked_fill(extra, -torch.inf)
        logs.append((chosen.logsumexp(-1) - normaliser[place]).cpu())
        best = chosen.amax(-1, keepdim=True)
        for where, value in zip(place.split(_RANKED), best.split(_RANKED), strict=True):
            ranks.append(((logits[where] > value).sum(-1) + 1).cpu())
    return torch.cat(logs), torch.cat(ranks)


def projects(model: StandardizedTransformer, remote: Any) -> bool:
    """Whether `project_on_vocab(last layer)` is proven to be the model's logits, for `[batch, seq, hidden]` streams."""
    if not remote:
        model.dispatch()
    certificate = model.certificate
    if certificate is None or not certificate.complete or model.readout.way is None:
        return False
    return all("project_on_vocab" not in line.name or line.status == "passed" for line in certificate.lines)


def forward_flags(model: StandardizedTransformer) -> dict[str, Any]:
    """Keywords for a forward pass that is not going to be continued."""
    accepts = inspect.signature(model._module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepts.values())
    return {"use_cache": False} if "use_cache" in accepts or open_ended else {}


def next_token_probs(
    model: StandardizedTransformer,
    prompts: Any,
    remote: Any = False,
    targets: Sequence[Sequence[Sequence[int]]] | None = None,
) -> torch.Tensor:
    """The model's own distribution after each prompt, or only the targets' share of it.

    Args:
        model: The model.
        prompts: Texts, token ids, chats, or a list of these.
        remote: Passed to the trace.
        targets: For each prompt, for each category (in the same order for every prompt), token ids.

    Returns:
        `[prompts, vocab]`, or `[prompts, categories]` with `targets`; float32 on the CPU.

    Raises:
        InsideTraceError: Called inside a trace of the model.
    """
    model.require_no_trace("next_token_probs()")
    rows = encode(model, prompts)
    if targets is not None and len(targets) != len(rows):
        raise ValueError(f"targets has {len(targets)} entries for {len(rows)} prompts; give one for each.")
    parts: list[torch.Tensor | None] = [None] * len(rows)
    for batch in batches(model, rows, len(rows)):
        if targets is None:
            found = last_probabilities(model, batch, remote)
        else:
            asked = [[Question(len(rows[i]) - 1, tuple(dict.fromkeys(t))) for t in targets[i]] for i in batch.indices]
            found = ask(model, batch, asked, remote)[0].exp().view(len(batch), -1)
        for i, part in zip(batch.indices, found, strict=True):
            parts[i] = part
    return torch.stack(parts)


next_token_probs.reduces_targets = True  # type: ignore[attr-defined]


def next_token_probs_unsqueeze(
    nn_model: StandardizedTransformer, prompt: Any, remote: Any = False, **_kwargs: Any
) -> torch.Tensor:
    """`next_token_probs` with an axis for layers, as functions for `run_prompts` had to return it in 1.x.

    Returns:
        `[prompts, 1, vocab]`, float32 on the CPU.
    """
    return next_token_probs(nn_model, prompt, remote).unsqueeze(1)
