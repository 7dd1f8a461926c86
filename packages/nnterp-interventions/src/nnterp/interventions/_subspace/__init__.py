"""Subspaces of a value that carry what distinguishes two runs: patched, and found by gradient descent."""

from nnterp.interventions._subspace._fit import fit_subspace
from nnterp.interventions._subspace._patch import patch_subspace
from nnterp.interventions._subspace._result import SubspaceResult

__all__ = ["SubspaceResult", "fit_subspace", "patch_subspace"]
