"""`python -m nnterp.values` prints the reference page; `python -m nnterp.values MODEL` what one model supports."""

from __future__ import annotations

import argparse


def main() -> None:
    """Print the page, or a model's support."""
    parser = argparse.ArgumentParser(prog="python -m nnterp.values", description="the table of values")
    parser.add_argument("model", nargs="?", help="a hub id or a folder; without, the reference page is printed")
    arguments = parser.parse_args()
    if arguments.model is None:
        from nnterp.values._page import page

        print(page(), end="")
        return
    from nnterp import StandardizedTransformer

    model = StandardizedTransformer(arguments.model, enable_attention_probs=True)
    model.dispatch()
    print(model.support())


if __name__ == "__main__":
    main()
