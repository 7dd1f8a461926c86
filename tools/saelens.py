"""Compare dictionaries that SAELens writes and reads with what nnterp makes of the same files.

    uv run --with sae-lens python tools/saelens.py

Every architecture is made with random weights, saved by SAELens, and read by nnterp; what nnterp saves of it is read by
SAELens again. Features and reconstructions are compared in float32.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nnterp

WIDTH, FEATURES, OUTPUT = 32, 96, 24
SCALINGS = ("none", "layer_norm", "constant_norm_rescale")


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """An architecture of SAELens, and settings of its config."""
    for kind, scaling, subtracts in itertools.product(
        ("standard", "gated", "jumprelu", "topk"), SCALINGS, (True, False)
    ):
        more = {"k": 8} if kind == "topk" else {}
        yield kind, {"normalize_activations": scaling, "apply_b_dec_to_input": subtracts, **more}
    yield "topk", {"k": 8, "rescale_acts_by_decoder_norm": True}
    for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        for scaling in SCALINGS:
            yield kind, {"d_out": OUTPUT, "apply_b_dec_to_input": False, "normalize_activations": scaling}


def made(kind: str, settings: dict[str, Any]) -> Any:
    """SAELens' own object with random weights."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    cls, config = get_sae_class(kind)
    about = SAEMetadata(hook_name="blocks.1.hook_resid_post", hook_name_out="blocks.1.hook_mlp_out")
    sae = cls(config(d_in=WIDTH, d_sae=FEATURES, metadata=about, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if "W_" in name else 1))
            if name == "threshold":
                parameter.abs_()
    return sae.eval()


@torch.no_grad()
def difference(theirs: Any, ours: nnterp.Dictionary) -> float:
    """The largest difference of features and of reconstructions, relative to their largest entry."""
    x = torch.randn(7, 11, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 + 1
    features = theirs.encode(x)
    features = features.to_dense() if features.is_sparse else features
    assert 0 < (features != 0).float().mean() < 1
    both = [(features, ours.encode(x)), (theirs(x), ours.decode(ours.encode(x), x))]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in both)


def main() -> None:
    """Print the largest difference of each case, both ways."""
    from sae_lens.registry import get_sae_class

    worst = 0.0
    for kind, settings in cases():
        theirs = made(kind, settings)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_model(folder)
            read = nnterp.load_dictionary(folder)
            nnterp.save_dictionary(read, Path(folder) / "back")
            found = [difference(theirs, read)]
            if not settings.get("rescale_acts_by_decoder_norm"):
                back = get_sae_class(kind)[0].load_from_disk(Path(folder) / "back")
                found.append(difference(back, read))
        worst = max(worst, *found)
        print(f"{kind:28} {settings} {' '.join(f'{value:.1e}' for value in found)}", flush=True)
    print(f"largest relative difference: {worst:.1e}")


if __name__ == "__main__":
    main()
