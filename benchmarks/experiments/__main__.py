"""The experiments: `python -m benchmarks.experiments NAME ... [--engine] [--simulate]`.

`--all` in place of names runs all of them, and writes over all of their results. The engine's model is loaded and
compiled once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.experiments import batching, harness, pressure, sharing
from benchmarks.experiments.cases import EXPERIMENTS

MODULES = (batching, pressure, sharing)
"""Whose functions are the experiments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them one after another; returns the exit status."""
    known = ", ".join(EXPERIMENTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}")
    parser.add_argument("--all", action="store_true", help="all of them; writes over all of their results")
    parser.add_argument("--engine", action="store_true", help="only on the engine with the default model")
    parser.add_argument("--simulate", action="store_true", help="only in simulation, an 8B model on an H200")
    parser.add_argument("--redraw", action="store_true", help="only the plots, from the results there are")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(EXPERIMENTS):
        parser.error(f"no experiment is called {', '.join(sorted(unknown))}; known are {known}")
    if bool(options.names) == options.all:
        parser.error(f"give either names or --all, which writes over all results; known are {known}")
    for name in EXPERIMENTS if options.all else options.names:
        print(f"\n== {name}", flush=True)
        harness.run(EXPERIMENTS[name], options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
