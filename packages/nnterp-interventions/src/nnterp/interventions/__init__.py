"""Interventions on any HuggingFace causal language model: lenses, patchscopes, patching, steering and ablation."""

from nnterp.interventions._lens import LensResult, logit_lens, logit_lens_table
from nnterp.interventions._patchscope import (
    PatchscopeResult,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
)
from nnterp.interventions._results import Result
from nnterp.interventions._steer import steer
from nnterp.interventions._targets import TargetPrompt, TargetPromptBatch, it_repeat_prompt, repeat_prompt

__all__ = [
    "LensResult",
    "PatchscopeResult",
    "Result",
    "TargetPrompt",
    "TargetPromptBatch",
    "it_repeat_prompt",
    "logit_lens",
    "logit_lens_table",
    "patch_object_attn_lens",
    "patchscope_generate",
    "patchscope_lens",
    "patchscope_table",
    "repeat_prompt",
    "steer",
]
