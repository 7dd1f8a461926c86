"""Save a tiny random model of every causal model type, with loud weights, as HuggingFace folders.

python checkpoints.py JOB.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

from nnterp.testing import tiny_checkpoint


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for model_type in job["types"]:
        folder = Path(job["checkpoints"]) / model_type
        if not (folder / "tokenizer.json").exists():
            tiny_checkpoint(model_type, folder)


if __name__ == "__main__":
    main()
