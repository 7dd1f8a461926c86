"""Where each row of a generation ended, as transformers decided it while it generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # they cost seconds to import, and only a generation needs them
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation import StoppingCriteriaList

_PLAIN = ("greedy_search", "sample")
# Settings whose code is given the whole rows, padding included, with the values at which they do nothing.
_READ_PADDING = {
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "watermarking_config": (None,),
}
_USERS_CODE = ("stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn")


class Ends:
    """While the block is open, notes after each step of the module's `generate` which rows are done.

    Rows end at end tokens, stop strings, a time limit or a user's own criteria, given as arguments or in a
    `GenerationConfig`. transformers puts all of them into one list, which is asked after each step.

    Raises:
        ValueError: Inside `generate`: it is not a plain generation with one row for each prompt.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.steps: list[torch.Tensor] = []

    def __enter__(self) -> Ends:
        original = self.module._get_stopping_criteria

        def watched(generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
            require_plain(generation_config)
            return _watched(original(generation_config, *args, **kwargs), self.steps)

        self.module.__dict__["_get_stopping_criteria"] = watched
        return self

    def __exit__(self, *_: Any) -> None:
        del self.module.__dict__["_get_stopping_criteria"]

    def own(self, made: int) -> torch.Tensor:
        """Which of `made` new tokens are a row's own: those up to and with the step at which it was done; bool.

        Raises:
            ValueError: This model's `generate` did not ask its stopping criteria after each step.
        """
        if len(self.steps) < made:
            raise ValueError(
                f"{type(self.module).__name__}.generate does not say where its rows end, so what is padding cannot be "
                "told. Generate first, and collect the values of the whole text."
            )
        done = torch.stack(self.steps[:made], dim=1).long().cumsum(1)
        return torch.cat([torch.ones_like(done[:, :1], dtype=torch.bool), done[:, :-1] == 0], dim=1)


def _watched(criteria: StoppingCriteriaList, steps: list[torch.Tensor]) -> StoppingCriteriaList:
    """The same criteria, which also note in `steps` the rows that are done after each step."""
    from transformers.generation import StoppingCriteriaList

    class Watched(StoppingCriteriaList):
        def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
            done = super().__call__(input_ids, scores, **kwargs)
            steps.append(done.detach().cpu())
            return done

    return Watched(criteria)


def require_plain(config: GenerationConfig) -> None:
    """Raise unless each prompt has one row, and each step is one forward pass.

    Raises:
        ValueError: It has more, or there are other passes (beams, assisted or contrastive generation, guidance).
    """
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    more = {
        f"num_return_sequences={config.num_return_sequences}": (config.num_return_sequences or 1) > 1,
        f"num_beams={config.num_beams}": (config.num_beams or 1) > 1,
        f"guidance_scale={config.guidance_scale}": config.guidance_scale not in (None, 1, 1.0),
        f"the generation mode {mode!r}": mode not in _PLAIN,
    }
    wrong = [name for name, is_so in more.items() if is_so]
    if wrong:
        raise ValueError(
            f"collect() over a generation follows one row for each prompt, one forward pass for each token; "
            f"{wrong[0]} does not. Generate first, and collect the values of the whole texts as token ids."
        )


def reads_padding(module: PreTrainedModel, generation: Mapping[str, Any]) -> bool:
    """Whether settings of a generation look at whole rows: then padding could change what a row generates."""
    given = generation.get("generation_config")
    sources = [generation, vars(given) if given is not None else {}, vars(module.generation_config or object)]
    for name, idle in _READ_PADDING.items():
        value = next((source[name] for source in sources if source.get(name) is not None), None)
        if value not in idle:
            return True
    return any(generation.get(name) for name in _USERS_CODE)
