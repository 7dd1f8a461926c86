"""Proofs kept on disk, so that a model that was proven once is not proven again in the next process.

They are in `~/.cache/nnterp/proofs`. `NNTERP_CACHE` names another folder than `~/.cache/nnterp`, or is "off". A proof
is used only for a model that agrees with the proven one in everything that the proof rests on: see `key_of`.
"""

from nnterp.proofs._certified import certified, check_first_probabilities, proven_by_twin, with_kept_searches
from nnterp.proofs._folder import Kept, clear, folder, kept
from nnterp.proofs._key import Key, What, key_of, key_of_code
from nnterp.proofs._shelf import Unfit, proven

__all__ = [
    "Kept",
    "Key",
    "Unfit",
    "What",
    "certified",
    "check_first_probabilities",
    "clear",
    "folder",
    "kept",
    "key_of",
    "key_of_code",
    "proven",
    "proven_by_twin",
    "with_kept_searches",
]
