"""The public names of `nnterp.interventions`, imported when one of them is first asked for."""

from nnterp.interventions._ablation import AblationResult, ablate
from nnterp.interventions._attribution import (
    AttributionResult,
    Audit,
    DirectAttribution,
    attribution_patching,
    direct_logit_attribution,
)
from nnterp.interventions._circuits import Circuit, Edge, Faithfulness, edge_attribution, faithfulness
from nnterp.interventions._components import Component, components
from nnterp.interventions._features import (
    DictionaryFit,
    DictionaryMismatch,
    FeatureReport,
    dictionary_fit,
    feature_report,
)
from nnterp.interventions._fitted import (
    Lens,
    LensEvaluation,
    evaluate_lens,
    fit_jacobian_lens,
    fit_tuned_lens,
    lens_from_hub,
)
from nnterp.interventions._graphs import (
    AttributionGraph,
    GraphNode,
    GraphValidation,
    attribution_graph,
    validate_graph,
)
from nnterp.interventions._heads import HeadScores, WeightedAttention, head_scores, value_weighted_attention
from nnterp.interventions._lens import LensResult, logit_lens, logit_lens_table
from nnterp.interventions._metrics import (
    Metric,
    kl_divergence,
    logit_difference,
    probability_difference,
    target_probability,
)
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
from nnterp.interventions._shards import merge_shards, run_shards
from nnterp.interventions._steer import steer
from nnterp.interventions._steering import SteeringSweep, steering_sweep
from nnterp.interventions._subspace import SubspaceResult, fit_subspace, patch_subspace
from nnterp.interventions._targets import TargetPrompt, TargetPromptBatch, it_repeat_prompt, repeat_prompt
from nnterp.interventions._vectors import (
    ProbeResult,
    SteeringVector,
    feature_vector,
    optimize_vector,
    probe,
    steering_vectors,
)

__all__ = [
    "AblationResult",
    "AttributionGraph",
    "AttributionResult",
    "Audit",
    "Circuit",
    "Component",
    "DictionaryFit",
    "DictionaryMismatch",
    "DirectAttribution",
    "Edge",
    "Faithfulness",
    "FeatureReport",
    "GraphNode",
    "GraphValidation",
    "HeadScores",
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
    "SubspaceResult",
    "TargetPrompt",
    "TargetPromptBatch",
    "WeightedAttention",
    "ablate",
    "activation_patching",
    "attribution_graph",
    "attribution_patching",
    "components",
    "dictionary_fit",
    "direct_logit_attribution",
    "edge_attribution",
    "evaluate_lens",
    "faithfulness",
    "feature_report",
    "feature_vector",
    "fit_jacobian_lens",
    "fit_subspace",
    "fit_tuned_lens",
    "head_scores",
    "it_repeat_prompt",
    "kl_divergence",
    "lens_from_hub",
    "logit_difference",
    "logit_lens",
    "logit_lens_table",
    "merge_shards",
    "optimize_vector",
    "patch_object_attn_lens",
    "patch_subspace",
    "patchscope_generate",
    "patchscope_lens",
    "patchscope_table",
    "path_patching",
    "probability_difference",
    "probe",
    "repeat_prompt",
    "run_shards",
    "steer",
    "steering_sweep",
    "steering_vectors",
    "target_probability",
    "validate_graph",
    "value_weighted_attention",
]
