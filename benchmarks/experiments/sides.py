"""Where the cases of an experiment run: the engine with the default model, and the simulated 8B model on an H200.

Both drive the real scheduler with the same traces, and a request ends after as many tokens as its trace says, which the
scheduler learns no earlier than from a model: by a stop id, or by max_tokens where the client knows.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks.experiments.cases import Case, Scale
from benchmarks.experiments.run_figures import Run
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.config.targets import load_target
from jaxserve.engine.core import EngineCore
from jaxserve.planning.roofline import Efficiency
from jaxserve.runner.protocol import Runner
from jaxserve.simulator.replay import EngineRequests, LengthKeepingRunner, serve
from jaxserve.simulator.setup import set_up, with_options
from jaxserve.simulator.simulated_engine import SimulatedDevice, SimulatedEngine
from jaxserve.simulator.simulation import TraceRequests, fitting, keys_of
from jaxserve.telemetry.recorder import Event, Recorder, RequestArrived

SWAP_GIB = 0.0625
"""Host memory of the engine for swapped sequences."""

FIRST_ORDINARY_ID = 3


class Side(Protocol):
    """Runs cases on an engine of its own settings."""

    scale: Scale

    @property
    def about(self) -> dict[str, Any]:
        """What its figures are of, for the file of results."""
        ...

    def run(self, case: Case) -> Run: ...


def configured(config: EngineConfig, case: Case) -> EngineConfig:
    """A side's configuration with the case's settings of scheduler and cache; ValueError for an unknown one."""
    if case.scheduler is not None:
        return dataclasses.replace(config, scheduler=case.scheduler)
    changed = with_options(config, case.options)
    return dataclasses.replace(config, scheduler=changed.scheduler, cache=changed.cache)


RUNNERS = ((64, 2048), (256, 8192))
"""max_num_seqs and max_num_batched_tokens of the runners that experiments share; the smallest that will do is taken."""


@functools.cache
def shared_runner(num_seqs: int, num_tokens: int) -> Runner:
    """The default model, loaded and compiled once a process. Smaller limits use a part of its programs."""
    from jaxserve.runner.model_runner import ModelRunner  # jax, which a simulation needs not

    limits = {"max_num_seqs": num_seqs, "max_num_batched_tokens": num_tokens, "swap_space": SWAP_GIB}
    return ModelRunner(EngineSide.configuration(limits), progress=True)


class EngineSide:
    """A model in this process, the default one where none is given, with an engine of its own for every case."""

    def __init__(
        self, limits: Mapping[str, Any], runner: Runner | None = None, seed: int = 0, config: EngineConfig | None = None
    ):
        """runner, config: another model's than the default one's."""
        self._default = config is None
        self.config = self.configuration(limits) if config is None else with_options(config, limits)
        scheduler = self.config.scheduler
        wanted = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        if runner is None:
            runner = shared_runner(*next(size for size in RUNNERS if wanted[0] <= size[0] and wanted[1] <= size[1]))
        self.runner = runner
        self._seed = seed
        self.scale = Scale("engine", 120, 64, 48, *wanted, limits=dict(limits))

    @staticmethod
    def configuration(limits: Mapping[str, Any]) -> EngineConfig:
        """That of the default model with some settings; ValueError for one that it does not have."""
        server, _ = gin_config.load("tiny.gin")
        return with_options(server.engine, limits)

    @property
    def about(self) -> dict[str, Any]:
        info = self.runner.info
        name = "default model" if self._default else info.architecture
        return {
            "model": f"{name}, {info.num_parameters / 1e6:.1f} million parameters in {info.dtype}",
            "pages": info.num_pages - 1,
            "page_size": info.page_size,
        }

    def run(self, case: Case) -> Run:
        config = configured(self.config, case)
        pages = self.runner.info.num_pages if case.num_pages is None else case.num_pages + 1
        device = SimulatedDevice(pages, self.runner.info.max_model_len, self.runner.info.platform)
        trace, _ = fitting(config, case.trace, device, case.client)
        requests = TraceRequests(trace, device, config, case.client)
        runner = LengthKeepingRunner(self.runner, config.scheduler.max_num_seqs)
        runner.info = dataclasses.replace(runner.info, num_pages=pages)
        real = EngineRequests(requests, runner, seed=self._seed, first_id=FIRST_ORDINARY_ID)
        events: list[Event] = []
        recorder = Recorder(capacity=1, clock=time.perf_counter)
        recorder.subscribe(events.append)
        core = EngineCore(config, runner, recorder=recorder)
        if case.predictor is not None:
            predictor = case.predictor(_lengths(requests))
            core.scheduler.predictor = predictor  # pyright: ignore[reportAttributeAccessIssue]
        roots = real.roots()
        gc.collect()
        served = serve(core, roots, concurrency=case.concurrency, follow=real.after)
        core.check_integrity()
        assert runner.compile_misses == 0, "a step asked for a program that was not compiled"
        scheduler = core.scheduler
        return Run(
            _from_sending(events, served.sent),
            scheduler.predictor.kendall_tau,
            scheduler.num_preemptions_by_kind,
            sum(served.cached_tokens.values()),
        )


def _lengths(requests: TraceRequests) -> dict[str, int]:
    """The true output lengths by request id, as a stand-in predictor takes them."""
    return {ready.request.request_id: ready.output_tokens for ready in requests}


def _from_sending(events: list[Event], sent: Mapping[str, float]) -> list[Event]:
    """The events with arrivals at the time at which the client sent, not when the loop took the message."""
    return [
        dataclasses.replace(event, time=sent[event.request_id]) if isinstance(event, RequestArrived) else event
        for event in events
    ]


class SimulationSide:
    """Llama-3.1-8B on an H200, its steps' times from a roofline."""

    def __init__(self, limits: Mapping[str, Any], efficiency: Efficiency = Efficiency()):
        """limits: settings of the engine; max_model_len is 8,192 and page_size 16 unless they say else."""
        server, _ = gin_config.load("llama.gin")
        config = with_options(server.engine, {"max_model_len": 8192, "page_size": 16, **limits})
        self.setup = set_up(config, target=load_target("h200"), efficiency=efficiency)
        self.config, self.device, self.costs = self.setup.config, self.setup.device, self.setup.costs
        scheduler = config.scheduler
        self.scale = Scale(
            "simulation", 1000, 800, 200, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, limits=dict(limits)
        )

    @property
    def about(self) -> dict[str, Any]:
        return {
            "model": self.costs.name,
            "pages": self.device.num_pages - 1,
            "page_size": self.config.cache.page_size,
        }

    def run(self, case: Case) -> Run:
        config, device = configured(self.config, case), self.device
        if case.num_pages is not None:
            device = dataclasses.replace(device, num_pages=case.num_pages + 1)
        trace, _ = fitting(config, case.trace, device, case.client)
        requests = TraceRequests(trace, device, config, case.client)
        waiting = requests.roots()
        events: list[Event] = []
        recorder = Recorder(capacity=1)
        recorder.subscribe(events.append)

        def on_finish(index: int) -> None:
            turns = requests.after(index, engine.outcomes[index].finished)
            for turn in turns:
                engine.submit(*turn)
            if case.concurrency is not None and not turns:
                send_next()

        engine = SimulatedEngine(
            config,
            device,
            self.costs,
            content_keys=keys_of(config, trace),
            recorder=recorder,
            on_finish=on_finish,
        )

        def send_next() -> None:
            if (ready := next(waiting, None)) is not None:
                request = dataclasses.replace(ready.request, arrival_time=engine.now)
                engine.submit(request, ready.output_tokens, ready.answer_id)

        if case.predictor is not None:
            predictor = case.predictor(_lengths(requests))
            engine.scheduler.predictor = predictor  # pyright: ignore[reportAttributeAccessIssue]
        if case.concurrency is None:
            for ready in waiting:
                engine.run_until(ready.request.arrival_time)
                engine.submit(*ready)
        else:
            for _ in range(case.concurrency):
                send_next()
        engine.run_until()
        assert len(engine.outcomes) == len(trace), "a request was lost"
        assert not engine.num_unfinished, "a request never ended"
        scheduler = engine.scheduler
        return Run(
            events,
            scheduler.predictor.kendall_tau,
            scheduler.num_preemptions_by_kind,
            sum(outcome.cached_tokens for outcome in engine.outcomes.values()),
        )
