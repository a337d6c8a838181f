"""What clients hold open at the server: `python -m benchmarks.held_open --config tiny.gin`.

Three runs, each on a server of its own, while health is asked for all the time over a kept connection and over a new
one each time: calls of which nobody reads an answer, connections without calls, and both at a server that may open
few files. For each: what the calls got, how long probes waited, the server's memory before, at most and after.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import grpc

from benchmarks import report
from benchmarks.load import http2
from benchmarks.load.probes import KINDS, probing
from benchmarks.load.server_process import started_server
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import Client, generate_request
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

_METHOD = "/{}/Generate".format(pb.DESCRIPTOR.services_by_name["JaxServe"].full_name)
_STATUS = {code.value[0]: code.name for code in grpc.StatusCode}
_PATIENCE = 600.0
_GREETING = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) + bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
)


class Silent(asyncio.Protocol):
    """A connection without calls. greet: whether it says that it speaks HTTP/2."""

    def __init__(self, greet: bool):
        self._greet = greet
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._greet:
            transport.write(_GREETING)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False


async def never_read(address: str, count: int, num_connections: int, seconds: float) -> dict[str, Any]:
    """What calls get whose client lets the server send nothing; None is a call that was open in the end."""
    payload = generate_request("abc", SamplingParams(temperature=0.0, max_tokens=8)).SerializeToString()
    connections = [await http2.connect(address, _METHOD, window=0) for _ in range(num_connections)]
    begin = time.monotonic()
    streams = []
    for number in range(count):
        streams.append(connections[number % num_connections].start(payload))
        if number % 100 == 99:
            await asyncio.sleep(0)
    open_after = {}
    for moment in (2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0):
        if moment < seconds and not all(stream.done.done() for stream in streams):
            await asyncio.sleep(max(0.0, begin + moment - time.monotonic()))
            open_after[f"{moment:g} s"] = sum(not stream.done.done() for stream in streams)
    await asyncio.wait([stream.done for stream in streams], timeout=max(0.0, begin + seconds - time.monotonic()))
    answers = collections.Counter(_STATUS[stream.status] if stream.status is not None else "OPEN" for stream in streams)
    for connection in connections:
        connection.close()
    return {"calls": count, "connections": num_connections, "answers": dict(answers), "open_after": open_after}


async def idle(address: str, count: int, seconds: float) -> dict[str, Any]:
    """How many of the connections the server keeps: half of them speak HTTP/2, half say nothing."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    peers: list[Silent] = []
    refused = 0
    for number in range(count):
        try:
            _, peer = await loop.create_connection(lambda greet=number % 2 == 0: Silent(greet), host, int(port))
        except OSError:
            refused += 1
        else:
            peers.append(peer)
    open_after = {}
    begin = time.monotonic()
    for moment in (0.5, 2.0, 5.0, 15.0):
        if moment <= seconds:
            await asyncio.sleep(max(0.0, begin + moment - time.monotonic()))
            open_after[f"{moment:g} s"] = sum(peer.open for peer in peers)
    for peer in peers:
        peer.transport.close()
    return {"connections": count, "not_connected": refused, "open_after": open_after}


async def crowded(address: str, options: argparse.Namespace) -> dict[str, Any]:
    """Connections without calls, calls that are never read, and again connections."""
    return {
        "idle": await idle(address, options.connections, 5.0),
        "never_read": await never_read(address, options.calls // 50, 20, 15.0),
        "idle_again": await idle(address, options.connections, 5.0),
    }


@contextlib.contextmanager
def watching_memory(pid: int) -> Iterator[dict[str, float]]:
    """The resident memory of a process in MB: before, at most, and at the end of the block."""
    status = pathlib.Path(f"/proc/{pid}/statm")
    page = 4096 / 1e6

    def resident() -> float:
        return int(status.read_text(encoding="ascii").split()[1]) * page

    found = {"before": resident()}
    found["peak"] = found["before"]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            found["peak"] = max(found["peak"], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found["after"] = resident()


def run(
    options: argparse.Namespace,
    what: Callable[[str], Coroutine[Any, Any, dict[str, Any]]],
    open_files: int | None = None,
) -> dict[str, Any]:
    """One run on a server of its own, that may open so many files."""
    overrides = [f"--gin.{binding}" for binding in options.gin]
    with started_server(options.config, overrides, open_files=open_files) as (address, pid):
        with Client(address) as client:
            client.wait_ready(_PATIENCE)
            client.generate_text("warm", SamplingParams(temperature=0.0, max_tokens=8))
        with watching_memory(pid) as memory, probing(address) as probes:
            result = asyncio.run(what(address))
            time.sleep(options.settle)
        with Client(address) as client:
            client.generate_text("after", SamplingParams(temperature=0.0, max_tokens=8))
            unfinished = client.server_info().stats
    result |= {"probes": probes, "memory_mb": memory}
    return result | {"unfinished_requests": unfinished.num_running + unfinished.num_waiting}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny.gin", help="of the servers")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE", help="for them; may repeat")
    parser.add_argument("--calls", type=int, default=10_000, help="that are never read")
    parser.add_argument("--call-connections", type=int, default=4, help="which these come over")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long these are watched at most")
    parser.add_argument("--connections", type=int, default=1000, help="without calls")
    parser.add_argument("--open-files", type=int, default=128, help="that the third server may have")
    parser.add_argument("--settle", type=float, default=25.0, help="seconds before memory is read again")
    parser.add_argument("--output", type=pathlib.Path, help="file; default: results/held_open_jax<version>.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result; returns the exit status."""
    options = parse(arguments)
    results = {
        "never_read": run(
            options, lambda address: never_read(address, options.calls, options.call_connections, options.seconds)
        ),
        "idle": run(options, lambda address: idle(address, options.connections, 15.0)),
        "few_files": run(options, lambda address: crowded(address, options), options.open_files),
    }
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    if options.output is None:
        path = report.write(f"held_open_jax{report.versions()['jax']}", settings, results)
    else:
        path = options.output
        text = json.dumps(report.document("held_open", settings, results), indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
    print(report.describe())
    print(table(results))
    for name, found in results.items():
        print(f"{name}: {json.dumps({key: found[key] for key in found if key not in ('probes', 'memory_mb')})}")
    print(f"written: {path}")
    return 0


def table(results: dict[str, Any]) -> str:
    """Probes and memory of each run."""
    columns = ("probes", "failed", "late", "p50_ms", "p99_ms", "max_ms", "longest_without_answer_s")
    memory = ("before", "peak", "after")
    rows = [
        (
            f"{name}, {kind} connection",
            *(found["probes"][kind].get(column, "") for column in columns),
            *(found["memory_mb"][column] for column in memory),
        )
        for name, found in results.items()
        for kind in KINDS
    ]
    return report.table(("", *columns, *(f"{column}_mb" for column in memory)), rows)


if __name__ == "__main__":
    raise SystemExit(main())
