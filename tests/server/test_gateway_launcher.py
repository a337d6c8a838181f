"""The launcher of workers and gateway: its commands, and what it says when a process ends."""

import asyncio
import signal
import sys

import pytest

from jaxserve.serving.deploy import gateway
from tests.server.harness import Served, run_served


def test_the_commands_name_every_worker():
    worker = gateway.worker_command("tiny.gin", "127.0.0.1:50052", ["--gin.A.b=1"])
    assert worker[1:] == [
        *("-m", "jaxserve.server", "--config", "tiny.gin"),
        *("--gin.ServerConfig.port=50052", "--gin.ServerConfig.http_port=0", "--gin.A.b=1"),
    ]
    command = gateway.gateway_command("smg", 30000, 29000, ["127.0.0.1:1", "127.0.0.1:2"])
    assert command[:2] == ["smg", "launch"]
    first = command.index("--worker-urls")
    assert command[first + 1 : first + 5] == ["grpc://127.0.0.1:1", "grpc://127.0.0.1:2", "--policy", "cache_aware"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--smg", "smg", "--gn.A=1"], "--gn.A=1 is not known"), (["--smg", "smg", "--workers", "0"], "--workers is 0")],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gateway.main(arguments)
    assert message in capsys.readouterr().err


def exiting(code: int):
    return lambda *_: [sys.executable, "-c", f"raise SystemExit({code})"]


def test_a_worker_that_does_not_start_ends_all(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gateway, "worker_command", exiting(3))
    assert gateway.main(["--smg", "smg", "--workers", "1"]) == 1
    assert capsys.readouterr().err == "gateway: worker 127.0.0.1:50051 has ended with exit code 3\n"


def test_a_gateway_that_ends_ends_all(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gateway, "worker_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(gateway, "is_serving", lambda address: True)
    monkeypatch.setattr(gateway, "gateway_command", exiting(2))
    assert gateway.main(["--smg", "smg"]) == 1
    assert capsys.readouterr().err == "gateway: the gateway has ended with exit code 2\n"
    monkeypatch.setattr(gateway, "gateway_command", lambda *_: ["/no/such/program"])
    assert gateway.main(["--smg", "smg"]) == 1
    assert "/no/such/program" in capsys.readouterr().err


def test_whether_a_worker_serves_is_asked_of_its_health(tokenizer):
    async def body(served: Served) -> None:
        assert await asyncio.to_thread(gateway.is_serving, served.address)
        served.drain()
        assert not await asyncio.to_thread(gateway.is_serving, served.address)

    run_served(body, tokenizer)
    assert not gateway.is_serving("127.0.0.1:1")
    assert gateway.num_ready(1) == 0
