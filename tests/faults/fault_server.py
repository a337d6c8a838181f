"""Servers for tests of faults: on the echo engine, or on a real one with random weights, each whole afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np

from jaxserve.config.failpoints import Failpoints
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.models.config import ModelConfig
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.wrapper import RunnerWrapper
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import StepPlan
from jaxserve.serving.clients.grpc_client import AsyncClient, Completion
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.served_model import ServedModel
from tests.server import harness
from tests.server.fakes import WAIT_SECONDS, EchoEngine
from tests.server.harness import GREEDY, Served

MODEL = ModelConfig(
    "LlamaForCausalLM", VOCAB_SIZE, 16, 32, 1, 2, 1, 32, 256, bos_token_id=BOS_ID, eos_token_ids=(EOS_ID,)
)
CONFIG = EngineConfig.from_options(
    architecture=MODEL,
    load_format="dummy",
    max_num_seqs=8,
    max_num_batched_tokens=16,
    token_buckets=(16,),
    row_buckets=(8,),
    num_pages=33,
    attention="xla",
    dtype="float32",
    compilation_cache_dir=None,
    ready_when="complete",
)
"""Prompts longer than 16 tokens are computed in several steps."""

PROMPTS = ("abc", "a much longer prompt, which takes several steps", "copy: 12345\n", "x")
LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)

Body = Callable[[Served], Awaitable[None]]


def run_fault(body: Body, tokenizer: Any, engine: EchoEngine | None = None, **options: Any) -> None:
    """Runs a test against a server on the echo engine, which then answers, and holds nothing any more."""

    async def checked(served: Served) -> None:
        await body(served)
        served.engine.resume()
        prompt = "still here" if tokenizer is not None else [5, 6]
        assert (await served.client.generate_text(prompt, GREEDY)).token_ids[-1:] == (EOS_ID,)
        await reaches(lambda: served.frontend.num_open == 0 and not served.engine._running)

    harness.run_served(checked, tokenizer, engine, **options)


async def reaches(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds."""
    while not condition():  # noqa: ASYNC110  nothing tells
        await asyncio.sleep(0.005)


class SteppedRunner(RunnerWrapper):
    """Waits before each step for leave to take it, once it is held still."""

    def __init__(self, runner: ModelRunner):
        super().__init__(runner)
        self._changed = threading.Condition()
        self._steps: int | None = None
        self.plans: list[StepPlan] = []

    def dispatch_forward(self, plan: StepPlan) -> Any:
        self.plans.append(plan)
        with self._changed:
            assert self._changed.wait_for(lambda: self._steps is None or self._steps > 0, WAIT_SECONDS)
            if self._steps is not None:
                self._steps -= 1
        return super().dispatch_forward(plan)

    def hold(self) -> None:
        """Lets no further step be taken until `allow` or `resume`."""
        self._set(0)

    def allow(self, steps: int) -> None:
        """Lets so many more steps be taken."""
        self._set((self._steps or 0) + steps)

    def resume(self) -> None:
        """Lets steps follow one another freely again."""
        self._set(None)

    def _set(self, steps: int | None) -> None:
        with self._changed:
            self._steps = steps
            self._changed.notify_all()


@dataclasses.dataclass
class RealServed:
    """A running server on a real engine, and its parts."""

    engine: InlineEngine
    runner: SteppedRunner
    frontend: AsyncFrontEnd
    model: ServedModel
    server: GrpcServer
    client: AsyncClient

    async def answers(self, prompts: tuple[str, ...] = PROMPTS, **options: Any) -> list[Completion | BaseException]:
        """The answers to all prompts at once, by name r0, r1..., or the errors."""
        calls = [
            self.client.generate_text(prompt, LONG, request_id=f"r{number}", **options)
            for number, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    @property
    def pages_used(self) -> int:
        return self.engine.core.scheduler.pool.num_used

    async def is_whole(self) -> None:
        """Asserts that the server answers, and that all of its pages are back."""
        assert len((await self.client.generate_text("still here", LONG)).token_ids) == 24
        while True:
            info = await self.client.server_info()
            stats = info.stats
            assert stats.pages_free + stats.pages_used + stats.pages_cached == info.num_pages
            if not (stats.num_running or stats.num_waiting or stats.pages_used):
                break
            await asyncio.sleep(0.005)
        assert self.frontend.num_open == 0


@contextlib.asynccontextmanager
async def serving_model(
    tokenizer: Any, runner: ModelRunner, failpoints: tuple[str, ...] = (), **options: Any
) -> AsyncIterator[RealServed]:
    """A server on a real engine, with a pool made anew. options: of its AsyncFrontEnd."""
    runner._failpoints = Failpoints(())
    runner.reset()
    runner._failpoints = Failpoints(failpoints)
    stepped = SteppedRunner(runner)
    engine = InlineEngine(dataclasses.replace(CONFIG, failpoints=failpoints), stepped)
    served = ServedModel("random")
    server = GrpcServer("127.0.0.1", 0, 64 * 1024, served)
    await server.start()
    frontend = AsyncFrontEnd(engine, tokenizer, failpoints=failpoints, **options)
    served.serve(frontend, tokenizer)
    server.announce()
    async with AsyncClient(server.address) as client:
        try:
            yield RealServed(engine, stepped, frontend, served, server, client)
        finally:
            stepped.resume()
            await frontend.close(0.0)
            await server.stop()
    engine.core.check_integrity()


def run_model(
    body: Callable[[RealServed], Awaitable[None]],
    tokenizer: Any,
    runner: ModelRunner,
    *failpoints: str,
    survives: bool = True,
    **options: Any,
) -> None:
    """Runs a test against a server on a real engine, which is whole afterwards if it survives."""

    async def test() -> None:
        async with serving_model(tokenizer, runner, failpoints, **options) as served:
            await body(served)
            if survives:
                served.runner.resume()
                await served.is_whole()

    asyncio.run(asyncio.wait_for(test(), WAIT_SECONDS))


@contextlib.contextmanager
def poisoned(runner: ModelRunner, token_id: int) -> Iterator[None]:
    """Makes the embedding of one token NaN meanwhile; the output head is another array."""
    params = runner._weights.params
    embedding = params["embedding"]
    params["embedding"] = embedding.at[token_id].set(np.nan)
    try:
        yield
    finally:
        params["embedding"] = embedding
