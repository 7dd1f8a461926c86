"""`toy_dictionary`: the dictionaries that come with the toy checkpoint."""

from __future__ import annotations

from pathlib import Path

from nnterp.dictionaries._load import load_dictionary
from nnterp.traced import Dictionary

_FOLDER = Path(__file__).parents[1] / "_toy_dictionaries"


def toy_dictionary(name: str) -> Dictionary:
    """Load a dictionary of the toy checkpoint (`nnterp.toy_checkpoint()`).

    Args:
        name: "residual_4", a sparse autoencoder of the residual stream after layer 4; or "transcoder_0" to
            "transcoder_7", which map what an MLP is given to what it returns. All are JumpReLU. The card beside them,
            `README.md`, says what they explain.

    Returns:
        A `Dictionary`, float32 on the CPU.

    Raises:
        ValueError: There is none of this name.

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
    """
    known = sorted(folder.name for folder in _FOLDER.iterdir() if folder.is_dir())
    if name not in known:
        raise ValueError(f"The toy has no dictionary {name!r}; it has {', '.join(known)}.")
    return load_dictionary(_FOLDER / name)
