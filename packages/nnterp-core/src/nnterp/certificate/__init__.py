"""The proof, by running the model, that what was found plays the parts it is named for. One file for each claim."""

from nnterp.certificate._certificate import Certificate, Line
from nnterp.certificate._certify import CLAIMS, certify
from nnterp.certificate._drift import Drift, DriftLine
from nnterp.certificate._filled import FILLED
from nnterp.certificate._idle_trace import IDLE
from nnterp.certificate._images import IMAGE_ENTERS, certify_images
from nnterp.certificate._padding import PADDING
from nnterp.certificate._parts import PARTS
from nnterp.certificate._passes import PASSES
from nnterp.certificate._probabilities import AttentionProbabilitiesAccessor
from nnterp.certificate._readout import READOUT
from nnterp.certificate._roles import ROLES
from nnterp.certificate._stream import CONSECUTIVE, HIDDEN
from nnterp.certificate._sum import IDENTITY
from nnterp.certificate._writes import WRITES
from nnterp.discovery import Contribution, ResidualStructure, Term

__all__ = [
    "CLAIMS",
    "CONSECUTIVE",
    "FILLED",
    "HIDDEN",
    "IDENTITY",
    "IDLE",
    "IMAGE_ENTERS",
    "PADDING",
    "PARTS",
    "PASSES",
    "READOUT",
    "ROLES",
    "WRITES",
    "AttentionProbabilitiesAccessor",
    "Certificate",
    "Contribution",
    "Drift",
    "DriftLine",
    "Line",
    "ResidualStructure",
    "Term",
    "certify",
    "certify_images",
]
