"""A million different schemas, one after the other: `python -m benchmarks.many_schemas`.

Each is checked as the front end checks it, in its process, and compiled as the engine does, for the shipped model. What
they leave behind is bounded: the memory of both processes is told after each tenth, beside the time.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import Any

from benchmarks import report
from benchmarks.long_prompts import memory_mb
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.constraints.compiled_grammars import CompiledGrammars
from jaxserve.engine.constraints.vocabulary import load_vocabulary
from jaxserve.frontend.grammar_checker import GrammarChecker
from jaxserve.structured_outputs import StructuredOutputsParams


def run(count: int) -> list[dict[str, Any]]:
    """Checks and compiles so many schemas; a row for each tenth."""
    directory = report.ROOT / "models" / "tiny" / "checkpoint"
    config = StructuredOutputsConfig()
    checker = GrammarChecker(directory, config)
    compiled = CompiledGrammars(functools.partial(load_vocabulary, directory), config)
    rows: list[dict[str, Any]] = []
    worst, begin = 0.0, time.perf_counter()
    for number in range(1, count + 1):
        start = time.perf_counter()
        grammar = checker.check(StructuredOutputsParams(json=f'{{"const": {number}}}'))
        compiled.get(grammar).result()
        worst = max(worst, time.perf_counter() - start)
        if number % max(1, count // 10) == 0:
            now = time.perf_counter()
            rows.append(
                {
                    "schemas": number,
                    "ms_each": 1e3 * (now - begin) / max(1, count // 10),
                    "ms_most": 1e3 * worst,
                    "memory_mb": memory_mb(os.getpid()),
                    "compiled_kept": len(compiled),
                }
            )
            print(rows[-1], flush=True)
            worst, begin = 0.0, now
    checker.close()
    return rows


def main() -> int:
    """Writes the result; returns the exit status: 1 where memory grows between the first tenth and the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    rows = run(options.count)
    print(report.describe())
    print(f"written: {report.write('many_schemas', vars(options), rows)}")
    grown = rows[-1]["memory_mb"] - rows[0]["memory_mb"]
    return report.fail(f"memory grows by {grown:.0f} MB") if grown > 20 else 0


if __name__ == "__main__":
    raise SystemExit(main())
