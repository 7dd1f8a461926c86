"""Activations on disk: written while they are computed, by one process or several, and read in parts."""

from nnterp.datasets._column import ActivationColumn, Where
from nnterp.datasets._dataset import ActivationDataset
from nnterp.datasets._ranks import rank_of, require_whole_model
from nnterp.datasets._shuffled import ShuffledRows
from nnterp.datasets._sources import prompts_of
from nnterp.datasets._writing import Job, refuse_for_disk, write_dataset, write_shards

__all__ = [
    "ActivationColumn",
    "ActivationDataset",
    "Job",
    "ShuffledRows",
    "Where",
    "prompts_of",
    "rank_of",
    "refuse_for_disk",
    "require_whole_model",
    "write_dataset",
    "write_shards",
]
