"""Attribution graphs: features of transcoders, errors, embeddings and logits, and the direct effects between them."""

from nnterp.interventions._graphs._build import attribution_graph
from nnterp.interventions._graphs._graph import AttributionGraph
from nnterp.interventions._graphs._node import GraphNode
from nnterp.interventions._graphs._validation import GraphValidation, validate_graph

__all__ = ["AttributionGraph", "GraphNode", "GraphValidation", "attribution_graph", "validate_graph"]
