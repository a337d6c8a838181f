"""Simulates a trace: `python -m jaxserve.simulate --config llama.gin --trace FILE --target h200`.

Neither weights nor a device are needed: the real scheduler and page pool run on a virtual clock, and steps cost what a
target's roofline says, or what was measured (--model-cost, a file of benchmarks/step_costs.py): see docs/simulator.md.

Exit codes: 0; 2 a faulty command line, configuration, trace or file of costs.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxserve.config import gin_config
from jaxserve.simulator.command import add_simulation_options
from jaxserve.simulator.comparison import run_comparison
from jaxserve.simulator.fleet import SCALINGS
from jaxserve.simulator.routing import ROUTINGS


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates, prints and writes; returns the exit code."""
    parser = make_parser()
    parsed, server, _ = gin_config.load_from_command_line(parser, arguments)
    try:
        run_comparison(parsed, server.engine)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser, without --config and --gin.*."""
    parser = argparse.ArgumentParser(prog="jaxserve.simulate", description="Simulates a configuration and a trace.")
    add_simulation_options(parser)
    add = parser.add_argument
    add(
        "--compare",
        action="append",
        default=[],
        nargs="+",
        metavar="NAME=A,B",
        help="options to vary, all combinations",
    )
    add(
        "--capacity",
        type=float,
        default=None,
        metavar="SHARE",
        help="find the highest rate at which so many meet --slo",
    )
    add("--rounds", type=int, default=3, help="parts of the trace that --capacity searches one by one (default 3)")
    add("--replicas", type=int, default=1, help="replicas at the start (default 1)")
    add("--routing", default="least_loaded", choices=ROUTINGS)
    add("--scaling", default="fixed", choices=SCALINGS)
    add(
        "--fleet",
        default="",
        metavar="NAME=VALUE,...",
        help="further settings of the fleet: replica_rate, forecast, ...",
    )
    add("--plot", type=pathlib.Path, default=None, metavar="DIR", help="write plots there")
    add("--json", type=pathlib.Path, default=None, metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
