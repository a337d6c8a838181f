"""From the start of the server's process to the first token over gRPC: `python -m benchmarks.startup`.

Three ways to start: cold (nothing in the compilation cache), cache (the programs of an earlier start in it) and bundle
(programs of `jaxserve.compile`). They run in turn, `--repeats` times each. The clock starts before the process is made;
a client that has connected before then asks for one token as soon as the server says that it is ready. The phases are
those that the server logs, of its own process and of the engine's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.work import SHAPES
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import Client

WAYS = ("cold", "cache", "bundle")
_PHASES = "start phases: "
_EARLY, _COMPLETE = "are compiled in the background", " programs are there after "
_PROMPT = [5, 6, 7, 8]
_FIRST = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def overrides(name: str, scratch: pathlib.Path) -> list[str]:
    """The command line of the shipped model, or of a shape with random weights, whose checkpoint is written."""
    if name == "tiny":
        return []
    directory = scratch / name
    write_checkpoint(directory, SHAPES[name])
    settings = {"model": str(directory), "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 1024}
    return [
        *(f"--gin.EngineConfig.{field}={value!r}" for field, value in settings.items()),
        "--gin.CacheConfig.num_pages=4097",
    ]


def make_bundle(arguments: Sequence[str], directory: pathlib.Path) -> float:
    """Compiles a bundle for this machine; returns the seconds that it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "jaxserve.compile", "--config", "tiny.gin", "--target", "cpu"]
    done = subprocess.run(
        [*command, "--output", str(directory), *arguments], cwd=report.ROOT, capture_output=True, text=True, check=False
    )
    if not (directory / "manifest.json").is_file():
        raise RuntimeError(f"no bundle was written: {done.stderr[-1000:]}")
    return time.perf_counter() - start


def start_once(arguments: Sequence[str], cache: pathlib.Path) -> dict[str, Any]:
    """Starts a server, asks for one token, ends the server; returns times in seconds and the phases.

    complete: when all programs were there, which a server that is ready before that says in its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.server", "--config", "tiny.gin", f"--gin.ServerConfig.port={port}"]
    command.append("--gin.ServerConfig.http_port=0")
    begin = time.perf_counter()
    with subprocess.Popen(
        [*command, *arguments],
        cwd=report.ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            for line in process.stderr:
                lines.append(line)
                if " ready on " in line:
                    break
            else:
                raise RuntimeError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}")
            ready = time.perf_counter() - begin
            with Client(f"127.0.0.1:{port}") as client:
                chunk = next(iter(client.generate(_PROMPT, _FIRST)))
                first = time.perf_counter() - begin
            if len(chunk.token_ids) != 1:
                raise RuntimeError(f"the first message has {len(chunk.token_ids)} tokens")
            complete = ready
            if any(_EARLY in line for line in lines):
                next(line for line in process.stderr if _COMPLETE in line)
                complete = time.perf_counter() - begin
        finally:
            process.terminate()
            process.communicate()
    phases = next(line for line in lines if _PHASES in line).partition(_PHASES)[2]
    programs = next(line for line in lines if " executables " in line).partition("jaxserve.server: ")[2].strip()
    programs = re.sub(r"from bundle \S+", "from the bundle", programs)
    return {
        "ready": ready,
        "first_token": first,
        "complete": complete,
        "programs": programs,
        "phases": json.loads(phases),
    }


def measure(name: str, scratch: pathlib.Path, repeats: int) -> dict[str, Any]:
    """All ways of starting one model, in turn."""
    arguments = overrides(name, scratch)
    bundle, cache = scratch / f"bundle-{name}", scratch / f"cache-{name}"
    bundle_seconds = make_bundle(arguments, bundle)
    with_bundle = [*arguments, f"--gin.EngineConfig.bundle={str(bundle)!r}"]
    starts: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            if way == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            starts[way].append(start_once(with_bundle if way == "bundle" else arguments, cache))
            found = starts[way][-1]
            print(f"{name} {repeat + 1} {way}: {found['first_token']:.2f} s; {found['programs']}", flush=True)
    return {
        "model": name,
        "bundle_seconds": bundle_seconds,
        "median_first_token": {way: statistics.median(one["first_token"] for one in starts[way]) for way in WAYS},
        "starts": starts,
    }


def tables(found: dict[str, Any]) -> str:
    """Seconds of each way, and the phases of the start whose time to the first token is the median."""
    starts = found["starts"]
    middle = {way: sorted(starts[way], key=lambda one: one["first_token"])[(len(starts[way]) - 1) // 2] for way in WAYS}
    rows: list[tuple[Any, ...]] = [
        ("first token, median", *(middle[way]["first_token"] for way in WAYS)),
        ("least", *(min(one["first_token"] for one in starts[way]) for way in WAYS)),
        ("greatest", *(max(one["first_token"] for one in starts[way]) for way in WAYS)),
        ("ready", *(middle[way]["ready"] for way in WAYS)),
        ("all programs are there", *(middle[way]["complete"] for way in WAYS)),
    ]
    for part in ("server", "engine"):
        by_way = {way: {one["name"]: one["seconds"] for one in middle[way]["phases"][part]} for way in WAYS}
        names = dict.fromkeys(name for way in WAYS for name in by_way[way])
        rows += [(f"{part}: {name}", *(by_way[way].get(name, "") for way in WAYS)) for name in names]
    return report.table((f"{found['model']}, seconds", *WAYS), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["tiny", *SHAPES], default=["tiny"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=None, help="name of the result; default: startup_jaxVERSION")
    options = parser.parse_args(arguments)
    name = options.output or f"startup_jax{report.versions()['jax']}"
    with tempfile.TemporaryDirectory() as scratch:
        found = [measure(model, pathlib.Path(scratch), options.repeats) for model in options.models]
    print(report.describe())
    for one in found:
        print(f"\n{tables(one)}")
    print(f"written: {report.write(name, vars(options), found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
