"""Sparse autoencoders and transcoders that others have published: read from their files, and written."""

from nnterp.dictionaries._load import load_dictionary, load_transcoders
from nnterp.dictionaries._save import save_dictionary
from nnterp.dictionaries._toy import toy_dictionary
from nnterp.traced import CrossLayerTranscoder, Dictionary

__all__ = [
    "CrossLayerTranscoder",
    "Dictionary",
    "load_dictionary",
    "load_transcoders",
    "save_dictionary",
    "toy_dictionary",
]
