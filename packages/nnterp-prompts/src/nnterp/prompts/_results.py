"""What a run found: categories × prompts (× layers)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from nnterp import plugins

if TYPE_CHECKING:
    import pandas as pd

Among = Literal["categories", "vocabulary"]


class PromptResults(dict[str, torch.Tensor]):
    """Scores of each category, as a dict and with what one wants to know next.

    `results["target"]` is `[prompts]`, or `[prompts, layers]` from a function with layers; float32 on the CPU. With
    `scoring="first_token"` it is a probability (the sum over the category's tokens), with `scoring="sequence"` a
    log-probability. Prompts that were not run yet are NaN. Made by `run_prompts` and `PromptResults.load`.

    Attributes:
        categories: Their names.
        texts: For each prompt what the model read, chat templates applied.
        metadata: For each prompt its `Prompt.metadata`.
        log_probs: Natural logarithms of all scores, `[prompts, categories]` or `[prompts, layers, categories]`,
            float64.
        vocabulary_ranks: Rank of each category's most probable token in the whole vocabulary (1 is the top),
            `[prompts, categories]`, int64, 0 where not run; None where only the targets left the model.
        done: Which prompts were run, `[prompts]`.
        pending: Of prompts that are read in several rows and not done, the answers to rows that were run.
        settings: What was asked: scoring, length normalisation, the function, the model.
        fingerprints: A digest of what each prompt asks.
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
        """Make the dict what the tensors say."""
        scores = self.log_probs if self.scoring == "sequence" else self.log_probs.exp()
        for i, name in enumerate(self.categories):
            self[name] = scores[..., i].float()

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def scoring(self) -> str:
        """ "first_token": values are probabilities; "sequence": they are log-probabilities."""
        return self.settings["scoring"]

    @property
    def complete(self) -> bool:
        """Whether every prompt was run."""
        return bool(self.done.all())

    @property
    def num_layers(self) -> int | None:
        """Length of the axis of layers, None where there is none."""
        return self.log_probs.shape[1] if self.log_probs.dim() == 3 else None

    def __repr__(self) -> str:
        kind = "log-probability" if self.scoring == "sequence" else "probability"
        layers = "" if self.num_layers is None else f", {self.num_layers} layers (the last is shown)"
        means = []
        for name in self.categories:
            values = self[name][self.done]
            last = values if values.dim() < 2 else values[:, -1]
            means.append(f"{name!r}: {last.mean().item():.4g}" if len(last) else f"{name!r}: –")
        count = f"{int(self.done.sum())} of {len(self.done)} prompts"
        return f"<PromptResults: {count}{layers}; mean {kind} {', '.join(means)}>"

    # -- what one wants to know next -------------------------------------------------------------------------------

    def ranks(self, target: str = "target", among: Among = "categories") -> torch.Tensor:
        """Rank of a category, 1 for the most probable; a tie counts against it.

        Args:
            target: The category.
            among: "categories", or "vocabulary" for the rank of its most probable token among all tokens.

        Returns:
            `[prompts]` or `[prompts, layers]`, int64, 0 for prompts that were not run.

        Raises:
            KeyError: There is no such category.
            ValueError: There is nothing to rank among.
        """
        index = self._index(target)
        if among == "vocabulary":
            if self.vocabulary_ranks is None:
                raise ValueError(
                    "Ranks in the vocabulary are known only for the model's own next-token distribution "
                    "(get_probs_func=None, "
                    "scoring='first_token'); of other functions only the targets are kept. Ask for among='categories'."
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
        ranks[~self.done] = 0
        return ranks

    def accuracy(self, target: str = "target", among: Among = "categories") -> float | torch.Tensor:
        """Share of the prompts that were run in which a category is strictly the most probable, see `ranks`.

        Returns:
            A number, or `[layers]` float32.

        Raises:
            ValueError: No prompt was run, or there is nothing to rank among.
        """
        if not self.done.any():
            raise ValueError("No prompt was run, so there is no accuracy.")
        share = (self.ranks(target, among)[self.done] == 1).float().mean(0)
        return share if share.dim() else share.item()

    def logit_difference(self, target: str, other: str) -> torch.Tensor:
        """`log p(target) - log p(other)`: the difference of logits where each is one token, of log-sum-exps otherwise.

        Returns:
            `[prompts]` or `[prompts, layers]`, float32 on the CPU, NaN for prompts that were not run.

        Raises:
            KeyError: There is no such category.
        """
        return (self.log_probs[..., self._index(target)] - self.log_probs[..., self._index(other)]).float()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt and category (and layer), prompts that were not run left out.

        Columns: `prompt_index`, `prompt`, `category`, `layer` (with layers), `probability` or `log_probability`, and
            the
        prompts' metadata.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_dataframe() needs pandas: pip install 'nnterp-prompts[dataframe]'") from error
        value = "log_probability" if self.scoring == "sequence" else "probability"
        names = ["prompt_index", "prompt", "category", *(["layer"] if self.num_layers is not None else []), value]
        extra = list(dict.fromkeys(key for data in self.metadata for key in data if key not in names))
        rows = []
        for i in self.done.nonzero().flatten().tolist():
            beside = [self.metadata[i].get(key) for key in extra]
            for name in self.categories:
                scores = self[name][i]
                if scores.dim() == 0:
                    rows.append([i, self.texts[i], name, scores.item(), *beside])
                else:
                    rows.extend(
                        [i, self.texts[i], name, layer, score, *beside] for layer, score in enumerate(scores.tolist())
                    )
        return pd.DataFrame(rows, columns=[*names, *extra])

    def plot(self, **options: Any) -> Any:
        """Each category over layers, with a band over prompts: the figure `targets` of an installed display package.

        Args:
            **options: Of the figure, see `nnterp.display.plot_targets`.

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
        """Write `scores.safetensors` and `run.json` to a folder, made where missing; no file is ever half written."""
        from nnterp.prompts._storage import save

        save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> PromptResults:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There are no results in the folder.
            ValueError: Its two files do not belong together.
        """
        from nnterp.prompts._storage import load

        return load(folder)

    # -- while a run goes on ---------------------------------------------------------------------------------------

    def _record(self, index: int, log_probs: torch.Tensor, ranks: torch.Tensor | None) -> None:
        """Take in one prompt: `[categories]` or `[layers, categories]`."""
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
