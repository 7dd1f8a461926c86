"""Log-probabilities and ranks of tokens at positions, reduced inside the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp import StandardizedTransformer
from nnterp.huggingface import dtype_of
from nnterp.inputs import Batch, Row, forward_flags, pad
from nnterp.prompts._questions import Question
from nnterp.record import Record

PLACES = 256  # positions whose logits exist at the same time
_RANKED = 64  # questions that are ranked in the whole vocabulary at the same time
_LAST_LAYER_SKIPPED = ("nnterp.prompts", "the last layer does not run")  # a key of `model.proofs`


class Inquiry(Record):
    """Questions about at most `PLACES` positions of one batch, as tensors.

    Attributes:
        rows, columns: The positions in the batch, `[places]` each.
        place: For each question, its index in `rows` and `columns`, `[questions]`.
        tokens: The token ids of each question, `[questions, most tokens]`; a shorter one repeats its first token.
        extra: True where `tokens` holds such a repetition.
    """

    def __init__(
        self, rows: torch.Tensor, columns: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor, extra: torch.Tensor
    ) -> None:
        self.rows, self.columns, self.place, self.tokens, self.extra = rows, columns, place, tokens, extra


def inquiries(batch: Batch, questions: Sequence[Sequence[Question]]) -> list[Inquiry]:
    """Return the questions about a batch as tensors, in the order of its rows.

    Args:
        batch: The rows.
        questions: For each row its questions.
    """
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
    """Answer the questions about a batch in one forward pass.

    If the certificate proves what the model does after its last layer, the model's own head does not run: only the
    positions asked about are projected onto the vocabulary, and `[batch, seq, vocab]` never exists.

    Args:
        model: The model.
        batch: The rows.
        questions: For each row its questions.
        remote: Passed to the trace.

    Returns:
        Two tensors `[questions]` in the order of the rows, on the CPU. The log-probability that the next token is one
        of the question's tokens, float32; and the rank of the most probable of them in the vocabulary, int64, where 1
        is the top. If a logit at the position is NaN or +infinity, they are NaN and 0.
    """
    return _in_one_pass(model, batch, inquiries(batch, questions), answer_all, remote)


@torch.no_grad()
def last_probabilities(
    model: StandardizedTransformer, batch: Batch, remote: Any = False, before_last: int = 0
) -> torch.Tensor:
    """Return the next-token distribution after each row's last token, `[batch, vocab]`, float32 on the CPU.

    Args:
        model: The model.
        batch: The rows.
        remote: Passed to the trace.
        before_last: How many tokens before the last one to read.
    """
    places = (torch.arange(len(batch)), batch.last - before_last)
    return _in_one_pass(model, batch, places, distributions, remote)[0]


def _in_one_pass(
    model: StandardizedTransformer, batch: Batch, places: Any, read: Callable[..., tuple], remote: Any
) -> tuple[torch.Tensor, ...]:
    """Call `read(places, source, before, project)` in a forward pass that stops as early as possible."""
    if projects(model, remote):
        try:
            return _trace(model, batch, places, read, remote, True)
        except OutOfOrderError:  # the last layer does not run on text, such as a cross-attention without an image
            model.proofs[_LAST_LAYER_SKIPPED] = True
    return _trace(model, batch, places, read, remote, False)


def _trace(
    model: StandardizedTransformer, batch: Batch, places: Any, read: Callable[..., tuple], remote: Any, short: bool
) -> tuple[torch.Tensor, ...]:
    """Run one forward pass; `short` reads the last layer's output and stops, otherwise the logits are read."""
    flags = forward_flags(model)
    before = batch.starts[0] - int(batch.attention_mask[0].argmax())  # positions that the model itself puts in front
    shape = (len(batch), batch.input_ids.shape[1] + before)
    with torch.no_grad(), model.trace(batch.encoding, remote=remote, **flags) as tracer:
        stream = model.layers_output[-1] if short else None
        if stream is not None and stream.dim() == 3 and tuple(stream.shape[:2]) == shape:
            found = read(places, stream, 0, model.project_on_vocab)
        else:  # the model has several streams, or it is not proven what follows its last layer
            found = read(places, model.logits, before, None)
        found = nnsight.save(found)
        tracer.stop()
    return found


def distributions(
    places: tuple[torch.Tensor, torch.Tensor],
    source: torch.Tensor,
    before: int,
    project: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor]:
    """Return the distributions at (rows, columns), `[places, vocab]`, float32; arguments as in `answer_all`."""
    rows, columns = places
    picked = source[rows, columns - before]
    logits = picked if project is None else project(picked[:, None])[:, 0]
    return (logits.float().softmax(-1).cpu(),)


def answer_all(
    asked: Sequence[Inquiry],
    source: torch.Tensor,
    before: int,
    project: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer questions inside the trace; see `ask`.

    Args:
        asked: The questions.
        source: The last layer's output `[batch, seq, hidden]`, or the logits `[batch, seq, vocab]`.
        before: Number of positions at the beginning of the stream that `source` does not have.
        project: Maps hidden states to logits; None if `source` holds logits.
    """
    logs, ranks = [], []
    for inquiry in asked:
        picked = source[inquiry.rows, inquiry.columns - before]
        logits = (picked if project is None else project(picked[:, None])[:, 0]).float()
        tokens, extra = inquiry.tokens.to(logits.device), inquiry.extra.to(logits.device)
        place = inquiry.place.to(logits.device)
        normaliser = logits.logsumexp(-1)
        normaliser = normaliser.masked_fill(~normaliser.isfinite(), torch.nan)  # a logit is NaN or infinite
        chosen = logits[place[:, None], tokens].masked_fill(extra, -torch.inf)
        logs.append((chosen.logsumexp(-1) - normaliser[place]).cpu())
        best = chosen.amax(-1, keepdim=True)
        for where, value in zip(place.split(_RANKED), best.split(_RANKED), strict=True):
            rank = (logits[where] > value).sum(-1) + 1
            ranks.append(rank.masked_fill(normaliser[where].isnan(), 0).cpu())
    return torch.cat(logs), torch.cat(ranks)


def projects(model: StandardizedTransformer, remote: Any) -> bool:
    """Return True if `project_on_vocab(last layer)` is proven to be the model's logits."""
    model.prepare(remote)
    proven = model if model.dispatched else model.twin
    if _LAST_LAYER_SKIPPED in model.proofs or isinstance(proven, str):
        return False
    certificate = proven.certificate
    if certificate is None or not certificate.complete or not model.readout.proven:
        return False
    return all("project_on_vocab" not in line.name or line.status == "passed" for line in certificate.lines)


def is_causal(model: StandardizedTransformer, row: Row, remote: Any = False) -> bool:
    """Return True if the model predicts the same inside a row as at the end of a shorter row.

    Tried at the last token but one. False for models that attend in both directions, and for models that choose the
    keys to attend to by looking at all of them.
    """
    if len(row) < 2:
        return True
    inside = last_probabilities(model, pad(model, [row]), remote, before_last=1)
    at_end = last_probabilities(model, pad(model, [Row(row.ids[:-1])]), remote)
    tolerance = 1e-4 if dtype_of(model._module) in (torch.float32, torch.float64) else 2e-2
    return bool((inside - at_end).abs().max() <= tolerance)
