"""Steering vectors: made from contrasts, by gradient descent or by a probe; added up, saved, exported."""

from nnterp.interventions._vectors._contrast import steering_vectors
from nnterp.interventions._vectors._feature import feature_vector
from nnterp.interventions._vectors._optimize import optimize_vector
from nnterp.interventions._vectors._probe import ProbeResult, probe
from nnterp.interventions._vectors._vector import SteeringVector

__all__ = ["ProbeResult", "SteeringVector", "feature_vector", "optimize_vector", "probe", "steering_vectors"]
