"""Starts workers and a gateway in front of them on this machine, and ends them together.

    python -m jaxserve.serving.deploy.gateway --smg .venv-gateway/bin/smg --config tiny.gin [--gin.BINDING=VALUE ...]

The gateway is the program of the package smg, in an environment of its own; docs/gateway.md says what it adds. A worker
that ends is reported and not replaced: the gateway goes on with the others.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_LOOK_SECONDS = 0.5
_END_SECONDS = 60.0
"""Time that the processes have to end by themselves: a worker lets its requests finish for ServerConfig.drain_seconds.
"""

Process = subprocess.Popen[bytes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until a signal, or until the gateway or every worker has ended; returns the exit code."""
    parser = _parser()
    options, bindings = parser.parse_known_args(arguments)
    if wrong := [binding for binding in bindings if not binding.startswith("--gin.")]:
        parser.error(f"{wrong[0]} is not known; bindings for the workers begin with --gin.")
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}; it must be at least 1")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    addresses = [f"127.0.0.1:{options.worker_port + index}" for index in range(options.workers)]
    workers: dict[str, Process] = {}
    gateways: list[Process] = []
    try:
        for address in addresses:
            workers[address] = _start(worker_command(options.config, address, bindings))
        _wait_until_serving(workers, stop)
        if not stop.is_set():
            gateways.append(_start(gateway_command(options.smg, options.port, options.metrics_port, addresses)))
            _watch(gateways[0], dict(workers), options.port, stop)
    except (_EndedError, OSError) as error:  # OSError: the program is not there
        _say(str(error))
        return 1
    finally:
        _end(gateways)  # before the workers, so that it sends nothing to any that is going
        _end(list(workers.values()))
    return 0


class _EndedError(Exception):
    """A process has ended without which the others are of no use."""


def worker_command(config: str, address: str, bindings: Sequence[str]) -> list[str]:
    """Returns the command of a worker. It serves gRPC alone: the gateway is its HTTP."""
    port = address.rpartition(":")[2]
    own = [f"--gin.ServerConfig.port={port}", "--gin.ServerConfig.http_port=0"]
    return [sys.executable, "-m", "jaxserve.server", "--config", config, *own, *bindings]


def gateway_command(smg: str, port: int, metrics_port: int, addresses: Sequence[str]) -> list[str]:
    """Returns the command of the gateway. addresses: of the workers."""
    return [
        *(smg, "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        *("--worker-urls", *(f"grpc://{address}" for address in addresses), "--policy", "cache_aware"),
        *("--health-check-interval-secs", "5", "--shutdown-grace-period-secs", "30", "--log-level", "warn"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.serving.deploy.gateway",
        description="Workers and a gateway in front of them; Ctrl-C ends all. --gin.BINDING=VALUE goes to the workers.",
        allow_abbrev=False,
    )
    parser.add_argument("--smg", required=True, metavar="PATH", help="the gateway's program")
    parser.add_argument("--config", default="tiny.gin", metavar="NAME", help="what the workers serve (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="number of workers (%(default)s)")
    parser.add_argument("--worker-port", type=int, default=50051, metavar="PORT", help="the first's (%(default)s)")
    parser.add_argument("--port", type=int, default=30000, help="the gateway's (%(default)s)")
    parser.add_argument("--metrics-port", type=int, default=29000, metavar="PORT", help="its metrics' (%(default)s)")
    return parser


def _start(command: Sequence[str]) -> Process:
    """Starts a process that Ctrl-C does not reach, so that all end in order."""
    return subprocess.Popen(command, start_new_session=True)


def _wait_until_serving(workers: Mapping[str, Process], stop: threading.Event) -> None:
    """Waits until every worker takes requests, or for `stop`. Raises _EndedError."""
    waiting = dict(workers)
    while waiting and not stop.wait(_LOOK_SECONDS):
        for address, worker in list(waiting.items()):
            if (code := worker.poll()) is not None:
                raise _EndedError(f"worker {address} has ended with exit code {code}")
            if is_serving(address):
                del waiting[address]


def is_serving(address: str) -> bool:
    """Returns whether a worker takes requests, as its health service says."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def _watch(gateway: Process, workers: dict[str, Process], port: int, stop: threading.Event) -> None:
    """Reports what becomes of the processes, until `stop`. Raises _EndedError."""
    announced = False
    while not stop.wait(_LOOK_SECONDS):
        if (code := gateway.poll()) is not None:
            raise _EndedError(f"the gateway has ended with exit code {code}")
        for address, worker in list(workers.items()):
            if (code := worker.poll()) is not None:
                del workers[address]
                _say(f"worker {address} has ended with exit code {code}; {len(workers)} left")
        if not workers:
            raise _EndedError("no worker is left")
        if not announced and num_ready(port) >= len(workers):
            announced = True
            _say(f"ready: OpenAI http://127.0.0.1:{port}/v1, Anthropic http://127.0.0.1:{port}; Ctrl-C ends all")
    _say("ending the gateway and the workers")


def num_ready(port: int) -> int:
    """Returns how many workers the gateway sends requests to; 0 while it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/workers")
        workers = json.load(connection.getresponse())["workers"]
    except (OSError, http.client.HTTPException, ValueError):
        return 0
    finally:
        connection.close()
    return sum(worker["status"] == "ready" for worker in workers)


def _end(processes: Sequence[Process]) -> None:
    """Ends processes, and waits for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            _say(f"process {process.pid} has not ended after {_END_SECONDS:g} s and is killed")
            process.kill()
            process.wait()


def _say(line: str) -> None:
    print(f"gateway: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
