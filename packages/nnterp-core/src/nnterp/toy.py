"""The trained toy model that comes with nnterp: real results without a download."""

from __future__ import annotations

from pathlib import Path


def toy_checkpoint() -> str:
    """Find the toy checkpoint, to load with `StandardizedTransformer(nnterp.toy_checkpoint())`.

    A small Llama trained on synthetic English: capitals, languages and landmarks, copying, indirect objects, and two
    tones of weather and food. Its card, `README.md` in the folder, says what it knows and how it was measured.

    Returns:
        The path of its folder.

    Example:
        model = StandardizedTransformer(nnterp.toy_checkpoint())
        print(model.num_layers)  # → 8
    """
    return str(Path(__file__).parent / "_toy")
