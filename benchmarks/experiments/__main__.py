"""Several experiments in one process: `python -m benchmarks.experiments NAME ... [--engine] [--simulate]`.

`--all` in place of names runs all of them, and writes over all of their results. The engine's model is loaded and
compiled once.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from benchmarks.experiments import harness

NAMES = (
    "modes",
    "formations",
    "policies",
    "load_profile",
    "batch_size",
    "token_budget",
    "chunked_prefill",
    "chunk_size",
    "prefill_share",
    "mixed_lengths",
    "head_of_line",
    "paged",
    "preemption",
    "prediction",
    "max_wait",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them one after another; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--all", action="store_true", help="all of them; writes over all of their results")
    harness.add_sides(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no experiment is called {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    if bool(options.names) == options.all:
        parser.error(f"give either names or --all, which writes over all results; known are {', '.join(NAMES)}")
    for name in NAMES if options.all else options.names:
        print(f"\n== {name}", flush=True)
        harness.run(importlib.import_module(f"benchmarks.experiments.{name}").EXPERIMENT, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
