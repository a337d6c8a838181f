"""The engine in a process of its own: same tokens as inline, and a clear answer whichever side dies."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.config.wire_config import config_to_bytes
from jaxserve.engine.channel import EngineClient
from jaxserve.engine.framing import frames
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineOutput,
    EngineStats,
    TokenBatch,
    outputs,
)
from jaxserve.engine.process import EngineProcess
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest, FinishReason

CONFIG = EngineConfig(
    architecture=ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256),
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=64),
    token_buckets=(8, 32),
)
REQUESTS = [
    EngineRequest(f"r{i}", tuple(range(1 + 5 * i)), max_tokens=4 + i, temperature=i % 2, seed=i) for i in range(6)
]


def answers(client: EngineClient) -> dict[str, tuple[list[int], FinishReason]]:
    """Sends the requests and waits for their ends."""
    for request in REQUESTS:
        client.send(AddRequest(request))
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, FinishReason] = {}
    while len(reasons) < len(REQUESTS):
        for message in client.receive():
            for output in outputs(message):
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    assert output.request_id not in reasons
                    reasons[output.request_id] = output.finish_reason
    return {name: (tokens[name], reasons[name]) for name in reasons}


@pytest.fixture(scope="module")
def composition_dir(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("composition")


@pytest.fixture(scope="module")
def engine(composition_dir):
    client = EngineProcess(dataclasses.replace(CONFIG, composition_dir=str(composition_dir)))
    yield client
    client.close()


def test_tokens_are_those_of_the_inline_engine(engine):
    inline = InlineEngine(CONFIG)
    assert answers(engine) == answers(inline)
    assert (
        (engine.ready.limits.vocab_size, engine.ready.info.usable_pages)
        == (96, 63)
        == (inline.ready.limits.vocab_size, inline.ready.info.usable_pages)
    )


def test_an_abort_is_answered_and_frees_the_pages(engine):
    engine.send(AddRequest(EngineRequest("long", (1, 2, 3), max_tokens=250)))
    assert any(isinstance(message, EngineOutput | TokenBatch | EngineStats) for message in engine.receive())
    engine.send(AbortRequest("long"))
    reason, pages_used = None, None
    while reason is None or pages_used != 0:
        for message in engine.receive():
            if isinstance(message, EngineOutput) and message.finish_reason is not None:
                reason = message.finish_reason
            if isinstance(message, EngineStats):
                pages_used = message.pages_used
    assert reason is FinishReason.ABORT


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (EngineConfig(model="no/such/place"), "model is 'no/such/place'; there is no such directory"),
        (
            EngineConfig(architecture=CONFIG.architecture, load_format="dummy", max_model_len=300),
            "max_model_len is 300",
        ),
    ],
)
def test_an_engine_that_cannot_start_says_why(config, line):
    with pytest.raises(ValueError, match=line):
        EngineProcess(config)


def test_a_dead_engine_is_told():
    client = EngineProcess(CONFIG)
    client.send(AddRequest(EngineRequest("a", (1,), max_tokens=200)))
    os.kill(client.pid, signal.SIGKILL)
    seen = []
    while not any(isinstance(message, EngineFailed) for message in seen):
        seen.extend(client.receive())
    assert "exit code -9" in seen[-1].error
    client.send(AbortRequest("a"))  # harmless
    client.close()


def test_fault_30_a_stopped_engine_holds_nobody_up(engine):
    """What it is sent waits, however much; when it goes on it answers all of it."""
    before = engine.progress().beat
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        for number in range(40):  # more than a socket takes
            engine.send(AddRequest(EngineRequest(f"big{number}", tuple(range(96)) * 200, max_tokens=1)))
            engine.progress()
        assert engine.unsent_bytes > 100_000
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    for number in range(40):
        engine.send(AbortRequest(f"big{number}"))
    ended: set[str] = set()
    while len(ended) < 40 or engine.progress().beat <= before + 2:
        for message in engine.receive() if len(ended) < 40 else []:
            ended |= {output.request_id for output in outputs(message) if output.finish_reason is not None}
        if len(ended) == 40:
            assert set(answers(engine)) == {request.request_id for request in REQUESTS}
    assert engine.unsent_bytes == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_the_end_of_an_engine_is_told(stopped):
    client = EngineProcess(CONFIG)
    if not stopped:
        assert client.close() == client.close() == ""
        return
    os.kill(client.pid, signal.SIGSTOP)
    assert client.close(0.1) == "the engine process did not end within 0.1 s and was killed"


def test_signals_to_the_group_do_not_reach_the_engine(engine):
    assert os.getsid(engine.pid) != os.getsid(0)
    os.kill(engine.pid, signal.SIGTERM)
    os.kill(engine.pid, signal.SIGINT)
    assert set(answers(engine)) == {request.request_id for request in REQUESTS}


def test_the_engine_ends_at_once_when_its_front_end_dies_during_start():
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.engine.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    ours.sendall(frames([config_to_bytes(CONFIG)]))
    ours.close()
    _, errors = worker.communicate(timeout=120)
    assert (worker.returncode, errors) == (0, b"")


ORPHAN = """
import os, sys
from jaxserve.engine.process import EngineProcess
from jaxserve.config.wire_config import config_to_bytes
from tests.engine.test_process import CONFIG
client = EngineProcess(CONFIG)
print(client.pid, flush=True)
os._exit(9)
"""


def test_the_engine_ends_when_its_front_end_dies():
    front_end = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=False)
    assert front_end.returncode == 9, front_end.stderr
    pid = int(front_end.stdout)
    for _ in range(300):
        command = pathlib.Path(f"/proc/{pid}/cmdline")
        if not command.exists() or not command.read_bytes():
            return  # gone, or a zombie that nobody reaps here
        time.sleep(0.1)
    raise AssertionError(f"engine process {pid} outlived its front end")


def test_the_end_writes_what_steps_consisted_of(engine, composition_dir):
    """The last one here: it ends the engine that the others share."""
    found = answers(engine)
    engine.close()
    points = json.loads((composition_dir / "composition.json").read_text())["points"]
    assert sum(points["decode_tokens"]) >= sum(len(tokens) - 1 for tokens, _ in found.values())
    assert (composition_dir / "composition.png").exists()
