"""What streaming over HTTP costs the server beside gRPC: `python -m benchmarks.http_cost --config tiny.gin`.

One server, the same requests over each protocol in turn, from a client in a process of its own. For each: CPU seconds
of the server's process (the front end; the engine is a process of its own) for each output token. The ratio is that of
HTTP to gRPC, and fails the run above --most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.cpu_time import cpu_seconds, process_tree
from benchmarks.load import datasets, load_client
from benchmarks.load.datasets import LoadRequest
from benchmarks.load.server_process import started_server
from benchmarks.spread import spread, spread_text
from jaxserve.serving.clients.grpc_client import Client

PROTOCOLS = ("grpc", "http")
_READ_BYTES = 256 * 1024


async def over_grpc(address: str, requests: Sequence[LoadRequest]) -> dict[str, Any]:
    """Sends all requests at once; returns their output tokens and messages."""
    seen, _ = await load_client.drive(address, requests, [0.0] * len(requests))
    if errors := [one.error for one in seen if one.error]:
        raise RuntimeError(errors[0])
    return {"tokens": sum(one.output_tokens for one in seen), "messages": sum(len(one.tokens) for one in seen)}


async def over_http(address: str, requests: Sequence[LoadRequest]) -> dict[str, Any]:
    """As `over_grpc`, on a connection each."""
    host, _, port = address.rpartition(":")

    async def one(request: LoadRequest) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        body = json.dumps(
            {
                "prompt": prompt,
                "max_tokens": request.max_tokens,
                "ignore_eos": request.ignore_eos,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        parts = []
        while part := await reader.read(_READ_BYTES):
            parts.append(part)
        writer.close()
        return b"".join(parts)

    answers = await asyncio.gather(*(one(request) for request in requests))
    tokens = messages = 0
    for answer in answers:
        events = [line for line in answer.splitlines() if line.startswith(b"data: ")]
        if not answer.startswith(b"HTTP/1.1 200") or events[-1] != b"data: [DONE]":
            raise RuntimeError(answer[-500:].decode())
        tokens += json.loads(events[-2].removeprefix(b"data: "))["usage"]["completion_tokens"]
        messages += len(events) - 2
    return {"tokens": tokens, "messages": messages}


def drive(protocol: str, address: str, requests: Sequence[LoadRequest]) -> dict[str, Any]:
    """Runs in the client's process."""
    over = over_grpc if protocol == "grpc" else over_http
    begin, cpu = time.perf_counter(), time.process_time()
    found = asyncio.run(over(address, requests))
    return found | {"seconds": time.perf_counter() - begin, "client_cpu_seconds": time.process_time() - cpu}


def measure(options: argparse.Namespace, protocol: str, address: str, pid: int) -> dict[str, Any]:
    """One run of all requests over one protocol."""
    command = [sys.executable, "-m", "benchmarks.http_cost", "--drive", protocol, address]
    for name in ("streams", "input_len", "output_len", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    engines = process_tree(pid)[1:]
    front, engine = cpu_seconds(pid), sum(map(cpu_seconds, engines))
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout)
    found["server_cpu_seconds"] = cpu_seconds(pid) - front
    found["engine_cpu_seconds"] = sum(map(cpu_seconds, engines)) - engine
    found["server_us_per_token"] = 1e6 * found["server_cpu_seconds"] / found["tokens"]
    found["server_us_per_message"] = 1e6 * found["server_cpu_seconds"] / found["messages"]
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the first of each protocol warms up and does not count."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        http_port = probe.getsockname()[1]
    rounds: dict[str, list[dict[str, Any]]] = {protocol: [] for protocol in PROTOCOLS}
    overrides = [f"--gin.{binding}" for binding in options.gin]
    with started_server(options.config, overrides, http_port=http_port) as (address, pid):
        addresses = {"grpc": address, "http": f"127.0.0.1:{http_port}"}
        _wait_ready(addresses["grpc"])
        for number in range(options.rounds + 1):
            for protocol in PROTOCOLS[:: 1 if number % 2 else -1]:
                found = measure(options, protocol, addresses[protocol], pid)
                if number:
                    rounds[protocol].append(found)
                print(f"{number} {protocol}: {found['server_us_per_token']:.1f} us a token", file=sys.stderr)
    pairs = zip(*(rounds[protocol] for protocol in PROTOCOLS), strict=True)
    ratios = [http["server_us_per_token"] / grpc["server_us_per_token"] for grpc, http in pairs]
    return {"ratio": spread(ratios), "rounds": rounds}


def _wait_ready(address: str) -> None:
    with Client(address) as client:
        client.wait_ready(600.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE")
    parser.add_argument("--streams", type=int, default=64, help="requests at one time")
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=1.5, help="largest median ratio that is accepted")
    parser.add_argument("--out", default="http_cost", help="name of the file under benchmarks/results")
    parser.add_argument("--drive", nargs=2, metavar=("PROTOCOL", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.drive:
        lengths = (options.input_len, options.input_len), (options.output_len, options.output_len)
        requests = datasets.random_requests(options.streams, *lengths, vocab_size=256, seed=options.seed)
        protocol, address = options.drive
        print(json.dumps(drive(protocol, address, requests)))
        return 0
    results = run(options)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "drive")}
    path = report.write(options.out, settings, results)
    rows = [
        (
            protocol,
            *(
                sum(one[name] for one in results["rounds"][protocol]) / options.rounds
                for name in ("server_us_per_token", "server_us_per_message", "messages", "tokens", "seconds")
            ),
        )
        for protocol in PROTOCOLS
    ]
    print(report.describe())
    print(report.table(("protocol", "us/token", "us/message", "messages", "tokens", "seconds"), rows))
    print(f"HTTP to gRPC: {spread_text(results['ratio'])}; {path}")
    if results["ratio"]["median"] > options.most:
        return report.fail(f"the ratio is {results['ratio']['median']:.2f}; at most {options.most:g} is accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
