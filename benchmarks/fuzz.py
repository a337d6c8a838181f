"""Random requests of every kind to a running server: `python -m benchmarks.fuzz --config tiny.gin`.

gRPC: random messages of every method of every service that reflection lists, valid and invalid, mutated ones, bytes,
and connections that speak no HTTP/2, or a broken one. HTTP: schemathesis on the OpenAPI document, in an environment of
its own, which `--schemathesis COMMAND` names:

    python -m venv fuzz-env && fuzz-env/bin/pip install schemathesis
    python -m benchmarks.fuzz --config tiny.gin --schemathesis fuzz-env/bin/schemathesis

It counts requests by their answers, and says what must not be: answers 5xx, INTERNAL or UNKNOWN, an end of the server,
tracebacks in its log, pages or requests that stay, and memory that grows. Exit status 1 where there is any of these.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import grpc

from benchmarks import report
from benchmarks.stress.random_messages import Method, RandomMessages, methods_of
from benchmarks.stress.stress_server import StressServer, stressed

BAD = {"INTERNAL", "UNKNOWN", "DATA_LOSS"}
"""Statuses with which no request may end, whatever it holds. UNAVAILABLE is counted where the server is alive."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CONCURRENT = 24
_TIMEOUT = 3.0
MOST_GROWTH_MB = 200.0
"""Memory that a front end may hold more of afterwards: caches that are bounded, and what the allocator keeps."""


async def fuzz_grpc(address: str, count: int, seed: int) -> dict[str, Any]:
    """Sends `count` random requests to the gRPC port; returns the answers by kind and status."""
    methods = await methods_of(address)
    messages = RandomMessages(seed)
    answers: collections.Counter[str] = collections.Counter()
    details: dict[str, str] = {}
    numbers = iter(range(count))
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        calls = {method.path: channel.stream_stream(method.path) for method in methods}

        async def work() -> None:
            for number in numbers:
                method = methods[number % len(methods)]
                kind, data = messages.request(method)
                status, text = await _call(calls[method.path], data)
                answers[f"{kind}: {status}"] += 1
                if status in BAD or status == "UNAVAILABLE":
                    details.setdefault(f"{status} of {method.path}", f"{text}; request {data[:200].hex()}")

        await asyncio.gather(*(work() for _ in range(_CONCURRENT)))
    return {"requests": count, "methods": _paths(methods), "answers": dict(sorted(answers.items())), "bad": details}


async def _call(call: Any, data: bytes) -> tuple[str, str]:
    """Makes one call; returns its status."""

    async def requests() -> Any:
        yield data

    running = call(requests(), timeout=_TIMEOUT)
    try:
        async for _ in running:
            pass
        return "OK", ""
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""


async def fuzz_connections(address: str, count: int, seed: int) -> dict[str, Any]:
    """Opens `count` connections that speak something else; returns how many the server closed."""
    host, _, port = address.rpartition(":")
    draw, outcomes = random.Random(seed), collections.Counter[str]()
    numbers = iter(range(count))

    async def work() -> None:
        for _ in numbers:
            outcomes[await _noise(host, int(port), _garbage(draw))] += 1

    await asyncio.gather(*(work() for _ in range(_CONCURRENT)))
    return {"requests": count, "answers": dict(outcomes)}


def _garbage(draw: random.Random) -> bytes:
    frames = b"".join(
        length.to_bytes(3, "big")
        + bytes([draw.randrange(12), draw.randrange(256)])
        + draw.randbytes(4)
        + draw.randbytes(size)
        for length, size in (
            (draw.choice((0, 4, 8, 100, 2**14, 2**24 - 1)), draw.choice((0, 4, 8, 100))) for _ in range(6)
        )
    )
    return draw.choice(
        (
            draw.randbytes(draw.choice((1, 24, 500, 20_000))),
            _PREFACE + draw.randbytes(200),
            _PREFACE + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) + frames,
            _PREFACE[: draw.randrange(len(_PREFACE))],
            b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nfffffff\r\nabc",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(300),
        )
    )


async def _noise(host: str, port: int, data: bytes) -> str:
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return "refused"
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(0.5):
            while await reader.read(65_536):
                pass
        return "closed by the server"
    except TimeoutError:
        return "left open"
    except OSError:
        return "reset by the server"
    finally:
        writer.close()


def fuzz_http(command: str, server: StressServer, count: int, seed: int) -> dict[str, Any]:
    """Runs schemathesis until it has made `count` requests; returns the answers by status."""
    answers: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    url = f"http://{server.http_address}/openapi.json"
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    for round_number in itertools.count():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "events.ndjson"
            done = subprocess.run(
                [command, "run", url, "--checks", "not_a_server_error", "--seed", str(seed + round_number)]
                + ["--max-examples", str(max(50, count // 20)), "--continue-on-failure", "--no-color"]
                + ["--request-timeout", "30", "--workers", "2", "--report", "har", "--report-har-path", str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            before = answers.total()
            for entry in json.loads(path.read_text())["log"]["entries"] if path.exists() else []:
                answers[str(entry["response"]["status"])] += 1
                if entry["response"]["status"] >= 500 and len(failures) < 20:
                    request, response = entry["request"], entry["response"]
                    text = response.get("content", {}).get("text", "")
                    body = (request.get("postData") or {}).get("text", "")
                    failures.append(f"{request['method']} {request['url']}: {text[:300]}; request {body[:300]}")
        if done.returncode not in (0, 1) or answers.total() == before:
            failures.append(f"schemathesis ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
            break
        if answers.total() >= count:
            break
    return {
        "schemathesis": version,
        "requests": answers.total(),
        "answers": dict(sorted(answers.items())),
        "bad": failures,
    }


def _paths(methods: Sequence[Method]) -> list[str]:
    return sorted(method.path for method in methods)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    with stressed(options.config, [f"--gin.{binding}" for binding in options.gin]) as server:
        asyncio.run(fuzz_grpc(server.grpc_address, 400, options.seed + 1))  # warm: memory counts from here
        before, begin = server.memory(), time.monotonic()
        results: dict[str, Any] = {
            "grpc": asyncio.run(fuzz_grpc(server.grpc_address, options.grpc, options.seed)),
            "grpc connections": asyncio.run(fuzz_connections(server.grpc_address, options.noise, options.seed)),
            "http connections": asyncio.run(fuzz_connections(server.http_address, options.noise, options.seed)),
        }
        if options.schemathesis:
            results["http"] = fuzz_http(options.schemathesis, server, options.http, options.seed)
        results["seconds"] = round(time.monotonic() - begin, 1)
        results["alive"] = server.process.poll() is None
        results["leaked"] = server.leaked() if results["alive"] else None
        results["memory_mb"] = {"before": before, "after": server.memory()}
        results["exit_code"] = server.end()
        results["tracebacks"] = server.bad_lines[:20]
    results["requests"] = sum(
        part["requests"] for part in results.values() if isinstance(part, dict) and "requests" in part
    )
    return results


def wrong(results: dict[str, Any]) -> list[str]:
    """Says what must not be, in lines."""
    found = [line for name in ("grpc", "http") for line in _bad_answers(name, results.get(name, {}))]
    if not results["alive"]:
        found.append("the server has ended")
    if results["exit_code"]:
        found.append(f"the server ended with exit code {results['exit_code']}")
    if any((results["leaked"] or {}).values()):
        found.append(f"still held: {results['leaked']}")
    if results["tracebacks"]:
        found.append(f"the log has {len(results['tracebacks'])} lines such as {results['tracebacks'][0]!r}")
    grown = results["memory_mb"]["after"]["front_end"] - results["memory_mb"]["before"]["front_end"]
    if grown > MOST_GROWTH_MB:
        found.append(f"the front end has grown by {grown:.0f} MB")
    return found


def _bad_answers(name: str, part: dict[str, Any]) -> list[str]:
    bad = part.get("bad") or []
    lines = [f"{status}: {text}" for status, text in bad.items()] if isinstance(bad, dict) else bad
    number = sum(count for status, count in part.get("answers", {}).items() if re.fullmatch("5..", status))
    return [f"{name}: {line}" for line in lines] + ([f"{name}: {number} answers 5xx"] if number else [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE", help="of the server")
    parser.add_argument("--grpc", type=int, default=10_000, help="requests to the gRPC port")
    parser.add_argument("--noise", type=int, default=500, help="connections to each port that speak something else")
    parser.add_argument("--http", type=int, default=9_000, help="requests to the HTTP port, at least")
    parser.add_argument("--schemathesis", metavar="COMMAND", help="the program; without it HTTP gets noise alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    results = _run(options)
    print(json.dumps({name: part for name, part in results.items() if name != "tracebacks"}, indent=1))
    settings = {name: value for name, value in vars(options).items() if name != "schemathesis"}
    print(report.write("fuzz", settings, results))
    problems = wrong(results)
    shown = [problem[:300] for problem in problems[:5]] + [f"{len(problems)} in all"] * (len(problems) > 5)
    return report.fail("\n".join(shown)) if problems else 0


if __name__ == "__main__":
    sys.exit(main())
