"""`PromptResults`: the scores of categories × prompts (× layers)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from nnterp import plugins
from nnterp.arguments import path_of
from nnterp.errors import NnterpError
from nnterp.prompts import _storage
from nnterp.prompts._frames import scores_frame
from nnterp.prompts._missing import warn_of_missing

if TYPE_CHECKING:
    import pandas as pd

Among = Literal["categories", "vocabulary"]


class PromptResults(dict[str, torch.Tensor]):
    """Scores of each category: a dict, with methods for what one looks at next.

    `results["target"]` is `[prompts]`, or `[prompts, layers]` from a function that reads layers; float32 on the CPU.
    With `scoring="first_token"` a score is a probability, the sum over the category's tokens. With `scoring="sequence"`
    it is a log-probability. Prompts that were not run are NaN, and so are prompts for which the model's logits (or a
    function's probabilities) are NaN or infinite; see `missing`. `run_prompts` and `PromptResults.load` make it.

    Attributes:
        categories: Names of the categories.
        texts: The text that the model read for each prompt, after the chat template if it is a chat.
        metadata: The `Prompt.metadata` of each prompt.
        log_probs: Natural logarithms of all scores, `[prompts, categories]` or `[prompts, layers, categories]`,
            float64.
        vocabulary_ranks: Rank in the whole vocabulary of each category's most probable token, where 1 is the top:
            `[prompts, categories]`, int64, 0 for prompts that were not run or are missing. None if only the targets
            left the model.
        done: True for prompts that were run, `[prompts]`.
        pending: The rows that were run of prompts that are not done, with their answers. Only prompts that are read in
            several rows are here.
        settings: How the run was made: the scoring, the length normalisation, the function, the model.
        fingerprints: A digest of what each prompt asks.

    Example:
        asked = [Prompt.from_strings("The capital of France is", {"right": "Paris", "wrong": "Rome"}, model)]
        results = run_prompts(model, asked)
        print(results.accuracy("right"), list(results["right"].shape))  # → 1.0 [1]
    """

    def __init__(
        self,
        categories: tuple[str, ...],
        texts: list[str],
        metadata: list[dict[str, Any]],
        settings: dict[str, Any],
        fingerprints: list[str],
        log_probs: torch.Tensor | None = None,
        vocabulary_ranks: torch.Tensor | None = None,
        done: torch.Tensor | None = None,
        pending: dict[int, dict[int, torch.Tensor]] | None = None,
    ) -> None:
        dict.__init__(self)
        self.categories = tuple(categories)
        self.texts = texts
        self.metadata = metadata
        self.settings = settings
        self.fingerprints = fingerprints
        count = len(texts)
        self.log_probs = (
            torch.full((count, len(categories)), torch.nan, dtype=torch.float64) if log_probs is None else log_probs
        )
        self.vocabulary_ranks = vocabulary_ranks
        self.done = torch.zeros(count, dtype=torch.bool) if done is None else done
        self.pending = pending or {}
        self._fill()

    def _fill(self) -> None:
        """Set the dict's values from `log_probs`."""
        scores = self.log_probs if self.scoring == "sequence" else self.log_probs.exp()
        for i, name in enumerate(self.categories):
            self[name] = scores[..., i].float()

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def scoring(self) -> str:
        """The scoring: "first_token" if scores are probabilities, "sequence" if they are log-probabilities."""
        return self.settings["scoring"]

    @property
    def complete(self) -> bool:
        """True if every prompt was run."""
        return bool(self.done.all())

    @property
    def num_layers(self) -> int | None:
        """Length of the axis of layers; None if there is no such axis."""
        return self.log_probs.shape[1] if self.log_probs.dim() == 3 else None

    @property
    def missing(self) -> torch.Tensor:
        """True for prompts that were run and have no score, because a category is NaN: bool `[prompts]` or
        `[prompts, layers]`, on the CPU."""
        missing = self.log_probs.isnan().any(-1)
        missing[~self.done] = False
        return missing

    def __repr__(self) -> str:
        kind = "log-probability" if self.scoring == "sequence" else "probability"
        layers = "" if self.num_layers is None else f", {self.num_layers} layers (the last is shown)"
        means = []
        for name in self.categories:
            values = self[name][self.done]
            last = values if values.dim() < 2 else values[:, -1]
            last = last[~last.isnan()]
            means.append(f"{name!r}: {last.mean().item():.4g}" if len(last) else f"{name!r}: –")
        count = f"{int(self.done.sum())} of {len(self.done)} prompts"
        if missing := int(self.missing.flatten(1).any(1).sum() if self.num_layers else self.missing.sum()):
            count += f", {missing} of them without a score"
        scores = f"; mean {kind} {', '.join(means)}" if means else ""
        return f"<PromptResults: {count}{layers}{scores}>"

    # -- metrics ---------------------------------------------------------------------------------------------------

    def ranks(self, target: str = "target", among: Among = "categories") -> torch.Tensor:
        """Return the rank of a category, where 1 is the most probable. A tie counts against the category.

        Args:
            target: The category.
            among: "categories" ranks it among the categories. "vocabulary" ranks its most probable token among all
                tokens.

        Returns:
            `[prompts]` or `[prompts, layers]`, int64 on the CPU, 0 for prompts that were not run or are `missing`.

        Raises:
            KeyError: There is no such category.
            ValueError: It is the only category, or ranks in the vocabulary are not known.
        """
        index = self._index(target)
        if among == "vocabulary":
            if self.vocabulary_ranks is None:
                raise ValueError(
                    "Ranks in the vocabulary are known only for the model's own next-token distribution "
                    "(get_probs_func=None, scoring='first_token'). Of other functions only the targets are kept: ask "
                    "for among='categories'."
                )
            return self.vocabulary_ranks[:, index]
        if among != "categories":
            raise ValueError(f"among={among!r}: there are 'categories' and 'vocabulary'.")
        if len(self.categories) < 2:
            raise ValueError(
                f"{target!r} is the only category, so there is nothing to rank it among; try among='vocabulary'."
            )
        others = torch.cat((self.log_probs[..., :index], self.log_probs[..., index + 1 :]), dim=-1)
        ranks = (others >= self.log_probs[..., index : index + 1]).sum(-1) + 1
        return ranks.masked_fill(self.log_probs.isnan().any(-1), 0)

    def accuracy(self, target: str = "target", among: Among = "categories") -> float | torch.Tensor:
        """Return the share of prompts in which a category has rank 1; see `ranks`.

        Prompts that were not run do not count, and neither do prompts that are `missing`; a `MissingScoresWarning` says
        how many those are.

        Returns:
            A number, or `[layers]` float32 on the CPU. NaN if all prompts are missing.

        Raises:
            KeyError: There is no such category.
            ValueError: No prompt was run, or `ranks` raises.
        """
        if not self.done.any():
            raise ValueError("No prompt was run, so there is no accuracy.")
        ranks = self.ranks(target, among)[self.done]
        warn_of_missing(ranks == 0, "The accuracy leaves them out.")
        share = (ranks == 1).sum(0) / (ranks > 0).sum(0)
        return share if share.dim() else share.item()

    def logit_difference(self, target: str, other: str) -> torch.Tensor:
        """Return `log p(target) - log p(other)`.

        For categories of one token each it is the difference of their logits, otherwise of the log-sum-exps of their
        tokens' logits.

        Returns:
            `[prompts]` or `[prompts, layers]`, float32 on the CPU. NaN for prompts that were not run or are `missing`,
            and where both probabilities are 0.

        Raises:
            KeyError: There is no such category.
        """
        return (self.log_probs[..., self._index(target)] - self.log_probs[..., self._index(other)]).float()

    def to_dataframe(self) -> pd.DataFrame:
        """Make a data frame of the prompts that were run.

        Columns: `prompt_index`, `prompt`, `category`, `layer` (if there are layers), `probability` or
        `log_probability`, and the keys of the prompts' metadata.

        Returns:
            One row for each category (and layer) of each prompt that was run.

        Raises:
            ImportError: pandas is not installed.
        """
        value = "log_probability" if self.scoring == "sequence" else "probability"
        chosen = self.done.nonzero().flatten().tolist()
        return scores_frame(self, value, self.texts, self.metadata, chosen)

    def plot(self, **options: Any) -> Any:
        """Draw each category over layers, with a band over prompts.

        An installed display package draws it: the figure registered as `targets`.

        Args:
            **options: Passed to the figure; see `nnterp.display.plot_targets`.

        Returns:
            What that package returns: with nnterp-display a `plotly.graph_objects.Figure`.

        Raises:
            ValueError: There are no layers.
            ImportError: No installed package draws it.
        """
        if self.num_layers is None:
            raise ValueError(
                "There is no axis of layers to plot over: run_prompts(..., get_probs_func=logit_lens) has one."
            )
        draw = plugins.load(plugins.FIGURES, "targets")
        if draw is None:
            raise ImportError("plot() needs a package that draws figures: pip install nnterp-display")
        unit = "log-probability" if self.scoring == "sequence" else "probability"
        return draw({name: self[name][self.done] for name in self.categories}, **{"unit": unit, **options})

    def _index(self, target: str) -> int:
        if target not in self.categories:
            raise KeyError(f"There is no category {target!r}; there are: {', '.join(map(repr, self.categories))}.")
        return self.categories.index(target)

    # -- on disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `scores.safetensors` and `run.json` to a folder, which is made if it does not exist.

        `scores.safetensors` holds everything; `run.json` is a copy of the texts, metadata and settings to read. The
        folder holds the old results or the new ones at any moment, also if the write is cut short.

        Raises:
            FileExistsError: The folder holds a file of that name that `save` did not write.
            OSError: The folder cannot be made or written.
        """
        tensors = {"log_probs": self.log_probs, "done": self.done}
        if self.vocabulary_ranks is not None:
            tensors["vocabulary_ranks"] = self.vocabulary_ranks
        for i, rows in self.pending.items():
            tensors |= {f"pending.{i}.{j}": answer for j, answer in rows.items()}
        prompts = [
            {"text": text, "fingerprint": fingerprint, "metadata": data}
            for text, fingerprint, data in zip(self.texts, self.fingerprints, self.metadata, strict=True)
        ]
        record = {"categories": self.categories, "settings": self.settings, "prompts": prompts}
        _storage.write(folder, tensors, record)

    @classmethod
    def load(cls, folder: str | Path) -> PromptResults:
        """Return the results that `save` wrote to a folder.

        Raises:
            FileNotFoundError: There are no results in the folder.
            ValueError: A file is truncated, damaged or foreign, the two files are not of one run, or another version of
                this package wrote them. The message names the file.
        """
        tensors, record = _storage.read(path_of(folder, "folder"))
        pending: dict[int, dict[int, torch.Tensor]] = {}
        try:
            prompts = record["prompts"]
            for name in tensors:
                if name.startswith("pending."):
                    _, i, j = name.split(".")
                    pending.setdefault(int(i), {})[int(j)] = tensors[name]
            return cls(
                categories=tuple(record["categories"]),
                texts=[prompt["text"] for prompt in prompts],
                metadata=[prompt["metadata"] for prompt in prompts],
                settings=record["settings"],
                fingerprints=[prompt["fingerprint"] for prompt in prompts],
                log_probs=tensors["log_probs"],
                vocabulary_ranks=tensors.get("vocabulary_ranks"),
                done=tensors["done"],
                pending=pending,
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{folder} holds results that were changed or damaged: {error!r}.") from error

    # -- during a run ----------------------------------------------------------------------------------------------

    def _record(self, index: int, log_probs: torch.Tensor, ranks: torch.Tensor | None) -> None:
        """Store the scores of one prompt.

        Args:
            index: The prompt.
            log_probs: `[categories]` or `[layers, categories]`.
            ranks: Ranks in the vocabulary, `[categories]`, if they are known.

        Raises:
            ValueError: The shape is not that of the prompts before.
        """
        if log_probs.dim() == 2 and self.log_probs.dim() == 2:
            if self.done.any():
                raise ValueError(f"The function returned layers for prompt {index}, and none for prompts before.")
            self.log_probs = torch.full((len(self.texts), *log_probs.shape), torch.nan, dtype=torch.float64)
        if self.log_probs.shape[1:] != log_probs.shape:
            raise ValueError(
                f"The function's scores for prompt {index} have shape {list(log_probs.shape)}, those of prompts before "
                f"{list(self.log_probs.shape[1:])}."
            )
        self.log_probs[index] = log_probs
        if ranks is not None:
            if self.vocabulary_ranks is None:
                self.vocabulary_ranks = torch.zeros((len(self.texts), len(self.categories)), dtype=torch.int64)
            self.vocabulary_ranks[index] = ranks
        self.done[index] = True


class IncompleteRunError(NnterpError, RuntimeError):
    """A batch failed, or a checkpoint could not be written at the end. What was computed before is kept.

    Its `__cause__` is the error of the batch or of the write.

    Attributes:
        partial: The `PromptResults` so far, NaN for prompts that are not done. `run_prompts(..., resume=partial)` goes
            on from there.

    Example:
        asked = [Prompt.from_strings(text, {"right": "Paris"}, model) for text in prompts]
        try:
            results = run_prompts(model, asked)
        except IncompleteRunError as error:  # what was computed is kept
            results = run_prompts(model, asked, batch_size=4, resume=error.partial)
    """

    def __init__(self, message: str, partial: PromptResults) -> None:
        super().__init__(message)
        self.partial = partial
