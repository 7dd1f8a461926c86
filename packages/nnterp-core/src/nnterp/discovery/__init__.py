"""Run the plain HuggingFace module to find where values inside its layers are, and how a layer adds its parts."""

from nnterp.discovery._assumed import Assumed, find_assumed
from nnterp.discovery._between import PROBE as BETWEEN_PROBE
from nnterp.discovery._between import find_between
from nnterp.discovery._context import ContextFact, find_context
from nnterp.discovery._declared import declared_chain, declared_lenders
from nnterp.discovery._fitting import fit
from nnterp.discovery._inside import Findings, find_inside
from nnterp.discovery._linear import Linear, find_linear
from nnterp.discovery._probe import Probe, model_inputs, probe_ids, rounding_of
from nnterp.discovery._quantised import mixes_rows, require_gradients
from nnterp.discovery._quiet import quiet, static_experts
from nnterp.discovery._recording import Call, Recording, SourceText, record
from nnterp.discovery._residual import Contribution, ResidualStructure, Term, refit, solve_residual
from nnterp.discovery._sharing import declared_sharing
from nnterp.discovery._silent import Silent, silent_weights, sounding
from nnterp.discovery._states import States, find_states
from nnterp.discovery._vision import Vision, attention_of, vision_stacks
from nnterp.discovery._without_gradients import require_passes_with_gradients
from nnterp.discovery.attention import Attention

__all__ = [
    "BETWEEN_PROBE",
    "Assumed",
    "Attention",
    "Call",
    "ContextFact",
    "Contribution",
    "Findings",
    "Linear",
    "Probe",
    "Recording",
    "ResidualStructure",
    "Silent",
    "SourceText",
    "States",
    "Term",
    "Vision",
    "attention_of",
    "declared_chain",
    "declared_lenders",
    "declared_sharing",
    "find_assumed",
    "find_between",
    "find_context",
    "find_inside",
    "find_linear",
    "find_states",
    "fit",
    "mixes_rows",
    "model_inputs",
    "probe_ids",
    "quiet",
    "record",
    "refit",
    "require_gradients",
    "require_passes_with_gradients",
    "rounding_of",
    "silent_weights",
    "solve_residual",
    "sounding",
    "static_experts",
    "vision_stacks",
]
