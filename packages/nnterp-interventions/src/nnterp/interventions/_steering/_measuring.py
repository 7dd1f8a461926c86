"""Running the prompts of a sweep once, steered or not, and measuring what is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.inputs import Batch, Row, batches, forward_flags, left_padded
from nnterp.interventions._steering._damage import GENERATED, own_tokens, read_rows, repetition

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


class Measuring:
    """The rows of a sweep, and what is measured of each.

    The first run is that of the model without the steering; later ones are compared with it.

    Args:
        model: The model.
        prompts: The prompts of the metric.
        damage: Measure → the rows it is taken on.
        max_new_tokens: The longest generation.
        batch_size: Rows that share a forward pass.
        remote: Run on the remote service.

    Attributes:
        plain_last: Logits after each prompt without the steering, float32 `[prompts, vocab]`, after the first run.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        prompts: list[Row],
        damage: dict[str, list[Row]],
        max_new_tokens: int,
        batch_size: int,
        remote: Any,
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}; give at least 1.")
        self.model, self.prompts, self.damage, self.remote = model, prompts, damage, remote
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        kinds: dict[tuple[int, ...], list[tuple[str, int]]] = {}  # equal rows run once
        sets = {"last": prompts, "kl": damage.get("kl", []), "nll": damage.get("perplexity", [])}
        for kind, rows in sets.items():
            for index, row in enumerate(rows):
                kinds.setdefault(row.ids, []).append((kind, index))
        self.rows = [Row(ids) for ids in kinds]
        self.measures = list(kinds.values())
        self.plain: dict[int, torch.Tensor] = {}  # of each neutral prompt, its log-probabilities
        self.plain_last: torch.Tensor | None = None

    def run(self) -> dict[str, Any]:
        """One pass over everything: "last", the logits after each prompt, and each measure of damage."""
        first = self.plain_last is None
        found: dict[tuple[str, int], torch.Tensor] = {}
        with left_padded(self.model.tokenizer):
            for batch in batches(self.model, self.rows, self.batch_size):
                self._forward(batch, first, found)
            made = self._generate() if any(name in self.damage for name in GENERATED) else []
        last = torch.stack([found["last", i] for i in range(len(self.prompts))])
        if first:
            self.plain = {index: logs for (kind, index), logs in found.items() if kind == "plain"}
            self.plain_last = last
        return {"last": last, **self._damage(found, made, first)}

    def _forward(self, batch: Batch, first: bool, found: dict[tuple[str, int], torch.Tensor]) -> None:
        """One forward pass, reduced inside the trace."""
        keys, wanted = [], []
        for row, index in enumerate(batch.indices):
            for kind, own in self.measures[index]:
                name = "plain" if kind == "kl" and first else kind
                given = (
                    self.plain[own] if name == "kl" else torch.tensor(batch.rows[row].ids) if name == "nll" else None
                )
                keys.append((name, own))
                wanted.append((name, row, len(batch.rows[row]), given))
        model, inputs = self.model, {**batch.encoding, **forward_flags(self.model)}
        with torch.no_grad(), model.trace(inputs, remote=self.remote):
            read = read_rows(model.logits, wanted)
            read.save()  # type: ignore[attr-defined]  # every object has it in a trace
        found.update(zip(keys, read, strict=True))

    def _generate(self) -> list[list[int]]:
        """The new tokens of each prompt, greedily."""
        rows = next(self.damage[name] for name in GENERATED if name in self.damage)
        made: dict[int, list[int]] = {}
        tokenizer, config = self.model.tokenizer, getattr(self.model._module, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
        ends = set() if given is None else {given} if isinstance(given, int) else set(given)
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        settings["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
        )
        for batch in batches(self.model, rows, self.batch_size):
            with torch.no_grad(), self.model.generate(batch.encoding, remote=self.remote, **settings) as tracer:
                whole = tracer.result.save()
            new = own_tokens(whole[:, batch.input_ids.shape[1] :].cpu(), ends)
            made.update(zip(batch.indices, new, strict=True))
        return [made[i] for i in range(len(rows))]

    def _damage(
        self, found: dict[tuple[str, int], torch.Tensor], made: list[list[int]], first: bool
    ) -> dict[str, float]:
        """Each measure, put together from the rows."""
        measures: dict[str, float] = {}
        for name, rows in self.damage.items():
            if name == "kl" and not first:
                positions = sum(len(row) for row in rows)
                measures[name] = sum(found["kl", i].item() for i in range(len(rows))) / positions
            elif name == "perplexity":
                predicted = sum(len(row) - 1 for row in rows)
                total = sum(found["nll", i].double().cpu() for i in range(len(rows)))
                measures[name] = float(torch.as_tensor(total / predicted).exp())
            elif name == "repetition":
                measures[name] = repetition(made)
            elif name == "length":
                measures[name] = sum(map(len, made)) / len(made)
        return measures
