"""What a run depends on, as digests that can be compared: a model and its weights, functions, any other values."""

from nnterp.identity._checkpoint import Checkpoint, checkpoint_of
from nnterp.identity._classes import code_digest, function_digest
from nnterp.identity._differences import CHANGES, differences, same
from nnterp.identity._digests import digest, summary
from nnterp.identity._functions import parts_of_function
from nnterp.identity._model import config_digest, settings_of_model
from nnterp.identity._weights import checksum, checksum_of_tensors, digest_of_weights

__all__ = [
    "CHANGES",
    "Checkpoint",
    "checkpoint_of",
    "checksum",
    "checksum_of_tensors",
    "code_digest",
    "config_digest",
    "differences",
    "digest",
    "digest_of_weights",
    "function_digest",
    "parts_of_function",
    "same",
    "settings_of_model",
    "summary",
]
