"""Explains a configuration: `python -m jaxserve.explain --config llama.gin [--target h200] [--json]`.

Prints the closed set of programs, the plan of a device's memory, the greatest concurrency, the expected start time,
the bound of a decode step and, where max_decode_gap is set, what it costs in prefill throughput. Nothing is loaded or
served; weights are not needed where the file holds the architecture.

Exit codes: 0; 1 the configuration does not fit the model or the device; 2 a faulty command line or configuration.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from jaxserve.config import gin_config
from jaxserve.planning.explanation import LOAD_RATE, explain, local_target
from jaxserve.planning.explanation_report import to_json, to_text
from jaxserve.programs.target_devices import known_targets, load_target, use_cpu_only


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the explanation; returns the exit code."""
    parser = argparse.ArgumentParser(prog="jaxserve.explain", description="Explains a configuration.")
    parser.add_argument(
        "--target",
        default=None,
        metavar="NAME",
        help=f"{', '.join(known_targets())}, or a .txtpb file (default: this machine's device)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--load-rate",
        type=_positive,
        default=LOAD_RATE / 1e9,
        metavar="GB/S",
        help=f"how fast weights reach the device (default: {LOAD_RATE / 1e9:g})",
    )
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        default=None,
        metavar="FILE",
        help="report.json of jaxserve.compile, whose compile times are taken (default: measured or stated ones)",
    )
    parser.add_argument(
        "--model-cost",
        type=pathlib.Path,
        default=None,
        metavar="FILE",
        help="steps measured by benchmarks.step_costs, by which max_decode_gap is explained (default: the roofline)",
    )
    parsed, config, _ = gin_config.load_from_command_line(parser, arguments)
    try:
        if parsed.target is None:
            target = local_target()
        else:
            use_cpu_only()
            target = load_target(parsed.target)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    try:
        explanation = explain(
            config.engine, target, load_rate=parsed.load_rate * 1e9, report=parsed.report, model_cost=parsed.model_cost
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(to_json(explanation), indent=2) if parsed.json else to_text(explanation))
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
