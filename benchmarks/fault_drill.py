"""What clients, probes and the exit code show when an engine fails or hangs: `python -m benchmarks.fault_drill`.

Each case starts a server, lets 20 streams begin, and does one thing to it: stops a process, kills one, sends signals,
or has a failpoint make a step fail or sleep. It records the status of every stream and when it came, whether the tokens
of those that ended well are the tokens of an undisturbed run, every health probe's answer and latency, how long
refusals and aborts took, the exit code and the last line. Exit status 1 where a case ends otherwise than it should.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import report
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import Client

STREAMS = 20
STEP_TIMEOUT = 5.0
DRAIN_SECONDS = 5.0
_PROBE_SECONDS = 0.05
_END_SECONDS = 300.0


class Server:
    """A server process, its engine's process, and what it wrote to standard error."""

    def __init__(self, config: str, overrides: Sequence[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.lines: list[str] = []
        settings = {
            "ServerConfig.port": port,
            "ServerConfig.http_port": 0,
            "ServerConfig.step_timeout": STEP_TIMEOUT,
            "ServerConfig.drain_seconds": DRAIN_SECONDS,
        }
        command = [sys.executable, "-m", "jaxserve.server", "--config", config]
        command.append("--gin.EngineConfig.ready_when='complete'")  # no compiler beside what is measured
        self.process = subprocess.Popen(
            [*command, *(f"--gin.{name}={value!r}" for name, value in settings.items()), *overrides],
            cwd=report.ROOT,
            env=os.environ | {"PYTHONPATH": str(report.ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(_END_SECONDS) or self.process.poll() is not None:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {self.lines[-3:]}")
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.engine = int(children[0])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if " ready on " in line:
                self._ready.set()
        self._ready.set()

    def close(self) -> None:
        """Kills what is left."""
        for pid in (self.process.pid, self.engine):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclasses.dataclass
class Stream:
    """What one request got. status: "stop", "length" or "abort", or the gRPC status; ended: when."""

    name: str
    tokens: list[int] = dataclasses.field(default_factory=list)
    status: str = ""
    details: str = ""
    ended: float = 0.0
    longest_gap: float = 0.0

    def run(self, client: Client, tokens: int, begun: Callable[[], None]) -> None:
        number = int(self.name[1:])
        params = SamplingParams(temperature=1.0, seed=number, max_tokens=tokens, ignore_eos=True)
        last = time.perf_counter()
        try:
            for chunk in client.generate(f"count: {number} to {number + 9}\n", params, request_id=self.name):
                if not self.tokens:
                    begun()
                now = time.perf_counter()
                self.longest_gap, last = max(self.longest_gap, now - last), now
                self.tokens += chunk.token_ids
                if chunk.finish_reason is not None:
                    self.status = chunk.finish_reason.value
        except grpc.RpcError as error:
            call: Any = error
            self.status, self.details = call.code().name, call.details()
        self.ended = time.perf_counter()


class Probe:
    """Asks for the server's health until it is told to stop."""

    def __init__(self, address: str):
        self.answers: list[tuple[float, float, str]] = []  # when asked, seconds until the answer, the answer
        self._stop = threading.Event()
        self._channel = grpc.insecure_channel(address)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        while not self._stop.wait(_PROBE_SECONDS):
            begin = time.perf_counter()
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0).status
                answer = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            except grpc.RpcError as error:
                call: Any = error
                answer = call.code().name
            self.answers.append((begin, time.perf_counter() - begin, answer))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is done to a server. act: called when every stream has begun; None lets a failpoint do it all.

    code: the exit code that is right. statuses: those that streams may end with. asks: further requests and aborts come
    while the fault lasts. ends: the server ends by itself, or by the signals of `act`; else it gets SIGTERM afterwards.
    """

    name: str
    code: int
    statuses: tuple[str, ...]
    failpoints: tuple[str, ...] = ()
    act: Callable[[Server], None] | None = None
    asks: bool = False
    ends: bool = True


def _send(*steps: tuple[str, signal.Signals] | float) -> Callable[[Server], None]:
    """Sends signals to "engine" or "front", with pauses in seconds between them."""

    def act(server: Server) -> None:
        for step in steps:
            if isinstance(step, int | float):
                time.sleep(step)
            else:
                os.kill(server.engine if step[0] == "engine" else server.process.pid, step[1])

    return act


STOP, CONT, KILL, TERM, INT = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL, signal.SIGTERM, signal.SIGINT
WELL, GONE = ("length",), ("UNAVAILABLE",)
LATE = ",after=40"

CASES = (
    Case("undisturbed", 0, WELL, ends=False),
    Case("engine stopped", 1, GONE, act=_send(("engine", STOP))),
    Case("engine stopped, requests go on", 1, GONE, act=_send(("engine", STOP)), asks=True),
    Case("engine stopped for half the limit", 0, WELL, act=_send(("engine", STOP), 2.5, ("engine", CONT)), ends=False),
    Case(
        "front end stopped for twice the limit", 0, WELL, act=_send(("front", STOP), 10.0, ("front", CONT)), ends=False
    ),
    Case("a step sleeps", 1, GONE, ("collect=sleep(600),times=1" + LATE,), asks=True),
    Case("a step sleeps for half the limit", 0, WELL, ("collect=sleep(2.5),times=1" + LATE,), ends=False),
    Case("packing fails once", 0, WELL, ("pack=raise,times=1" + LATE,), ends=False),
    Case("memory is refused once", 0, WELL, ("enqueue=raise,times=1" + LATE,), ends=False),
    Case("a program fails once", 0, WELL, ("execute=raise,times=1" + LATE,), ends=False),
    Case("reading ids fails once", 0, WELL, ("collect=raise,times=1" + LATE,), ends=False),
    Case("packing fails for one request", 0, ("length", "INTERNAL"), ("pack=raise,request=r7" + LATE,), ends=False),
    Case("pages of one request fail", 0, ("length", "INTERNAL"), ("allocate=raise,request=r7,after=5",), ends=False),
    Case("text of one request fails", 0, ("length", "INTERNAL"), ("detokenize=raise,request=r7" + LATE,), ends=False),
    Case("sending to one client fails", 0, ("length", "INTERNAL"), ("send=raise,request=r7,after=5",), ends=False),
    Case("packing fails from now on", 1, GONE, ("pack=raise" + LATE,)),
    Case("memory is refused from now on", 1, GONE, ("enqueue=raise" + LATE,)),
    Case("programs fail from now on", 1, GONE, ("execute=raise" + LATE,)),
    Case("reading ids fails from now on", 1, GONE, ("collect=raise" + LATE,)),
    Case("engine killed", 1, GONE, act=_send(("engine", KILL))),
    Case("front end killed", -9, GONE, act=_send(("front", KILL))),
    Case("SIGTERM", 0, ("length", *GONE), act=_send(("front", TERM))),
    Case("SIGTERM, SIGINT", 0, ("length", *GONE), act=_send(("front", TERM), 0.5, ("front", INT))),
    Case("engine stopped, SIGTERM", 1, GONE, act=_send(("engine", STOP), 0.5, ("front", TERM))),
    Case("engine stopped, SIGINT, SIGTERM", 1, GONE, act=_send(("engine", STOP), ("front", INT), 0.5, ("front", TERM))),
    Case("SIGTERM, engine stopped", 1, ("length", *GONE), act=_send(("front", TERM), ("engine", STOP))),
    Case("SIGTERM, engine killed", 1, ("length", *GONE), act=_send(("front", TERM), ("engine", KILL))),
    Case("engine killed, SIGTERM", 1, GONE, act=_send(("engine", KILL), ("front", TERM))),
)


def run(case: Case, config: str, tokens: int, expected: dict[str, list[int]]) -> dict[str, Any]:
    """Runs a case; what it showed. expected: tokens of an undisturbed run."""
    failpoints = [f"--gin.EngineConfig.failpoints={case.failpoints!r}"] if case.failpoints else []
    server = Server(config, failpoints)
    try:
        with Client(server.address) as client:
            return _run(case, server, client, tokens, expected)
    finally:
        server.close()


def _run(case: Case, server: Server, client: Client, tokens: int, expected: dict[str, list[int]]) -> dict[str, Any]:
    streams = [Stream(f"r{number}") for number in range(STREAMS)]
    begun = threading.Semaphore(0)
    threads = [threading.Thread(target=one.run, args=(client, tokens, begun.release)) for one in streams]
    probe = Probe(server.address)
    for thread in threads:
        thread.start()
    for _ in streams:
        if not begun.acquire(timeout=_END_SECONDS):
            raise RuntimeError(f"{case.name}: a stream did not begin")
    at = time.perf_counter()
    if case.act is not None:
        case.act(server)
    asked = list(_ask(client, threads)) if case.asks else []
    for thread in threads:
        thread.join(_END_SECONDS)
    answers = probe.answers
    if not case.ends:
        time.sleep(2 * _PROBE_SECONDS)
        answers = list(probe.answers)
        server.process.send_signal(TERM)
    code = server.process.wait(_END_SECONDS)
    ended = time.perf_counter()
    probe.close()
    engine_gone = _gone_after(server.engine, ended)
    served = [one for one in streams if one.status in ("stop", "length")]
    if not expected:
        expected.update({one.name: one.tokens for one in streams})
    before_end = [answer for answer in answers if answer[0] + answer[1] < ended - 0.2]
    return {
        "case": case.name,
        "failpoints": list(case.failpoints),
        "statuses": dict(collections.Counter(one.status for one in streams)),
        "details": sorted({one.details for one in streams if one.details})[:3],
        "identical": sum(one.tokens == expected[one.name] for one in served),
        "prefixes": sum(one.tokens == expected[one.name][: len(one.tokens)] for one in streams),
        "streams_ended_seconds": max(one.ended for one in streams) - at,
        "longest_gap_seconds": max(one.longest_gap for one in streams),
        "probes": dict(collections.Counter(answer for _, _, answer in before_end)),
        "probe_largest_ms": 1e3 * max((seconds for _, seconds, _ in before_end), default=0.0),
        "asked": dict(collections.Counter(answer for answer, _ in asked)),
        "asked_largest_ms": 1e3 * max((seconds for _, seconds in asked), default=0.0),
        "exit_code": code,
        "exit_seconds": ended - at,
        "engine_gone_seconds": engine_gone,
        "last_line": re.sub(r"^\d{4}-\S+ \S+ ", "", server.lines[-1]),
        "tracebacks_of_the_front_end": sum(line.startswith("Traceback") for line in server.lines)
        if not case.failpoints
        else None,
        "right": code == case.code
        and {one.status for one in streams} <= set(case.statuses)
        and all(one.tokens == expected[one.name] for one in served)
        and all(one.tokens == expected[one.name][: len(one.tokens)] for one in streams)
        and engine_gone is not None,
    }


def _ask(client: Client, threads: Sequence[threading.Thread]) -> Iterator[tuple[str, float]]:
    """Sends requests that are refused, and aborts, until the streams have ended; each answer and its seconds."""
    refused = SamplingParams(max_tokens=10**6)
    waiting: list[Any] = []
    while any(thread.is_alive() for thread in threads):
        waiting.append(client.generate("copy: a\n", SamplingParams(max_tokens=8)))  # nobody answers it any more
        threading.Thread(target=_drain, args=(waiting[-1],), daemon=True).start()
        for name, call in (
            ("refusal", lambda: list(client.generate("copy: a\n", refused))),
            ("abort", lambda: client.abort("nobody")),
        ):
            begin = time.perf_counter()
            try:
                answer = f"{name}: {call()}"
            except grpc.RpcError as error:
                status: Any = error
                answer = f"{name}: {status.code().name}"
            yield answer, time.perf_counter() - begin
        time.sleep(0.02)


def _drain(chunks: Any) -> None:
    with contextlib.suppress(grpc.RpcError):
        for _ in chunks:
            pass


def _gone_after(pid: int, since: float) -> float | None:
    """Seconds until a process was gone; None where it stays."""
    while time.perf_counter() < since + 15:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return time.perf_counter() - since
        time.sleep(0.05)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fault_drill", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--only", help="part of the names of the cases to run beside the first")
    options = parser.parse_args(arguments)
    expected: dict[str, list[int]] = {}
    results = []
    for case in CASES:
        if options.only and options.only not in case.name and expected:
            continue
        result = run(case, options.config, options.tokens, expected)
        results.append(result)
        print(
            f"{'ok   ' if result['right'] else 'WRONG'} {case.name}: {result['statuses']}, identical "
            f"{result['identical']}, streams ended after {result['streams_ended_seconds']:.1f} s, exit "
            f"{result['exit_code']} after {result['exit_seconds']:.1f} s, probes {result['probes']} at most "
            f"{result['probe_largest_ms']:.0f} ms, asked {result['asked']} at most {result['asked_largest_ms']:.0f} ms"
            f"; {result['last_line']}",
            flush=True,
        )
    settings = {
        "config": options.config,
        "streams": STREAMS,
        "tokens": options.tokens,
        "step_timeout": STEP_TIMEOUT,
        "drain_seconds": DRAIN_SECONDS,
    }
    if not options.only:
        print(report.write("fault_drill", settings, results))
    wrong = [result["case"] for result in results if not result["right"]]
    return report.fail(f"not as it should be: {', '.join(wrong)}") if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
