"""Attribution: how much each part of a model adds to what it predicts."""

from nnterp.interventions._attribution._direct import direct_logit_attribution
from nnterp.interventions._attribution._result import DirectAttribution
from nnterp.interventions._attribution._shares import Shares, head_shares, shares_of
from nnterp.interventions._attribution._terms import Term, check_sum, terms_of

__all__ = [
    "DirectAttribution",
    "Shares",
    "Term",
    "check_sum",
    "direct_logit_attribution",
    "head_shares",
    "shares_of",
    "terms_of",
]
"""Attribution: what parts of a model give to a prediction, estimated from one run and its gradient."""

from nnterp.interventions._attribution._audit import Audit
from nnterp.interventions._attribution._nodes import attribution_patching
from nnterp.interventions._attribution._result import AttributionResult

__all__ = ["AttributionResult", "Audit", "attribution_patching"]
