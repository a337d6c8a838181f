"""Asks for health again and again, as an orchestrator does, in a process of its own.

Over a kept connection and over a new one for each probe, in turn. A probe whose connection is refused connects again
until its timeout, as an orchestrator's does, and `late` counts those that took over half a second. The process writes
one JSON object to its standard output when its standard input closes.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import report

INTERVAL_SECONDS = 0.05
TIMEOUT_SECONDS = 5.0
LATE_SECONDS = 0.5
KINDS = ("new", "kept")

# Channels of one process share connections, and the pauses after one that failed, unless told otherwise.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


@contextlib.contextmanager
def probing(address: str) -> Iterator[dict[str, Any]]:
    """Probes a server meanwhile; the dictionary has the figures of each kind of connection afterwards."""
    command = [sys.executable, "-m", "benchmarks.load.probes", address]
    process = subprocess.Popen(command, cwd=report.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = {}
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        yield found
    finally:
        output, _ = process.communicate()
        found.update(json.loads(output))


def figures(answers: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Figures of probes from (begin, end, error) of each: latencies in ms, and the longest time without an answer."""
    good = [(begin, end) for begin, end, error in answers if not error]
    if not good:
        return {"probes": len(answers), "failed": len(answers)}
    milliseconds = [1e3 * (end - begin) for begin, end in good]
    ends = [answers[0][0], *(end for _, end in good), answers[-1][1]]
    return {
        "probes": len(answers),
        "failed": len(answers) - len(good),
        "late": sum(end - begin > LATE_SECONDS for begin, end in good),
        "errors": sorted({error for _, _, error in answers if error}),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "max_ms": max(milliseconds),
        "longest_without_answer_s": float(np.max(np.diff(ends))),
    }


def main() -> int:
    """Probes until standard input closes."""
    address = sys.argv[1]
    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), closed.set()), daemon=True).start()
    answers: dict[str, list[tuple[float, float, str]]] = {kind: [] for kind in KINDS}
    with grpc.insecure_channel(address, options=_OPTIONS) as kept:
        _probe(kept)
        print("begun", flush=True)
        while not closed.is_set():
            for kind in KINDS:
                begin = time.monotonic()
                if kind == "kept":
                    error = _probe(kept)
                else:
                    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
                        error = _probe(channel)
                answers[kind].append((begin, time.monotonic(), error))
            time.sleep(INTERVAL_SECONDS)
    print(json.dumps({kind: figures(found) for kind, found in answers.items()}))
    return 0


def _probe(channel: grpc.Channel) -> str:
    """Asks once; returns the error, or nothing."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        return error.code().name
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return "" if serving else health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


if __name__ == "__main__":
    raise SystemExit(main())
