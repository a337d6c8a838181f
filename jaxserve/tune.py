"""Tunes options: `python -m jaxserve.tune --config X.gin --trace T --slo ttft=0.5,tpot=0.05 --output tuned.gin`.

Searches in simulation (jaxserve/simulator/search.py), confirms the best on the engine where the model is at
hand, and writes a gin file on top of the one that was given, with the evidence as comments: see docs/simulator.md.

Exit codes: 0; 2 a faulty command line, configuration, trace or file of costs.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxserve.config import gin_config
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.simulator.command import add_simulation_options
from jaxserve.simulator.tune_run import tune

LIMIT = 2000
"""Number of the trace's requests that are used where --limit is not given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Searches, confirms and writes; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    parsed, server, _ = gin_config.load_from_command_line(parser, given)
    try:
        tune(parsed, given, server.engine, gin_config.split_overrides(given)[0], ModelRunner, gin_config.load)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    print(f"written: {parsed.output.name}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser, without --config and --gin.*."""
    parser = argparse.ArgumentParser(prog="jaxserve.tune", description="Finds options that serve a trace well.")
    add_simulation_options(parser, LIMIT)
    add = parser.add_argument
    add("--output", type=pathlib.Path, default=pathlib.Path("tuned.gin"), metavar="FILE", help="the gin file to write")
    add("--candidates", type=int, default=54, help="configurations to try (default 54)")
    add("--rungs", type=int, default=3, help="halvings, the last on the whole trace (default 3)")
    add("--seed", type=int, default=0)
    add("--stress", action="store_true", help="speed the trace up until over 10 %% miss the targets as configured")
    add("--confirm-seconds", type=float, default=20.0, help="of the trace on the engine, 0 for none (default 20)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
