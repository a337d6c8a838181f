"""Planned against measured memory, and the peak of loading weights: `python -m benchmarks.memory`.

For each model an engine starts in a process of its own and runs requests that fill every slot and the pool. The plan is
the one that the start made. Measured are the process's resident bytes: before the engine (interpreter, libraries and
the compiler's code, which no plan counts), the greatest while it starts, and the greatest under load. Each model starts
with nothing in the compilation cache, then with its programs there; the difference is what compiling takes.

Loading is measured in a process that does nothing else, from one file and from several.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.random_checkpoint import LLAMA_1B, write_checkpoint
from benchmarks.work import SHAPES

LOAD_LIMIT = 1.3
"""How many times the weights a process may need at most while it loads them, all that it needs counted."""

_MB = 1e6
_PLANNED = ("weights", "state", "temporaries", "code", "pages")


def child(*arguments: str, cache: pathlib.Path | None = None) -> dict[str, Any]:
    """What `benchmarks.memory_child` prints."""
    environment = dict(os.environ) if cache is None else os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "benchmarks.memory_child", *arguments]
    done = subprocess.run(command, cwd=report.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planned(plan: dict[str, int]) -> int:
    """Bytes that the plan expects the engine to need."""
    return sum(plan[part] for part in _PLANNED)


def measure_engine(name: str, options: dict[str, Any], requests: int, cache: pathlib.Path) -> dict[str, Any]:
    """Plan and peaks of one model, with and without programs in the cache."""
    cold = child("engine", json.dumps(options), "0", cache=cache)  # nothing is in the cache
    warm = child("engine", json.dumps(options), str(requests), cache=cache)
    if not warm["cached"]:
        raise RuntimeError("the second start found nothing in the compilation cache")
    plan = planned(warm["plan"])
    return {
        "model": name,
        "options": options,
        "requests": requests,
        "plan": {part: warm["plan"][part] for part in (*_PLANNED, "margin")},
        "planned": plan,
        "before": warm["before"],
        "measured": warm["load_peak"] - warm["before"],
        "measured_at_start": warm["start_peak"] - warm["before"],
        "compiling": cold["start_peak"] - warm["start_peak"],
        "programs": warm["ready"] - warm["before"] - sum(warm["plan"][part] for part in ("weights", "state", "pages")),
        "growth_under_load": warm["load_peak"] - warm["ready"],
        "ratio": (warm["load_peak"] - warm["before"]) / plan,
        "steps": warm["steps"],
        "runs": {"cold": cold, "warm": warm},
    }


def measure_load(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """The peak of a process that loads a checkpoint, in bytes and in times its weights."""
    found = child("load", str(directory), "bfloat16")
    weights = found["weights"]
    return found | {
        "checkpoint": name,
        "peak_of_weights": found["peak"] / weights,
        "growth_of_weights": (found["peak"] - found["before"]) / weights,
    }


def engines(scratch: pathlib.Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The measurements of each model by name: tiny, or a shape with random weights."""
    results = []
    for name in models:
        if name == "tiny":
            options: dict[str, Any] = {
                "model": str(report.ROOT / "models" / "tiny" / "checkpoint"),
                "dtype": "float32",
                "num_pages": 2049,
            }
        else:
            write_checkpoint(scratch / name, SHAPES[name])
            options = {"model": str(scratch / name), "dtype": "bfloat16", "max_model_len": 1024}
        options |= {"max_num_seqs": 64, "max_num_batched_tokens": 512}
        results.append(measure_engine(name, options, 64, scratch / "cache"))
        shutil.rmtree(scratch / name, ignore_errors=True)
        results[-1]["options"] = options | {"model": name}
        print(f"{name}: planned {results[-1]['planned'] / _MB:,.0f} MB, ratio {results[-1]['ratio']:.3f}", flush=True)
    return results


def loads(scratch: pathlib.Path, shards: Sequence[int]) -> list[dict[str, Any]]:
    """Loading the 1.1B shape from that many files each."""
    results = []
    for count in shards:
        directory = scratch / f"load{count}"
        write_checkpoint(directory, LLAMA_1B, shards=count)
        results.append(measure_load(directory, f"1.1B bf16, {count} file{'s' * (count > 1)}"))
        shutil.rmtree(directory)
        print(f"{results[-1]['checkpoint']}: {results[-1]['peak_of_weights']:.3f} times its weights", flush=True)
    return results


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """Both tables, in MB."""
    engine = report.table(
        ("MB", *(one["model"] for one in found["engines"])),
        [
            *(
                (f"planned {part}", *(one["plan"][part] / _MB for one in found["engines"]))
                for part in (*_PLANNED, "margin")
            ),
            *(
                (label, *(one[key] / (_MB if key != "ratio" else 1) for one in found["engines"]))
                for label, key in (
                    ("planned, without margin", "planned"),
                    ("measured under full load", "measured"),
                    ("measured / planned", "ratio"),
                    ("programs and runtime, measured", "programs"),
                    ("growth after start", "growth_under_load"),
                    ("not planned: interpreter, libraries", "before"),
                    ("not planned: compiling", "compiling"),
                )
            ),
        ],
    )
    load = report.table(
        ("loading", "weights MB", "before MB", "peak MB", "peak / weights", "growth / weights"),
        [
            (
                one["checkpoint"],
                one["weights"] / _MB,
                one["before"] / _MB,
                one["peak"] / _MB,
                one["peak_of_weights"],
                one["growth_of_weights"],
            )
            for one in found["loads"]
        ],
    )
    return f"{engine}\n\n{load}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the result; fails where a plan or the limit of loading does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["tiny", *SHAPES], default=["tiny", "153m"])
    parser.add_argument("--shards", nargs="*", type=int, default=[1, 4], help="files of the checkpoints to load")
    parser.add_argument("--output", default=None, help="name of the result; default: memory_jaxVERSION")
    options = parser.parse_args(arguments)
    name = options.output or f"memory_jax{report.versions()['jax']}"
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            "engines": engines(pathlib.Path(scratch), options.models),
            "loads": loads(pathlib.Path(scratch), options.shards),
        }
    print(report.describe())
    print(tables(found))
    print(f"written: {report.write(name, vars(options), found)}")
    over = [one["model"] for one in found["engines"] if one["measured"] > one["planned"] + one["plan"]["margin"]]
    if over:
        return report.fail(f"more than planned, margin included: {', '.join(over)}")
    if any(one["peak_of_weights"] > LOAD_LIMIT for one in found["loads"]):
        return report.fail(f"loading needs more than {LOAD_LIMIT} times the weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
