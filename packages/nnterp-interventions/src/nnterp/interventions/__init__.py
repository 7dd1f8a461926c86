"""Interventions on any HuggingFace causal language model: lenses, patchscopes, patching, steering and ablation."""

from nnterp.interventions._ablation import AblationResult, ablate
from nnterp.interventions._attribution import DirectAttribution, direct_logit_attribution
from nnterp.interventions._circuits import Circuit, Edge, Faithfulness, edge_attribution, faithfulness
from nnterp.interventions._components import Component, components
from nnterp.interventions._fitted import Lens, LensEvaluation, evaluate_lens, fit_jacobian_lens, fit_tuned_lens
from nnterp.interventions._lens import LensResult, logit_lens, logit_lens_table
from nnterp.interventions._metrics import Metric, kl_divergence, logit_difference, target_probability
from nnterp.interventions._patching import PatchingResult, activation_patching
from nnterp.interventions._patchscope import (
    PatchscopeResult,
    patch_object_attn_lens,
    patchscope_lens,
    patchscope_table,
)
from nnterp.interventions._patchscope_generate import patchscope_generate
from nnterp.interventions._paths import PathResult, path_patching
from nnterp.interventions._results import Result
from nnterp.interventions._steer import steer
from nnterp.interventions._steering import SteeringSweep, steering_sweep
from nnterp.interventions._targets import TargetPrompt, TargetPromptBatch, it_repeat_prompt, repeat_prompt
from nnterp.interventions._vectors import ProbeResult, SteeringVector, optimize_vector, probe, steering_vectors

__all__ = [
    "AblationResult",
    "Circuit",
    "Component",
    "DirectAttribution",
    "Edge",
    "Faithfulness",
    "Lens",
    "LensEvaluation",
    "LensResult",
    "Metric",
    "PatchingResult",
    "PatchscopeResult",
    "PathResult",
    "ProbeResult",
    "Result",
    "SteeringSweep",
    "SteeringVector",
    "TargetPrompt",
    "TargetPromptBatch",
    "ablate",
    "activation_patching",
    "components",
    "direct_logit_attribution",
    "edge_attribution",
    "evaluate_lens",
    "faithfulness",
    "fit_jacobian_lens",
    "fit_tuned_lens",
    "it_repeat_prompt",
    "kl_divergence",
    "logit_difference",
    "logit_lens",
    "logit_lens_table",
    "optimize_vector",
    "patch_object_attn_lens",
    "patchscope_generate",
    "patchscope_lens",
    "patchscope_table",
    "path_patching",
    "probe",
    "repeat_prompt",
    "steer",
    "steering_sweep",
    "steering_vectors",
    "target_probability",
]
