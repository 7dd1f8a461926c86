"""Compare engines that read and change the inside of language models, on tiny models of every architecture.

    uv run python tools/engines setup            # an environment for each engine, made by uv
    uv run python tools/engines run              # checkpoints, reference, engines; writes tools/engines/result.json
    uv run python tools/engines run --every 4    # of every fourth model type, in the order of the alphabet
    uv run python tools/engines run --only nnterp_2 --types gpt2 gemma2 --keep    # some of it, nothing written
    uv run python tools/engines page             # docs/engines.md, from result.json

Environments, checkpoints and tensors are kept in a folder (`--folder`), so that each step can be repeated alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from environments import BY_ADAPTER, ENGINES, set_up
from page import PAGE, page
from results import FILE, Results


def setup(folder: Path, only: list[str]) -> int:
    failed = 0
    for engine in (e for e in ENGINES if e.adapter in only):
        reason = set_up(folder, engine)
        failed += bool(reason)
        print(f"{engine.title}: {reason or 'ready'}", flush=True)
    return failed


def run(folder: Path, only: list[str], types: list[str] | None, every: int, keep: bool) -> int:
    import running

    from nnterp.testing import NOT_RELOADABLE, model_types

    types = types or [t for t in sorted(model_types()) if t not in NOT_RELOADABLE][::every]
    there = running.prepare(folder, types)
    for adapter in only:
        print(f"{BY_ADAPTER[adapter].title}: {len(there)} model types", flush=True)
        running.run(folder, adapter, there)
    results = running.collected(folder, types, every, only)
    for adapter in only:
        print(f"{BY_ADAPTER[adapter].title}: {dict(results.counts(adapter))}")
        for cell, wrong in results.wrong(adapter).items():
            for model_type, detail in wrong.items():
                print(f"    {cell} of {model_type}: {detail}")
    if not keep:
        results.write()
        print(f"wrote {FILE}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("setup", "run", "page"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "engines")
    parser.add_argument("--only", nargs="+", choices=BY_ADAPTER, default=list(BY_ADAPTER))
    parser.add_argument("--types", nargs="+", help="model types; all by default")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth model type")
    parser.add_argument("--keep", action="store_true", help="keep result.json as it is")
    args = parser.parse_args()
    if args.what == "setup":
        return setup(args.folder, args.only)
    if args.what == "run":
        partial = args.types or len(args.only) < len(BY_ADAPTER)
        return run(args.folder, args.only, args.types, args.every, args.keep or bool(partial))
    PAGE.write_text(page(Results.read()), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
