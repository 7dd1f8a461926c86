"""`nnterp check MODEL`: print the certificate of a hub id, a folder or a model type."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nnterp.certificate import Certificate
from nnterp.errors import AnatomyError, CertificateError
from nnterp.files import require_writable

help = "prove that nnterp names a model's parts rightly, and print the certificate"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnterp check`."""
    parser.add_argument(
        "model", help="a hub id, a folder, or a model type of transformers (checked on a tiny random model of it)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the checkpoint"
    )
    parser.add_argument(
        "--no-weights", action="store_true", help="check only what can be checked without loading the weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the certificate to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Print the certificate; 0 if every line holds, 1 if not."""
    try:
        if arguments.json is not None:
            require_writable(arguments.json)
        print_(certificate := _certificate(arguments))
    except CertificateError as error:
        if not isinstance(error.certificate, Certificate):
            raise
        print_(certificate := error.certificate)
    except AnatomyError as error:
        print(error)
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"nnterp check: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        certificate.save(arguments.json)
    return 0 if certificate.ok else 1


def print_(certificate: Certificate) -> None:
    """Print a certificate: as a table fitted to a terminal, as plain text anywhere else."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(certificate)
    else:
        print(certificate)


def _certificate(arguments: argparse.Namespace) -> Certificate:
    from nnterp import StandardizedTransformer
    from nnterp.testing import model_types, tiny_model, tiny_tokenizer

    if not os.path.exists(arguments.model) and arguments.model in model_types():
        model = StandardizedTransformer(tiny_model(arguments.model), tokenizer=tiny_tokenizer())
    else:
        options = {
            "trust_remote_code": arguments.trust_remote_code,
            "keep_proofs": False,
        }  # what is printed was run now
        model = StandardizedTransformer(arguments.model, **options)
        if not arguments.no_weights:
            model.dispatch()
    print(model.anatomy, end="\n\n")
    assert model.certificate is not None
    return model.certificate
