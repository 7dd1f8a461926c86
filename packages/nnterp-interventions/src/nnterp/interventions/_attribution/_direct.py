"""Direct logit attribution: what each part adds to a logit, straight through the final norm and the unembedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.errors import RemoteModelError, Unavailable
from nnterp.inputs import Batch, Row, encode
from nnterp.interventions._attribution._direct_result import DirectAttribution
from nnterp.interventions._attribution._parts import BY, WHAT, By, Parts, Plan
from nnterp.interventions._attribution._reading import read_batch
from nnterp.interventions._attribution._readout import Targets, Unembedding, softcap_of, targets_of
from nnterp.interventions._attribution._terms import tolerance
from nnterp.interventions._partial import DONE, Resume, ids_of, resumed, unfinished
from nnterp.interventions._results import (
    Result,
    describe_run,
    exact_texts,
    prompt_labels,
    token_bytes_of,
    vocabulary_of,
)
from nnterp.interventions._running import BatchSize, check_batch_size, in_batches
from nnterp.positions import Positions, plain_positions, resolve
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_AXES = {  # of the tensors while they are filled
    "scores": ("prompts", "parts"),
    "heads": ("prompts", "layers", "heads", "positions"),
    "bias": ("prompts",),
    "logits": ("prompts",),
    "residue": ("prompts",),
}


@plain_defaults()
def direct_logit_attribution(
    model: StandardizedTransformer,
    prompts: Any,
    targets: Any,
    by: By = "sublayer",
    *,
    position: Positions = -1,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
) -> DirectAttribution:
    """How much each part's output, sent straight through the final norm and the unembedding, adds to a logit.

    The residual stream after the last layer is the sum of the embeddings and of what every part adds. The final norm's
    scale is held still at its value in the run, so the logit is the sum of what each of them makes of it, and of the
    biases of the final norm and the unembedding. What a part does through later parts does not count. (nostalgebraist,
    "interpreting GPT: the logit lens", 2020; Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021;
    logit differences: Wang et al., "Interpretability in the wild", 2022. The same numbers as TransformerLens'
    `cache.decompose_resid` or `stack_head_results` through `logit_attrs`, biases included.)

    Multipliers of logits are counted in. Where the model caps its logits (Gemma 2), the logit before the cap is
    attributed, because a cap is not linear; `about["softcap"]` says so. Post-norms (Gemma 2 and 3, OLMo 2) are held
    still in the same way where heads or neurons are told apart.

    In a looped model the layers of the last pass are the parts, by their index among all runs. What enters that pass is
    one part, "entering L8": the model's own code stands before it, and is not linear in every model.

    Costs one forward pass, and the readout at one position. Memory is that of one batch.

    Example:
        found = direct_logit_attribution(model, "The Eiffel Tower is in", (" Paris", " Rome"), by="head")
        strongest = found.top(5)

    Args:
        model: The model; its weights are here.
        prompts: A text or a list; anything that `nnterp.inputs.encode` takes.
        targets: Whose logit is attributed. A token (an id, or a text that is one token), or a list with an entry for
            each prompt: a token, or a list of tokens whose logits are averaged. For logit differences a pair, as a
            tuple `(correct, wrong)` of two of these, or a list with a tuple for each prompt.
        by: What the parts are. "layer"; "sublayer": attention (or other mixer) and feed-forward apart; "head";
            "neuron": of the feed-forwards (mixtures of experts stay whole); "feature": of the attached dictionaries,
            each of which splits the stream up to its layer, or what a feed-forward or mixer adds; "position": what each
            head adds, split by the position that it attends to, everything else at the position that is read (it needs
            `enable_attention_probs=True`); "token": the same, added up over equal tokens of a prompt.
        position: Whose logits are attributed, over each prompt's own tokens: an index, a selector of one token, or a
            list with one for each prompt. The last token if not given.
        batch_size: Prompts in one forward pass; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Refused: it needs the model's weights here.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        A `DirectAttribution`: `scores` `[prompts, parts]`, `logits` and `residue` `[prompts]`, float32, on the CPU.

    Raises:
        ValueError: `by` is none of these, targets do not fit the prompts, a prompt is to be read at several positions,
            or the model is steered.
        Unavailable: The model's stream is not a sum of what its parts add, its logits are not linear in the stream with
            the final norm held, or its heads, neurons or patterns are not served; says why. Everything is checked in
            every run: parts that do not add up to the logit are an error.
        RemoteModelError: `remote` was given.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done`, `[prompts]`, is False.
    """
    model.require_no_trace(WHAT)
    if by not in BY:
        raise ValueError(f"by is one of {', '.join(map(repr, BY))}, not {by!r:.80}.")
    check_batch_size(batch_size)
    if remote:
        raise RemoteModelError(
            f"{WHAT[:-1]}remote=...) is refused: the final norm is held still beside the model, and the remote worker "
            "has no nnterp. Load the weights here."
        )
    if model.standing:
        raise ValueError(f"{WHAT} attributes the model as it is: call it outside of `with model.steering(...)`.")
    model.prepare()
    rows = encode(model, prompts)
    wanted = targets_of(model, targets, len(rows))
    at = _read_at(model, rows, position)
    plan = Plan(model, by)
    asked = {"prompts": ids_of(rows), "by": by, "at": at, "ids": wanted.ids, "weights": wanted.weights}
    call = Call(model, "direct_logit_attribution", asked)
    about = describe_run(model, "direct_logit_attribution", by=by, targets=targets, position=position)
    about["softcap"] = softcap_of(model.readout)
    run = _Run(model, rows, at, wanted, plan, about, resumed(call, resume))
    with call.keeping(lambda: run.partial(call)), torch.inference_mode(False), torch.no_grad():
        in_batches(model, rows, batch_size, run.step, "direct logit attribution", progress)
    return run.result()


def _read_at(model: StandardizedTransformer, rows: list[Row], position: Any) -> list[int]:
    """The position of each prompt that is read, counted from 0.

    Raises:
        ValueError: There is not one for each prompt.
    """
    plain = plain_positions(position, "position")
    each = list(plain) if isinstance(plain, tuple) else [plain] * len(rows)
    if len(each) != len(rows):
        raise ValueError(f"position has {len(each)} entries for {len(rows)} prompts; give one, or one per prompt.")
    found = [resolve(model, row, own, f"prompt {i}") for i, (row, own) in enumerate(zip(rows, each, strict=True))]
    for i, own in enumerate(found):
        if len(own) != 1:
            raise ValueError(
                f"position={each[i]!r} is {len(own)} tokens of prompt {i}; a logit is read at one. Call it once for "
                "each position, or give the prompt several times, with one position each."
            )
    return [own[0] for own in found]


class _Run:
    """The tensors of a call while they are filled.

    Attributes:
        whole: Tensors with the axes of `_AXES`.
        done: Indices of the prompts that are there.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        rows: list[Row],
        at: list[int],
        targets: Targets,
        plan: Plan,
        about: dict[str, Any],
        earlier: Result | None,
    ) -> None:
        self.model, self.rows, self.at, self.targets, self.plan, self.about = model, rows, at, targets, plan, about
        self.unembedding = Unembedding(model, targets)
        self.whole: dict[str, torch.Tensor] = {}
        self.labels: tuple[str, ...] = ()
        self.done: set[int] = set()
        if earlier is not None:
            self.whole = {name: earlier[name].clone() for name in _AXES if name in earlier.tensors}
            self.labels = earlier.labels.get("parts", ())
            self.done = set(earlier[DONE].nonzero()[:, 0].tolist())

    def step(self, batch: Batch) -> None:
        """Run one batch and put its scores in their places."""
        if self.done.issuperset(batch.indices):
            return
        indices = torch.tensor(batch.indices)
        reading = read_batch(
            self.model, batch, [batch.starts[k] + self.at[i] for k, i in enumerate(batch.indices)], self.plan.reads
        )
        direction = self.unembedding.direction(reading.stream, indices, reading.logits)
        parts = self.plan.parts(reading, direction)
        scores, logits = parts.scores.cpu(), direction.logits.cpu()
        residue = logits - scores.sum(1)
        self._check(residue, parts.size.cpu())
        self.labels = parts.labels
        found = {"scores": scores, "logits": logits, "residue": residue}
        if self.plan.by_source:
            found |= self._by_position(batch, parts, scores)
            found["residue"] = logits - found["scores"].nansum(1) - found["bias"]
            self._check(found["residue"], parts.size.cpu())
        for name, tensor in found.items():
            if name not in self.whole:
                self.whole[name] = torch.full((len(self.rows), *tensor.shape[1:]), float("nan"))
            self.whole[name][indices] = tensor.float()
        self.done.update(batch.indices)

    def _check(self, residue: torch.Tensor, size: torch.Tensor) -> None:
        """Raise unless what is left of the logit is rounding."""
        if not bool((residue.abs() <= (allowed := tolerance(self.model)) * size).all()):
            raise Unavailable(
                f"{WHAT} is not served for {self.model.model_class} on this prompt: the parts do not add up to the "
                f"logit ({float(residue.abs().max()):.1e} is left of {float(size.max()):.1e}; {allowed:.0e} of it is "
                "rounding)."
            )

    def _by_position(self, batch: Batch, parts: Parts, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores over each prompt's own positions: what heads took from there, and the rest where it is read."""
        assert parts.sources is not None
        width = max(map(len, self.rows))
        heads = torch.full((*parts.sources.shape[:-1], width), float("nan"))
        for k, row in enumerate(batch.rows):
            start = batch.starts[k] - (batch.input_ids.shape[1] - parts.sources.shape[-1])
            heads[k, ..., : len(row)] = parts.sources[k, ..., start : start + len(row)]
        whole = heads.nansum((1, 2))
        own = [i for i, label in enumerate(parts.labels[:-1]) if ".H" not in label]
        for k, row in enumerate(batch.rows):
            whole[k, self.at[batch.indices[k]]] += scores[k, own].sum()
            whole[k, len(row) :] = float("nan")
        return {"scores": whole, "heads": heads, "bias": scores[:, -1]}

    def _axes(self) -> dict[str, tuple[str, ...]]:
        axes = {name: _AXES[name] for name in self.whole}
        return axes | ({"scores": ("prompts", "positions")} if self.plan.by_source else {})

    def _plain(self, cls: type[Result]) -> Result:
        """The tensors as they were filled."""
        labels: dict[str, tuple[Any, ...]] = {"prompts": prompt_labels(self.rows, self.model)}
        tokens: tuple[tuple[str | None, ...], ...] = ()
        if self.plan.by_source:
            labels["layers"] = tuple(range(self.model.num_layers))
            labels["heads"] = tuple(range(self.whole["heads"].shape[2]))
            labels["positions"] = tuple(range(width := max(map(len, self.rows))))
            texts = [tuple(exact_texts(self.model, row.ids)) for row in self.rows]
            tokens = tuple((*own, *(None,) * (width - len(own))) for own in texts)
        else:
            labels["parts"] = self.labels
        return cls(dict(self.whole), self._axes(), labels, tokens, about=dict(self.about))

    def partial(self, call: Call) -> Result | None:
        """What is there so far; None if that is nothing."""
        if not self.whole:
            return None
        done = torch.zeros(len(self.rows), dtype=torch.bool)
        done[list(self.done)] = True
        return unfinished(call, lambda: self._plain(Result), done, ("prompts",))

    def result(self) -> DirectAttribution:
        """All of it, with the tokens whose logits were attributed."""
        found = self._plain(DirectAttribution)
        assert isinstance(found, DirectAttribution)
        tensors, axes, labels, tokens = dict(found.tensors), dict(found.axes), dict(found.labels), found.exact_tokens
        if self.plan.by == "token":
            tensors["scores"], tensors["source_ids"] = self._by_token(tensors["scores"])
            axes |= dict.fromkeys(("scores", "source_ids"), ("prompts", "tokens"))
            labels["tokens"] = tuple(range(tensors["scores"].shape[1]))
        sides = {"target_ids": self.targets.correct, "wrong_ids": self.targets.wrong}
        for name, ids in sides.items():
            if ids is not None:
                tensors[name], axes[name] = ids, ("prompts", name.replace("_ids", "s"))
                labels[axes[name][1]] = tuple(range(ids.shape[1]))
        named = torch.cat([ids.flatten() for name, ids in tensors.items() if name.endswith("_ids")])
        vocabulary = vocabulary_of(self.model, named)
        exact = token_bytes_of(self.model, vocabulary)
        return DirectAttribution(tensors, axes, labels, tokens, vocabulary, found.about, exact)

    def _by_token(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores added up over equal tokens of a prompt, and their ids, `[prompts, tokens]`, as they first occur."""
        once = [list(dict.fromkeys(row.ids)) for row in self.rows]
        width = max(map(len, once))
        whole = torch.full((len(once), width), float("nan"))
        ids = torch.full((len(once), width), -1)
        for i, (row, own) in enumerate(zip(self.rows, once, strict=True)):
            ids[i, : len(own)] = torch.tensor(own)
            place = torch.tensor([own.index(token) for token in row.ids])
            whole[i, : len(own)] = torch.zeros(len(own)).index_add_(0, place, scores[i, : len(row)])
        return whole, ids
