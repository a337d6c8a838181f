"""What others notice of messages just under the size limit: `python -m benchmarks.long_prompts --config tiny.gin`.

A server runs one stream after another, and health is probed every few milliseconds. Beside them, processes of their own
send what is large, alone and eight at once: texts of 4 MB to Generate and Tokenize, millions of token ids to Generate
and Detokenize, two million stop strings, a million unknown fields. For each: how long health takes, the largest gap
between two messages of the stream, and the memory of the server's process before, at its peak and after.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import report
from benchmarks.load.server_process import started_server
from jaxserve.frontend.low_priority import yield_to_others
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import AsyncClient
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

_SIZE = 4 * 1024 * 1024 - 1024
"""Bytes of a text; the server takes messages of 4 MiB."""
_PREFIX = "/jaxserve.v1.JaxServe/"
_WORDS = "The quick brown fox jumps over 12 lazy dogs, and then once more. "
_PROBE_SECONDS = 0.005
_SETTLE_SECONDS = 2.0
_SECONDS = 120.0


def _text(words: str) -> str:
    return (words * (_SIZE // len(words.encode()) + 1)).encode()[:_SIZE].decode(errors="ignore")


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "Generate, text": ("Generate", lambda: pb.GenerateRequest(text=_text(_WORDS)).SerializeToString()),
    "Generate, text without spaces": ("Generate", lambda: pb.GenerateRequest(text=_text("x")).SerializeToString()),
    "Generate, text of emoji": ("Generate", lambda: pb.GenerateRequest(text=_text("🍏")).SerializeToString()),
    "Generate, 2 million ids": (
        "Generate",
        lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300] * 2_000_000)).SerializeToString(),
    ),
    "Generate, 2 million stop strings": (
        "Generate",
        lambda: pb.GenerateRequest(
            text="hi", sampling_params=pb.SamplingParams(stop=[""] * 2_000_000)
        ).SerializeToString(),
    ),
    "Generate, a million unknown fields": (
        "Generate",
        lambda: pb.GenerateRequest(text="hi").SerializeToString() + b"\xf8\x07\x01" * 1_000_000,
    ),
    "Tokenize, text": ("Tokenize", lambda: pb.TokenizeRequest(text=_text(_WORDS)).SerializeToString()),
    "Tokenize, text without spaces": ("Tokenize", lambda: pb.TokenizeRequest(text=_text("x")).SerializeToString()),
    "Detokenize, a million ids": (
        "Detokenize",
        lambda: pb.DetokenizeRequest(token_ids=[120] * 2**20).SerializeToString(),
    ),
    "Detokenize, 4 million ids": (
        "Detokenize",
        lambda: pb.DetokenizeRequest(token_ids=[120] * 4_000_000).SerializeToString(),
    ),
}
"""Method and message of each case."""


# ---- the process that sends ------------------------------------------------------------------------------------------


async def send(case: str, count: int, address: str) -> list[dict[str, Any]]:
    """Sends a case `count` times at once when told to on standard input; returns what became of each."""
    yield_to_others()  # a client elsewhere takes none of the server's CPU
    method, make = CASES[case]
    message = make()
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        await channel.channel_ready()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return list(await asyncio.gather(*(_send_one(channel, method, message) for _ in range(count))))


async def _send_one(channel: grpc.aio.Channel, method: str, message: bytes) -> dict[str, Any]:
    begin = time.perf_counter()
    size, code, details = 0, "OK", ""
    try:
        if method == "Generate":
            async for part in channel.unary_stream(_PREFIX + method)(message, timeout=_SECONDS):
                size += len(part)
        else:
            size = len(await channel.unary_unary(_PREFIX + method)(message, timeout=_SECONDS))
    except grpc.aio.AioRpcError as error:
        code, details = error.code().name, error.details() or ""
    return {"code": code, "details": details, "bytes": size, "seconds": time.perf_counter() - begin}


# ---- the process that watches ----------------------------------------------------------------------------------------


class Watch:
    """Probes a server's health and reads its streams until it is stopped. Times are in seconds."""

    def __init__(self, address: str):
        self._address = address
        self._stopped = False
        self.health: list[float] = []
        self.gaps: list[float] = []
        self.tokens = 0

    async def probe(self) -> None:
        """Asks for health every few milliseconds."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while not self._stopped:
                begin = time.perf_counter()
                await stub.Check(health_pb2.HealthCheckRequest())
                self.health.append(time.perf_counter() - begin)
                await asyncio.sleep(_PROBE_SECONDS)

    async def read(self) -> None:
        """Reads one stream after another; the time to a stream's first message is not a gap."""
        params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
        async with AsyncClient(self._address) as client:
            while not self._stopped:
                last = None
                async for chunk in client.generate("count: 1 2 3\n", params):
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now
                    self.tokens += len(chunk.token_ids)
                    if self._stopped:
                        break

    async def during(self, work: Awaitable[Any]) -> Any:
        """Watches while `work` runs, and a little longer; returns its result."""
        tasks = [asyncio.ensure_future(one()) for one in (self.probe, self.read)]
        await asyncio.sleep(0.5)
        result = await work
        await asyncio.sleep(_SETTLE_SECONDS)
        self._stopped = True
        await asyncio.gather(*tasks)
        return result


async def measure(case: str | None, count: int, address: str, pid: int) -> dict[str, Any]:
    """One case, sent `count` times at once; None watches alone."""
    watch = Watch(address)
    before = _start_memory(pid)
    if case is None:
        answers = await watch.during(asyncio.sleep(3.0, []))
    else:
        send = [sys.executable, "-m", "benchmarks.long_prompts", "--send", case, str(count), address]
        sender = await asyncio.create_subprocess_exec(
            *send,
            cwd=report.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=2**24,
            start_new_session=True,  # see `yield_to_others`
        )
        try:
            assert sender.stdout is not None
            await sender.stdout.readline()
            output, _ = await watch.during(sender.communicate(b"go\n"))
        finally:
            if sender.returncode is None:
                sender.kill()
        answers = json.loads(output)
    health, gaps = sorted(watch.health), sorted(watch.gaps)
    return {
        "case": case or "nothing",
        "count": count,
        "answers": answers,
        "health_p99_ms": 1e3 * health[int(0.99 * (len(health) - 1))],
        "health_largest_ms": 1e3 * health[-1],
        "gap_p99_ms": 1e3 * gaps[int(0.99 * (len(gaps) - 1))],
        "gap_largest_ms": 1e3 * gaps[-1],
        "tokens": watch.tokens,
        "memory_before_mb": before,
        "memory_peak_mb": memory_mb(pid, "VmHWM"),
        "memory_after_mb": memory_mb(pid, "VmRSS"),
    }


def _watch_punctually() -> None:
    """Raises the priority of this process, so that it sees a message when it arrives, however busy the server is.

    On a machine of few cores it would otherwise measure how long it waited for one itself. Needs privileges.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    except OSError:
        print("this process cannot raise its priority; gaps include its own waits for a processor", file=sys.stderr)


def _start_memory(pid: int) -> float:
    """The memory of a process in MB now; what it has used until then does not count as its peak any more."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory_mb(pid, "VmRSS")


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process in MB, as /proc/PID/status has it."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/{pid}/status has no {field}")


def table(found: Sequence[dict[str, Any]]) -> str:
    """A row for each case."""
    rows = []
    for one in found:
        codes = collections.Counter(answer["code"] for answer in one["answers"])
        longest = max((answer["seconds"] for answer in one["answers"]), default=0.0)
        memory = [one[f"memory_{when}_mb"] for when in ("before", "peak", "after")]
        rows.append(
            (
                one["case"],
                one["count"],
                ", ".join(codes),
                longest,
                one["health_p99_ms"],
                one["health_largest_ms"],
                one["gap_largest_ms"],
                *memory,
            )
        )
    header = ("beside", "at once", "answers", "longest s", "health p99 ms", "largest", "largest gap ms")
    return report.table((*header, "MB before", "peak", "after"), rows)


async def _measure_all(options: argparse.Namespace, address: str, pid: int) -> list[dict[str, Any]]:
    async with AsyncClient(address) as client:
        await client.wait_ready(300.0)
    found = []
    await measure(None, 0, address, pid)  # everything is warm from here on
    for case in (None, *options.cases):
        for count in options.counts if case is not None else (0,):
            one = await measure(case, count, address, pid)
            found.append(one)
            print(f"{one['case']} x {count}: largest gap {one['gap_largest_ms']:.0f} ms", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result."""
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments[:1] == ["--send"]:
        case, count, address = arguments[1:]
        print(json.dumps(asyncio.run(send(case, int(count), address))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE", help="may be repeated")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8], help="how many are sent at once")
    parser.add_argument("--output", default=None, help="name of the result; default: long_prompts_jaxVERSION")
    options = parser.parse_args(arguments)
    name = (options.output or f"long_prompts_jax{report.versions()['jax']}").removesuffix(".json")
    with started_server(options.config, [f"--gin.{binding}" for binding in options.gin]) as (address, pid):
        _watch_punctually()
        found = asyncio.run(_measure_all(options, address, pid))
    print(report.describe())
    print(table(found))
    print(f"written: {report.write(name, vars(options), found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
