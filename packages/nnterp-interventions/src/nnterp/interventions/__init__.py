"""Interventions on any HuggingFace causal language model: lenses, patchscopes, patching, steering and ablation."""

from nnterp.interventions._lens import LensResult, logit_lens, logit_lens_table
from nnterp.interventions._results import Result

__all__ = ["LensResult", "Result", "logit_lens", "logit_lens_table"]
