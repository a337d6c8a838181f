"""What happens to the processes of a running server, seen from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import grpc
import httpx
import pytest

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import AsyncClient
from tests.models.checkpoints import SHAPES, write_shape
from tests.server.fakes import save_tokenizer
from tests.server.harness import GREEDY, health_of, status_of
from tests.server.process import Process

Code = grpc.StatusCode
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., tuple[Process, int, str]]]:
    """Starts a server; returns it, its engine's process and its gRPC address."""
    processes = []

    def run(*overrides: str) -> tuple[Process, int, str]:
        directory = save_tokenizer(tmp_path)
        process = Process([sys.executable, "-m", "tests.faults.process_server", str(directory), *overrides])
        processes.append(process)
        engine = int(process.until(r"^engine process (\d+)$")[1])
        return process, engine, process.until(r"ready on (127\.0\.0\.1:\d+)")[1]

    yield run
    for process in processes:
        process.close()


def gone(pid: int) -> bool:
    command = pathlib.Path(f"/proc/{pid}/cmdline")
    return not command.exists() or not command.read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fault_30_a_stopped_engine_ends_the_server_and_health_aborts_and_refusals_go_on(start):
    process, engine, address = start("--gin.ServerConfig.step_timeout=2.0", "--gin.SchedulerConfig.max_num_seqs=8")

    async def body() -> None:
        async with AsyncClient(address) as client:
            assert len((await client.generate_text("abc", LONG)).token_ids) == 200
            os.kill(engine, signal.SIGSTOP)
            streams = [
                asyncio.ensure_future(status_of(client.generate_text("abc", LONG, request_id=f"r{number}")))
                for number in range(6)
            ]
            await asyncio.sleep(0)
            assert await health_of(address) == "SERVING"
            assert not await client.abort("nobody")
            code, _ = await status_of(client.generate_text("abc", SamplingParams(max_tokens=10**6)))
            assert code is Code.INVALID_ARGUMENT
            while not await client.abort("r0"):  # noqa: ASYNC110  as soon as it has come
                await asyncio.sleep(0.01)
            for number, (code, details) in enumerate(await asyncio.gather(*streams[1:])):
                assert code is Code.UNAVAILABLE, (number, details)
                assert "the engine has not answered for" in details

    asyncio.run(body())
    code, lines = process.end()
    assert code == 1
    assert "the engine has died: the engine has not answered for" in lines[-1]
    assert gone(engine)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fault_22_a_second_fault_ends_the_process_with_exit_code_1(start):
    failpoints = "--gin.EngineConfig.failpoints=('execute=raise,after=30',)"
    process, engine, address = start(failpoints)

    async def body() -> None:
        async with AsyncClient(address) as client:
            answers = [status_of(client.generate_text("abc", LONG)) for _ in range(4)]
            for code, details in await asyncio.gather(*answers):
                assert code is Code.UNAVAILABLE
                assert "s after another: InjectedFaultError" in details

    asyncio.run(body())
    code, lines = process.end()
    assert code == 1
    assert lines[-1].startswith("jaxserve.server: the engine has died: step 31 failed 0.")
    assert gone(engine)


def test_fault_24_a_second_signal_while_many_streams_run_ends_the_server_at_once(start):
    process, _, address = start("--gin.ServerConfig.drain_seconds=600.0")

    async def body() -> None:
        async with AsyncClient(address) as client:
            endless = SamplingParams(temperature=0.0, max_tokens=250, ignore_eos=True)
            streams = [client.generate("abc", endless) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            process.popen.send_signal(signal.SIGTERM)
            process.popen.send_signal(signal.SIGTERM)
            for stream in streams:
                with contextlib.suppress(grpc.aio.AioRpcError):  # it may have ended in time
                    async for _ in stream:
                        pass
            assert (await status_of(client.generate_text("new", GREEDY)))[0] is Code.UNAVAILABLE

    asyncio.run(body())
    assert process.end()[0] == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_fault_24_streams_of_both_ports_end_alike(tmp_path, signals):
    """When the drain is over, or at once with a second signal: each is told, and the exit code is 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (f"http_port={port}", f"drain_seconds={600.0 if signals == 2 else 0.2}")
    overrides = [f"--gin.ServerConfig.{setting}" for setting in settings]
    directory = save_tokenizer(tmp_path)
    process = Process([sys.executable, "-m", "tests.server.echo_server", "run", str(directory), *overrides])

    async def body() -> None:
        address = (await asyncio.to_thread(process.until, r"ready on (\S+) and (\S+) in"))[1]
        process.order("pause")
        fields = {"model": "tiny", "prompt": "abc", "stream": True}
        async with httpx.AsyncClient(timeout=60.0) as http, AsyncClient(address) as client:
            url = f"http://127.0.0.1:{port}"
            streams = (
                asyncio.ensure_future(http.post(f"{url}/v1/completions", json=fields)),
                asyncio.ensure_future(status_of(client.generate_text("abc", GREEDY))),
            )
            await asyncio.to_thread(process.order, "wait 2")
            assert (await http.get(f"{url}/health/ready")).status_code == 200
            for number in range(signals):
                process.popen.send_signal(signal.SIGTERM)  # which must be seen before the next, or they are one
                await asyncio.to_thread(process.until, "ending at once" if number else "2 requests may finish")
            answer, (code, details) = await asyncio.gather(*streams)
            assert "shutting down" in answer.text
            assert "[DONE]" not in answer.text
            assert (code, "shutting down" in details) == (Code.UNAVAILABLE, True)

    try:
        asyncio.run(body())
        code, lines = process.end()
        assert code == 0, lines
        assert not any("Traceback" in line for line in lines)
    finally:
        process.close()


def test_fault_25_a_truncated_checkpoint_stops_the_start_with_one_line_and_runs_no_code(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    write_shape(directory, SHAPES["mqa"])
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (directory / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"^[^\n]*model.safetensors is truncated: [^\n]*$"):
        InlineEngine(EngineConfig(model=str(directory), skip_tokenizer_init=True))
    assert not (tmp_path / "ran").exists()
