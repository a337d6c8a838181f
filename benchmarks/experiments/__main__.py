"""Several experiments in one process: `python -m benchmarks.experiments [NAME ...] [--engine] [--simulate]`.

Without names all of them; the engine's model is loaded and compiled once.
"""

from __future__ import annotations

import argparse
import importlib

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


def main() -> int:
    """Runs them one after another; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    harness.add_sides(parser)
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no experiment is called {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    for name in options.names or NAMES:
        print(f"\n== {name}", flush=True)
        harness.run(importlib.import_module(f"benchmarks.experiments.{name}").EXPERIMENT, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
