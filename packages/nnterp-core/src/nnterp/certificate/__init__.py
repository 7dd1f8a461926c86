"""The proof, by running the model, that what was found plays the parts it is named for."""

from nnterp.certificate._certificate import Certificate, Line
from nnterp.certificate._certify import certify
from nnterp.certificate._residual import Contribution, ResidualStructure, Term

__all__ = ["Certificate", "Contribution", "Line", "ResidualStructure", "Term", "certify"]
