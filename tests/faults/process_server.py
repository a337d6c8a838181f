"""`jaxserve.server` with an engine process of its own that has no model: the real loop, and what can happen to it.

    python -m tests.faults.process_server TOKENIZER [--gin.BINDING=VALUE ...]

The engine's process is `python -m tests.faults.process_server --engine FD`. It loads no jax, and so is there at once.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import types
from typing import Any

from jaxserve.config.failpoints import Failpoints
from jaxserve.config.settings import EngineConfig, ServerConfig
from jaxserve.engine.process import EngineProcess, LaunchedEngine
from jaxserve.models.tiny.tiny_tokenizer import EOS_ID, VOCAB_SIZE
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler.plan import StepPlan

PORTS = ("--gin.ServerConfig.port=0", "--gin.ServerConfig.http_port=0")


class FailingRunner(FakeRunner):
    """Fails in execution at the failpoint "execute"."""

    def __init__(self, config: EngineConfig):
        super().__init__(vocab_size=VOCAB_SIZE, page_size=16, num_pages=65, eos_token_ids=(EOS_ID,))
        self._failpoints = Failpoints(config.failpoints)

    def dispatch_forward(self, plan: StepPlan) -> Any:
        self._failpoints.hit("execute", plan.request_ids)
        return super().dispatch_forward(plan)


class LaunchedFake(LaunchedEngine):
    """Starts the engine's process."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __spec__.name, "--engine", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )


def run_engine(descriptor: int) -> int:
    """Runs the engine's process."""
    fake = types.ModuleType("jaxserve.runner.model_runner")
    fake.ModelRunner = lambda config, **_: FailingRunner(config)  # type: ignore[attr-defined]
    fake.annotate = None  # type: ignore[attr-defined]
    sys.modules[fake.__name__] = fake
    from jaxserve.engine import worker

    worker._build_core = lambda config: worker.EngineCore(config, FailingRunner(config))
    return worker.serve(socket.socket(fileno=descriptor))


def run_server(tokenizer: str, *overrides: str) -> int:
    """Runs the server."""
    from jaxserve import server
    from jaxserve.serving import server_run

    def launch(config: ServerConfig) -> server_run.Launch:
        launched = LaunchedFake()
        print(f"engine process {launched.process.pid}", file=sys.stderr, flush=True)
        return server_run.Launch(lambda: EngineProcess(config.engine, launched), launched.process.kill)

    server_run.launch_engine = launch
    bindings = [f"--gin.EngineConfig.tokenizer='{tokenizer}'", *PORTS, *overrides]
    return server.main(["--config", "tiny.gin", *bindings])


if __name__ == "__main__":
    if sys.argv[1] == "--engine":
        logging.basicConfig()
        sys.exit(run_engine(int(sys.argv[2])))
    sys.exit(run_server(*sys.argv[1:]))
