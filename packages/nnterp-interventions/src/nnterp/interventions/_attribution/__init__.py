"""Attribution: what parts of a model give to a prediction, estimated from one run and its gradient."""

from nnterp.interventions._attribution._audit import Audit
from nnterp.interventions._attribution._nodes import attribution_patching
from nnterp.interventions._attribution._result import AttributionResult

__all__ = ["AttributionResult", "Audit", "attribution_patching"]
