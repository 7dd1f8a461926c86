"""Circuits: edges between the nodes of a model, scored by attribution and kept or cut in exact runs."""

from nnterp.interventions._circuits._circuit import Circuit, Edge
from nnterp.interventions._circuits._edges import edge_attribution
from nnterp.interventions._circuits._faithfulness import Faithfulness, faithfulness

__all__ = ["Circuit", "Edge", "Faithfulness", "edge_attribution", "faithfulness"]
