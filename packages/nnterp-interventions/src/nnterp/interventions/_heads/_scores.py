"""Kinds of heads: what each head attends to, beside a null control."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.arguments import count
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices, integer
from nnterp.inputs import Row, encode
from nnterp.interventions._heads._kinds import (
    KEYS,
    Plan,
    beginning,
    on_prompts,
    on_random_sequences,
    on_targets,
    ordinary_tokens,
)
from nnterp.interventions._heads._reading import PATTERN
from nnterp.interventions._heads._run import Run
from nnterp.interventions._layers import layers_of, layers_with
from nnterp.interventions._partial import Resume, ids_of, resumed
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, check_batch_size
from nnterp.interventions._tokens import ids_per_prompt
from nnterp.positions import describe
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

NAME_MOVER = "name_mover"


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """How far each head is of one kind, beside a null control.

    Its tensors are float32 on the CPU. `scores` `[layers, heads]` are means over prompts, from 0 to 1. `control` and
    `control_std` `[layers, heads]` are the mean and the standard deviation of the null control's scores over its draws.
    `by_prompt` `[prompts, layers, heads]` are the scores of single prompts. Of "name_mover" there are also `attention`
    and `copying` `[layers, heads]`, the two factors. NaN where a layer has fewer heads than another, and in a partial
    result where nothing is computed.

    What the control is, says `about["control"]`; layers that have no attention patterns are in
    `about["without_patterns"]`.

    Example:
        scores = head_scores(model, "previous_token", n=2)
        print(scores.top(1)[0]["layer"], scores.top(1)[0]["head"])  # → 1 1
    """

    figure: ClassVar[str] = "heads"

    def heads(self, threshold: float = 0.1, deviations: float = 3.0) -> list[dict[str, Any]]:
        """The heads that are beyond the control, highest score first.

        Args:
            threshold: The score is at least so much above the control's mean.
            deviations: And at least so many standard deviations of the control.

        Returns:
            Dicts with `layer`, `head`, `scores`, `control`, `control_std`.
        """
        above = self["scores"] - self["control"]
        beyond = (above >= threshold) & (above >= deviations * self["control_std"])
        return [cell for cell in self.top(beyond.numel()) if beyond[self._index(cell)]]

    def top(self, k: int = 10, tensor: str | None = None) -> list[dict[str, Any]]:
        """Find the heads of highest score; of another tensor, as `Result.top`.

        Returns:
            The `k` heads, highest first, each as `Result.top` gives it, with its "control" and "control_std".
        """
        cells = super().top(k, tensor)
        if tensor in (None, self.main):
            for cell in cells:
                cell |= {name: self[name][self._index(cell)].item() for name in ("control", "control_std")}
        return cells

    def _index(self, cell: dict[str, Any]) -> tuple[int, int]:
        return self.labels["layers"].index(cell["layer"]), self.labels["heads"].index(cell["head"])


@plain_defaults()
def head_scores(
    model: StandardizedTransformer,
    kind: str,
    prompts: Any = None,
    targets: Any = None,
    *,
    layers: Indices = None,
    n: int = 16,
    length: int = 25,
    draws: int = 5,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
) -> HeadScores:
    """How far each head is of a kind: the share of its attention that goes where such a head attends, and a control.

    | kind | attention, mean over queries | from |
    |---|---|---|
    | "previous_token" | to the token before | Elhage et al., 2021 |
    | "duplicate_token" | to earlier occurrences of the same token | Wang et al., 2022 |
    | "induction" | to the tokens after earlier occurrences of the same token | Olsson et al., 2022 |
    | "first_token" | to position 0, an attention sink | Xiao et al., 2023 |
    | "name_mover" | of the last token to the target token, where the head copies it | Wang et al., 2022 |

    The first four are taken on sequences of random tokens, each of which occurs twice (BOS in front, where the
    tokenizer writes one), or on prompts of your own. Attention to position 0 counts for "first_token" alone.

    "name_mover" needs prompts and targets. Its score is the attention to the target token, counted only if the head
    copies that token: of what the head writes when it attends to this position alone (its value through W_O, and the
    layer's post-norm where there is one), read out by the model's final norm and head, the token is among the top five.
    (The copying score of Wang et al., section 3.1 and appendix.)

    The control of "duplicate_token" and "induction" on random sequences is the attention at the same positions of
    sequences whose second halves are shuffled, so that no token keeps its place: a head that attends to a distance and
    not to a token has the same score there. All others compare with the same queries' attention to random other keys.

    Args:
        model: The model, loaded with `enable_attention_probs=True`.
        kind: One of the kinds above.
        prompts: Texts, token ids or chats; random sequences if None.
        targets: For "name_mover" the token that is attended to: a token id or a text that is one token, or a list with
            one entry (or list of entries) for each prompt.
        layers: The layers; by default all that have attention patterns.
        n: Number of random sequences.
        length: Tokens of a random sequence before it repeats.
        draws: Draws of the control, at least 2.
        seed: Of the sequences and of the control.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service; patterns are reduced there.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what it holds is not run again.

    Returns:
        A `HeadScores`, with `.heads()`, `.top(k)` and `.plot()`. A call costs one forward pass for each prompt; on
        random sequences, for "duplicate_token" and "induction", `1 + draws` for each.

    Raises:
        ValueError: There is no such kind, a prompt holds no query of it, or prompts or targets are missing or too many.
        Unavailable: No layer, or one that was asked for, has attention patterns (`enable_attention_probs=True` is
            missing, or the model has no attention); for "name_mover" also where what a head writes cannot be told.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`.

    Example:
        heads = head_scores(model, "induction", n=2).heads()
    """
    model.require_no_trace("head_scores()")
    check_batch_size(batch_size)
    if kind not in (*KEYS, NAME_MOVER):
        raise ValueError(f"kind is one of {', '.join(map(repr, (*KEYS, NAME_MOVER)))}, not {kind!r}.")
    draws, seed = count(draws, "draws", 2), integer(seed, "seed")
    model.prepare(remote)
    chosen = layers_with(model, [PATTERN], layers)
    plan = _plan(model, kind, prompts, targets, count(n, "n"), count(length, "length", 2), draws, seed)
    asked = {
        "kind": kind,
        "prompts": ids_of(plan.rows),
        "looks": [tuple(look) for look in plan.looks],
        "layers": chosen,
    }
    call = Call(model, "head_scores", asked, {})
    run = Run(model, plan, chosen, kind == NAME_MOVER, resumed(call, resume))
    told = {"kind": kind, "draws": draws, "seed": seed, "random": prompts is None}
    about = describe_run(model, "head_scores", **told)
    about |= {"control": plan.control, "without_patterns": [i for i in layers_of(model, layers) if i not in chosen]}

    def made() -> HeadScores:
        return _result(model, plan, chosen, run.whole(), about)

    with call.keeping(lambda: run.partial(call, made)):
        run.batches(batch_size, progress, remote)
    return made()


def _plan(
    model: StandardizedTransformer, kind: str, prompts: Any, targets: Any, n: int, length: int, draws: int, seed: int
) -> Plan:
    """What is run."""
    rng = random.Random(seed)
    if kind != NAME_MOVER and targets is not None:
        raise ValueError(f'targets are for kind="{NAME_MOVER}"; {kind!r} finds its keys itself.')
    if kind == NAME_MOVER:
        if prompts is None or targets is None:
            raise ValueError(
                f'kind="{NAME_MOVER}" needs prompts, and as targets the token of each that a head moves to the end: '
                "task = nnterp.prompts.tasks.ioi(model); head_scores(model, kind, task.clean, task.correct)."
            )
        rows = encode(model, prompts)
        return on_targets(model, rows, ids_per_prompt(model, targets, len(rows), "targets"), draws, rng)
    if prompts is not None:
        rows = encode(model, prompts)
        return on_prompts(kind, rows, draws, rng, [describe(model, row) for row in rows])
    front = beginning(model)
    halves = [ordinary_tokens(model, length, rng) for _ in range(n)]
    encode(model, [[*front, *half, *half] for half in halves])  # refused here if longer than the model's context
    return on_random_sequences(kind, halves, front, draws, rng)


def _result(
    model: StandardizedTransformer, plan: Plan, layers: list[int], whole: dict[str, torch.Tensor], about: dict[str, Any]
) -> HeadScores:
    """Means over prompts and draws of `[groups, layers, heads]`."""
    by_draw = {name: t.unflatten(0, (1 + plan.draws, len(plan.prompts))) for name, t in whole.items()}
    control = by_draw["scores"][1:].mean(1)  # [draws, layers, heads]
    tensors: dict[str, torch.Tensor] = {
        "scores": by_draw["scores"][0].mean(0),
        "control": control.mean(0),
        "control_std": control.std(0),
        **{name: by_draw[name][0].mean(0) for name in ("attention", "copying") if name in whole},
        "by_prompt": by_draw["scores"][0],
    }
    axes: dict[str, tuple[str, ...]] = dict.fromkeys(tensors, ("layers", "heads"))
    axes["by_prompt"] = ("prompts", "layers", "heads")
    labels = {
        "layers": tuple(layers),
        "heads": tuple(range(tensors["scores"].shape[1])),
        "prompts": prompt_labels([Row(row.ids, row.text) for row in plan.prompts], model),
    }
    return HeadScores(tensors, axes, labels, about=about)
