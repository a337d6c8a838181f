"""The server as a process: what it logs, and how signals, faulty starts and a dying engine end it."""

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import grpc
import msgspec
import pytest

from jaxserve.engine.messages import EngineStats
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.serving.clients.grpc_client import Client
from jaxserve.serving.running_log import busy_line, start_lines
from jaxserve.telemetry.startup_spans import seconds_since_start
from tests.engine_ready import changed
from tests.server.fakes import READY, WAIT_SECONDS, save_tokenizer
from tests.server.harness import GREEDY
from tests.server.process import Process


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def echo(directory) -> Iterator[Callable[..., Process]]:
    """Starts echo servers."""
    with contextlib.ExitStack() as stack:

        def start(control: str = "run", *overrides: str, tokenizer: str = str(directory)) -> Process:
            arguments = [sys.executable, "-m", "tests.server.echo_server", control, tokenizer, *overrides]
            process = Process(arguments)
            stack.callback(process.close)
            return process

        yield start


def in_background(call: Callable[[], object]) -> queue.Queue:
    """Runs a call in a thread; its result, or the gRPC error, goes to the queue."""
    results: queue.Queue[object] = queue.Queue()

    def run() -> None:
        try:
            results.put(call())
        except grpc.RpcError as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    return results


def test_fault_24_start_log_and_a_drain_that_ends_well(echo):
    process = echo()
    address = process.until(r"ready on (127\.0\.0\.1:\d+) in \d+\.\d s$").group(1)
    log = "\n".join(process.seen)
    assert "config: EngineConfig.model = 'models/tiny/checkpoint'" in log
    assert "page pool: 256 tokens (16 pages of 16)" in log
    assert "greatest concurrency at max_model_len 512: 0.5 requests (max_num_seqs 8)" in log
    assert "compiled 7 executables in 1.5 s" in log
    phases = json.loads(log.partition("start phases: ")[2].splitlines()[0])
    assert {phase["name"] for phase in phases["server"]} == {
        "interpreter, imports",
        "configuration",
        "bind",
        "engine",
        "tokenizer",
        "serve",
    }
    assert all(phase["begin"] >= 0 and phase["seconds"] >= 0 for phase in phases["server"])
    assert phases["engine"] == []
    with Client(address) as client:
        assert client.model_info().name == "tiny"
        process.order("pause")
        answer = in_background(lambda: client.generate_text("secret", GREEDY))
        process.order("wait 1")
        process.popen.send_signal(signal.SIGTERM)
        process.until("SIGTERM: shutting down")
        process.until("1 requests may finish for 30 s")
        process.order("resume")
        assert answer.get(timeout=WAIT_SECONDS).text == "secret"
    code, lines = process.end()
    assert code == 0
    assert not any("secret" in line or "Traceback" in line for line in lines)


@pytest.mark.parametrize("again", [True, False])
def test_fault_24_what_outlasts_the_drain_is_unavailable(echo, again):
    """With a second signal at once, without one when drain_seconds are over."""
    process = echo("run", f"--gin.ServerConfig.drain_seconds={600.0 if again else 0.2}")
    with Client(process.until(r"ready on (\S+) in").group(1)) as client:
        process.order("pause")
        answer = in_background(lambda: list(client.generate("abc", GREEDY, request_id="r")))
        process.order("wait 1")
        process.popen.send_signal(signal.SIGINT)
        process.until("1 requests may finish")
        if again:
            process.popen.send_signal(signal.SIGTERM)
            process.until("SIGTERM again: ending at once")
        assert answer.get(timeout=WAIT_SECONDS).code() is grpc.StatusCode.UNAVAILABLE
    code, lines = process.end()
    assert code == 0
    assert not any("Traceback" in line for line in lines)


def test_fault_22_a_dead_engine_is_one_line_and_a_failure(echo):
    process = echo()
    with Client(process.until(r"ready on (\S+) in").group(1)) as client:
        process.order("pause")
        answer = in_background(lambda: client.generate_text("abc", GREEDY))
        process.order("wait 1")
        process.order("die step 7 ran out of memory")
        error = answer.get(timeout=WAIT_SECONDS)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    code, lines = process.end()
    assert code == 1
    assert lines[-1] == "jaxserve.server: the engine has died: step 7 ran out of memory"
    assert not any("Traceback" in line for line in lines)


STEP_TIMEOUT = "--gin.ServerConfig.step_timeout=0.5"


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ("stuck", r"a step has not ended for \d\.\d s \(step_timeout 0\.5 s\)"),
        (
            "silent",
            r"the engine has not answered for \d\.\d s \(step_timeout 0\.5 s\): its process is stopped, or hangs",
        ),
    ],
)
def test_fault_23_an_engine_that_hangs_is_one_line_and_a_failure(echo, state, line):
    process = echo("run", STEP_TIMEOUT)
    with Client(process.until(r"ready on (\S+) in").group(1)) as client:
        process.order("pause")
        running = [in_background(lambda: client.generate_text("abc", GREEDY)) for _ in range(3)]
        process.order("wait 3")
        process.order(f"state {state}")
        for answer in running:
            error = answer.get(timeout=WAIT_SECONDS)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert re.fullmatch(line, error.details())
    code, lines = process.end()
    assert code == 1
    assert re.fullmatch(f"jaxserve.server: the engine has died: {line}", lines[-1])
    assert not any("Traceback" in line for line in lines)


def test_an_engine_that_hangs_while_idle(echo):
    process = echo("run", STEP_TIMEOUT)
    process.until("ready on")
    process.order("state silent")
    assert process.end()[0] == 1


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_fault_24_the_exit_code_tells_of_a_hung_engine_whatever_signals_come(echo, signals, when):
    process = echo("run", STEP_TIMEOUT if when == "before" else "--gin.ServerConfig.step_timeout=600.0")
    process.until("ready on")
    process.order("problem the engine process did not end within 2 s and was killed")
    if when == "before":
        process.order("state stuck")
    for number in signals:
        process.popen.send_signal(number)
    code, lines = process.end()
    assert code == 1
    assert lines[-1].startswith("jaxserve.server: the engine ")
    assert not any("Traceback" in line for line in lines)


def test_an_engine_that_dies_while_it_drains(echo):
    process = echo()
    with Client(process.until(r"ready on (\S+) in").group(1)) as client:
        process.order("pause")
        answer = in_background(lambda: client.generate_text("abc", GREEDY))
        process.order("wait 1")
        process.popen.send_signal(signal.SIGTERM)
        process.until("1 requests may finish")
        process.order("die out of memory")
        assert answer.get(timeout=WAIT_SECONDS).code() is grpc.StatusCode.UNAVAILABLE
    code, lines = process.end()
    assert (code, lines[-1]) == (1, "jaxserve.server: the engine has died: out of memory")


def test_fault_25_a_start_that_fails_is_one_line(echo, tmp_path):
    process = echo("fail model.safetensors is cut off: 10 of 20 bytes")
    code, lines = process.end()
    assert code == 1
    assert lines[-1] == "jaxserve.server: the model cannot be served: model.safetensors is cut off: 10 of 20 bytes"
    process = echo("hang", tokenizer=str(tmp_path))
    code, lines = process.end()
    assert code == 1
    assert re.search(r"jaxserve.server: the model cannot be served: tokenizer file '.*' does not exist$", lines[-1])
    assert not any("Traceback" in line for line in lines)


def test_a_signal_while_the_model_loads(echo):
    process = echo("hang")
    process.until("^hanging$")
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0


def test_a_port_in_use_stops_the_start_before_the_model_is_loaded(echo):
    first = echo()
    port = first.until(r"ready on 127\.0\.0\.1:(\d+) in").group(1)
    second = echo("hang", f"--gin.ServerConfig.port={port}")
    code, lines = second.end()
    assert code == 1
    assert re.fullmatch(f"jaxserve.server: port {port} is in use: .*", lines[-1])
    assert "hanging" not in lines


def test_faulty_configuration_is_one_line():
    for argument in ("--config=no-such.gin", "--gin.ServerConfig.prot=1", "--gin.ServerConfig.port=99999"):
        done = subprocess.run(
            [sys.executable, "-m", "jaxserve.server", argument], capture_output=True, text=True, timeout=WAIT_SECONDS
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_line_while_busy():
    before = EngineStats(num_steps=1, prompt_tokens=10, generation_tokens=20, computed_tokens=30, padding_tokens=2)
    now = EngineStats(
        num_running=3,
        num_waiting=4,
        pages_free=12,
        pages_used=3,
        pages_cached=1,
        num_steps=9,
        prompt_tokens=60,
        generation_tokens=120,
        computed_tokens=180,
        padding_tokens=52,
    )
    assert busy_line(before, now, 5.0) == (
        "prompt 10.0 tok/s, generation 20.0 tok/s, running 3, waiting 4, swapped 0, pool 18.8%, padding 25.0%"
    )
    assert busy_line(
        msgspec.structs.replace(now, num_preemptions_recompute=2, num_preemptions_swap=3),
        msgspec.structs.replace(
            now, num_swapped=5, num_preemptions_recompute=2, num_preemptions_swap=7, num_dropped=2, kendall_tau=0.416
        ),
        5.0,
    ) == (
        "prompt 0.0 tok/s, generation 0.0 tok/s, running 3, waiting 4, swapped 5, pool 18.8%, padding 0.0%, "
        "preempted by swap 4, dropped as late 2, length prediction tau 0.42"
    )
    assert busy_line(EngineStats(num_steps=9), EngineStats(num_steps=9), 5.0) is None
    hits = busy_line(before, msgspec.structs.replace(now, prefix_cache_queries=80, prefix_cache_hits=20), 5.0)
    assert hits is not None
    assert "pool 18.8%, prefix hits 25.0%, padding 25.0%" in hits


def test_figures_of_the_start():
    assert seconds_since_start() > 0
    assert start_lines(READY, "echo")[0] == (
        "model echo: EchoForCausalLM, 0.00M parameters, float32 on cpu, attention none"
    )
    assert start_lines(READY, "echo")[-1] == "compiled 7 executables in 1.5 s; engine start 2.5 s"
    for cached, origin in (
        (3, "compiled 4 executables and loaded 3 from the compilation cache"),
        (7, "loaded 7 executables from the compilation cache"),
    ):
        ready = changed(READY, num_cached_executables=cached)
        assert start_lines(ready, "echo")[-1] == f"{origin} in 1.5 s; engine start 2.5 s"
    for cached, origin in (
        (0, "compiled 2 of 7 executables"),
        (1, "compiled 1 of 7 executables and loaded 1 from the compilation cache"),
        (2, "loaded 2 of 7 executables from the compilation cache"),
    ):
        early = changed(READY, num_cached_executables=cached, num_missing_executables=5)
        assert start_lines(early, "echo")[-1] == (
            f"{origin} in 1.5 s; the others follow while it serves; engine start 2.5 s"
        )
    planned = changed(READY, memory=(("weights", 5_000_000), ("pages", 1_234_500_000)))
    assert start_lines(planned, "echo")[3] == "memory, MB: weights 5.0, pages 1,234.5"
    swapping = changed(planned, num_host_pages=512, preemption_costs=PreemptionCosts(123e-6, 2e-3))
    assert start_lines(swapping, "echo")[2] == (
        "swap space: 8,192 tokens (512 pages of host memory); to bring back a sequence takes 123 us a token computed "
        "again, 2,000 us a page swapped out and in"
    )
    assert start_lines(swapping, "echo")[3:] == start_lines(planned, "echo")[2:]
    loaded = changed(READY, bundle="bundles/echo")
    assert start_lines(loaded, "echo")[-1] == (
        "loaded 7 executables from bundle bundles/echo in 1.5 s; engine start 2.5 s"
    )
