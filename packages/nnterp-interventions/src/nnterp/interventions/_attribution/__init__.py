"""Attribution: how much each part of a model gives to what it predicts, directly or to first order."""

from nnterp.interventions._attribution._audit import AUDIT, Audit, audited
from nnterp.interventions._attribution._direct import direct_logit_attribution
from nnterp.interventions._attribution._direct_result import DirectAttribution
from nnterp.interventions._attribution._nodes import attribution_patching
from nnterp.interventions._attribution._readout import Targets, Unembedding, softcap_of
from nnterp.interventions._attribution._result import AttributionResult
from nnterp.interventions._attribution._shares import Shares, head_shares, shares_of
from nnterp.interventions._attribution._slopes import require_gradients_on
from nnterp.interventions._attribution._terms import Term, accumulated, check_sum, terms_of, tolerance

__all__ = [
    "AUDIT",
    "AttributionResult",
    "Audit",
    "DirectAttribution",
    "Shares",
    "Targets",
    "Term",
    "Unembedding",
    "accumulated",
    "attribution_patching",
    "audited",
    "check_sum",
    "direct_logit_attribution",
    "head_shares",
    "require_gradients_on",
    "shares_of",
    "softcap_of",
    "terms_of",
    "tolerance",
]
