"""Compiles programs ahead of time: `python -m jaxserve.compile --config llama.gin --target h200 --output DIR`.

Compiles every program of the closed set for a device that need not be here and writes a bundle, which an engine loads
with `--gin.EngineConfig.bundle='DIR'`, and a report (report.json, report.md). Weights are not needed where the file
holds the architecture.

Exit codes: 0; 1 the configuration does not fit the target, the compiler is missing or a program must not ship; 2 a
faulty command line or configuration; 3 bundle and report were written, but the report lists problems.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxserve.config import gin_config
from jaxserve.planning.reports.compile_report import CONTEXTS, REPORT_JSON, REPORT_MARKDOWN, UntunedMatmulError, build
from jaxserve.programs.aot.plugin import PluginMissingError
from jaxserve.programs.target_devices import LOCAL, known_targets, load_target, use_cpu_only

PROBLEMS_STATUS = 3
"""Exit code when the programs were compiled but the report lists problems."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, writes and prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="jaxserve.compile", description="Compiles every program for a device.")
    parser.add_argument(
        "--target",
        default=LOCAL,
        metavar="NAME",
        help=f"{', '.join(known_targets())}, or a .txtpb file; the default, cpu, is this machine's",
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR", help="where bundle and report go")
    parser.add_argument("--report-only", action="store_true", help="write no bundle")
    parser.add_argument(
        "--context",
        type=int,
        action="append",
        metavar="N",
        help=f"positions of each row of a decode step whose bytes are counted; repeat for more (default: {CONTEXTS})",
    )
    parser.add_argument(
        "--merge",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"{REPORT_JSON} of another run, for the same page; may be repeated",
    )
    parsed, config, _ = gin_config.load_from_command_line(parser, arguments)
    contexts = tuple(parsed.context or CONTEXTS)
    if min(contexts) < 1:
        parser.error(f"--context is {min(contexts)}; it must be at least 1")
    try:
        target = load_target(parsed.target)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    use_cpu_only()
    try:
        report = build(
            config.engine,
            target,
            parsed.output,
            report_only=parsed.report_only,
            contexts=contexts,
            merge=parsed.merge,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, OSError, PluginMissingError, UntunedMatmulError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print((parsed.output / REPORT_MARKDOWN).read_text(encoding="utf-8"))
    for line in report.problems:
        print(f"{parser.prog}: {line}", file=sys.stderr)
    return PROBLEMS_STATUS if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
