"""Attribution: how much each part of a model adds to what it predicts."""

from nnterp.interventions._attribution._shares import Shares, head_shares, shares_of
from nnterp.interventions._attribution._terms import Term, check_sum, terms_of

__all__ = ["Shares", "Term", "check_sum", "head_shares", "shares_of", "terms_of"]
