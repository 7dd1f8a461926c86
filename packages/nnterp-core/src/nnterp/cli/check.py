"""`nnterp check MODEL`: print the certificate of a hub id, a folder or a model type."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnterp.cli.models import (
    HELP,
    about_random,
    add_model_arguments,
    is_random,
    load_model,
    not_loaded,
    require_device,
    require_file,
)
from nnterp.errors import AnatomyError, CertificateError

if TYPE_CHECKING:
    from nnterp.anatomy import Anatomy
    from nnterp.certificate import Certificate

help = "prove that nnterp names a model's parts rightly, and print the certificate"
examples = ("check toy", "check Qwen/Qwen3-0.6B", "check ./my-model --json certificate.json", "check llama")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnterp check`."""
    parser.add_argument("model", metavar="MODEL", help=HELP)
    add_model_arguments(parser)
    parser.add_argument(
        "--no-weights", action="store_true", help="check only what can be checked without loading the weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the certificate to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Print the certificate; 0 if every line holds, 1 if not."""
    from nnterp.certificate import Certificate

    try:
        require_file(arguments.json, "--json")
        require_device(arguments.device)
        print_(certificate := _certificate(arguments))
    except CertificateError as error:
        if not isinstance(error.certificate, Certificate):
            raise
        print_(certificate := error.certificate)
    except AnatomyError as error:
        print(error)
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"nnterp check: {not_loaded(arguments.model, error)}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        certificate.save(arguments.json)
    return 0 if certificate.ok else 1


def print_(shown: Certificate | Anatomy) -> None:
    """Print a certificate or an anatomy: as a table fitted to a terminal, as plain text anywhere else."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(shown)
    else:
        print(shown)


def _certificate(arguments: argparse.Namespace) -> Certificate:
    # Without proofs kept on disk: what is printed was run now.
    model = load_model(arguments, weights=not arguments.no_weights, keep_proofs=False)
    if is_random(arguments.model):
        print(about_random(arguments.model), end="\n\n")
    print_(model.anatomy)
    print()
    assert model.certificate is not None
    return model.certificate
