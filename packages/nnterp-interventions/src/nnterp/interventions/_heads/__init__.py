"""What kind of head a head is, and how much of what is attended to reaches the stream."""

from nnterp.interventions._heads._scores import HeadScores, head_scores
from nnterp.interventions._heads._weighted import WeightedAttention, value_weighted_attention

__all__ = ["HeadScores", "WeightedAttention", "head_scores", "value_weighted_attention"]
