"""Asking the model: log-probabilities of tokens at positions, reduced inside the trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.inputs import Batch, Row, batches, encode, pad
from nnterp.prompts._plan import Question
from nnterp.record import Record

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_LAST_LAYER_IDLE: WeakSet[Any] = WeakSet()  # models whose last layer was found not to run
PLACES = 256  # positions whose logits exist at the same time
_RANKED = 64  # questions compared with the whole vocabulary at the same time


class Inquiry(Record):
    """Questions about at most `PLACES` positions of one batch, as tensors.

    Attributes:
        rows, columns: The positions, `[places]` each.
        place: For each question its position among these, `[questions]`.
        tokens: Its tokens, `[questions, most tokens]`, filled up with the first.
        extra: True where `tokens` is filled up.
    """

    def __init__(
        self, rows: torch.Tensor, columns: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor, extra: torch.Tensor
    ) -> None:
        self.rows, self.columns, self.place, self.tokens, self.extra = rows, columns, place, tokens, extra


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
    return _in_one_pass(model, batch, asked, answer_all, remote)


@torch.no_grad()
def last_probabilities(
    model: StandardizedTransformer, batch: Batch, remote: Any = False, before_last: int = 0
) -> torch.Tensor:
    """Distribution after each row's last token (or so many before it), `[batch, vocab]`, float32 on the CPU."""
    places = (torch.arange(len(batch)), batch.last - before_last)
    return _in_one_pass(model, batch, places, distributions, remote)[0]


def _in_one_pass(
    model: StandardizedTransformer, batch: Batch, places: Any, read: Callable[..., tuple], remote: Any
) -> tuple[torch.Tensor, ...]:
    """`read(places, source, before, project)` in a forward pass that stops as early as it can."""
    if projects(model, remote):
        try:
            return _trace(model, batch, places, read, remote, True)
        except OutOfOrderError:  # the last layer does not run on such input, as a cross-attention without an image
            _LAST_LAYER_IDLE.add(model)
    return _trace(model, batch, places, read, remote, False)


def _trace(
    model: StandardizedTransformer, batch: Batch, places: Any, read: Callable[..., tuple], remote: Any, short: bool
) -> tuple[torch.Tensor, ...]:
    flags = forward_flags(model)
    before = batch.starts[0] - int(batch.attention_mask[0].argmax())  # what the model itself puts in front
    shape = (len(batch), batch.input_ids.shape[1] + before)
    with torch.no_grad(), model.trace(batch.encoding, remote=remote, **flags) as tracer:
        stream = model.layers_output[-1] if short else None
        if stream is not None and stream.dim() == 3 and tuple(stream.shape[:2]) == shape:
            found = read(places, stream, 0, model.project_on_vocab)
        else:  # several streams side by side, or nothing is proven of what comes after the last layer
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
    """Distributions at (rows, columns), read as `answer_all` reads."""
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
    """Answers from the last layer's output (`project` given) or from the logits, see `ask`.

    Args:
        asked: The questions.
        source: `[batch, seq, ...]`.
        before: By how many positions the stream is longer at its beginning than `source`.
        project: From hidden states to logits.
    """
    logs, ranks = [], []
    for inquiry in asked:
        picked = source[inquiry.rows, inquiry.columns - before]
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
    model.prepare(remote)
    proven = model if model.dispatched else model.twin
    if model in _LAST_LAYER_IDLE or isinstance(proven, str):
        return False
    certificate = proven.certificate
    if certificate is None or not certificate.complete or not model.readout.proven:
        return False
    return all("project_on_vocab" not in line.name or line.status == "passed" for line in certificate.lines)


def reads_on_the_way(model: StandardizedTransformer, row: Row, remote: Any = False) -> bool:
    """Whether a model gives, inside a row, what it gives at the end of the row's beginning: whether it is causal there.

    Tried at the last place but one. Models that attend in both directions are not, nor are those that choose which keys
    to attend to by looking at all of them.
    """
    if len(row) < 2:
        return True
    inside = last_probabilities(model, pad(model, [row]), remote, before_last=1)
    at_end = last_probabilities(model, pad(model, [Row(row.ids[:-1])]), remote)
    tolerance = 1e-4 if model._module.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((inside - at_end).abs().max() <= tolerance)


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
