"""Find attention's inside by its numbers: heads, probabilities, scores, queries, keys and values."""

from nnterp.discovery.attention._attention import Attention, find_attention, with_code
from nnterp.discovery.attention._heads import split_heads
from nnterp.discovery.attention._moving_heads import MovingHeads

__all__ = ["Attention", "MovingHeads", "find_attention", "split_heads", "with_code"]
