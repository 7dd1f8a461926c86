"""Lenses that are fitted: the tuned lens and the Jacobian lens, what they are worth, and their files."""

from nnterp.interventions._fitted._evaluation import LensEvaluation, evaluate_lens
from nnterp.interventions._fitted._hub import lens_from_hub
from nnterp.interventions._fitted._jacobian import fit_jacobian_lens
from nnterp.interventions._fitted._lens import Lens
from nnterp.interventions._fitted._tuned import fit_tuned_lens

__all__ = ["Lens", "LensEvaluation", "evaluate_lens", "fit_jacobian_lens", "fit_tuned_lens", "lens_from_hub"]
