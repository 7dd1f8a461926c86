"""Find attention's inside: heads, probabilities, scores, queries, keys and values, each recognised by its numbers."""

from nnterp.discovery.attention._moving_heads import MovingHeads
from nnterp.discovery.attention._search import Attention, find_attention, split_heads, with_code

__all__ = ["Attention", "MovingHeads", "find_attention", "split_heads", "with_code"]
