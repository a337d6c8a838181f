"""Runs the server once, from a configuration to the exit code.

The process binds its ports, starts the engine and loads the tokenizer concurrently, then serves; on SIGTERM or SIGINT
it lets running requests finish for at most drain_seconds, on a second signal it ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol, TypeVar

from jaxserve.config.access_config import exposure_warnings
from jaxserve.config.changed import changed_settings
from jaxserve.config.settings import ServerConfig
from jaxserve.engine.channel import END_SECONDS, EngineClient
from jaxserve.engine.lasting_heap import keep_what_is_loaded
from jaxserve.engine.messages import EngineReady
from jaxserve.engine.process import EngineProcess, LaunchedEngine
from jaxserve.frontend.admission import Admission, Engine
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.large_blocks import return_large_blocks
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.serving.access.opened import Access, open_access
from jaxserve.serving.access.refresh import FileRefresher
from jaxserve.serving.access.tls import ServerTls
from jaxserve.serving.dry_run import dry_run
from jaxserve.serving.grpc_port.connections import connection_limit
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.running_log import log_while_busy, phases_log, start_lines
from jaxserve.serving.served_model import ServedModel
from jaxserve.serving.tracing import Tracing, start_tracing
from jaxserve.telemetry.log_lines import escaped, log_to_stderr
from jaxserve.telemetry.startup_spans import StartupSpans, seconds_since_start

T = TypeVar("T")

EXIT_FAILED = 1
_WATCH_SECONDS = 0.1
_HURRY_SECONDS = 2.0
"""Seconds an engine may take to end after a second signal, or after it has failed, before it is killed."""

_SWITCH_SECONDS = 0.001
"""Time after which a thread that computes lets another have the interpreter lock. The loop lets go of it whenever it
reads or writes, several times for each token, and each time it may wait so long for a thread that works on a long text.
"""

_log = logging.getLogger("jaxserve.server")


class _StopError(Exception):
    """A signal asked the process to end before it was ready."""


def run_server(config: ServerConfig, operative: str, phases: StartupSpans) -> int:
    """Serves until a signal; returns the exit code when the port cannot be bound, and else ends the process with it.

    Args:
        config: of the server and its engine.
        operative: the configuration as gin says it, for the log.
        phases: of this process so far.
    """
    if config.engine_process:  # an engine in this process has its own ways with memory, and with the lock
        return_large_blocks()
        sys.setswitchinterval(_SWITCH_SECONDS)
    # Texts are encoded one a call: threads of the tokenizers' own would only make one wait for another.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_to_stderr()
    logging.getLogger("jaxserve").setLevel(config.log_level.upper())
    for line in changed_settings(config):
        _log.info("config: %s", line)
    for line in operative.splitlines():
        if line.strip() and not line.startswith("#"):
            _log.debug("config, defaults included: %s", line.strip())
    try:
        access = open_access(config.access)
    except ValueError as error:
        return _fail(_one_line(error))
    for line in exposure_warnings(config.access, config.host):
        _log.warning("%s", line)
    return asyncio.run(_Server(config, access, phases).run())


def run_checks(config: ServerConfig) -> int:
    """Checks all that a start checks, without serving, and prints it; returns the exit code: 0, or 1 with one line."""
    log_to_stderr()
    try:
        for line in dry_run(config):
            print(escaped(line), flush=True)
    except (ValueError, OSError, MemoryError) as error:
        return _fail(_one_line(error))
    print("nothing stands in the way of a start")
    return 0


class _Server:
    """Runs the server once. access: who may call. phases: startup spans of this process so far."""

    def __init__(self, config: ServerConfig, access: Access, phases: StartupSpans):
        self._config = config
        self._access = access
        self._phases = phases
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        # The end of the path, much as a hub names models: OWNER/NAME.
        name = config.served_model_name or "/".join(pathlib.PurePath(config.engine.model or "dummy").parts[-2:])
        self._served = ServedModel(name, access.callers, kv_events=config.access.kv_events)
        self._tracing: Tracing | None = None

    async def run(self) -> int:
        """Runs and returns the process's exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._access.reloadable:
            refresher = FileRefresher(self._access.reloadable)
            loop.add_signal_handler(signal.SIGHUP, refresher.refresh)
            self._refreshing = asyncio.ensure_future(refresher.watch())  # until the process ends
        config = self._config
        try:
            self._tracing = self._served.metrics.on_finished = start_tracing(config.tracing, self._served.name)
        except ValueError as error:
            return _fail(str(error))
        launch = launch_engine(config)  # its imports take longer than all that follows here
        try:
            with self._phases.phase("bind"):
                ports = listeners(config, self._served, self._access.tls)
                for port in ports:
                    await port.start()
        except OSError as error:
            launch.kill()
            return _fail(str(error))
        addresses = " and ".join(port.address for port in ports)
        _log.info("listening on %s; loading model %s", addresses, self._served.name)
        try:
            engine, tokenizer = await self._load(launch.start)
        except _StopError:
            launch.kill()
            await _stop(ports)
            _exit_now(0)
        except (ValueError, OSError, MemoryError) as error:
            launch.kill()
            await _stop(ports)
            _exit_now(_fail(f"the model cannot be served: {_one_line(error)}"))
        # What a client sent may still keep threads busy, and a hung engine its own: nothing waits for them.
        _exit_now(await self._serve(ports, engine, tokenizer))

    async def _load(self, start_engine: Callable[[], EngineClient]) -> tuple[EngineClient, Tokenizer | None]:
        """Loads the engine and the tokenizer, each in a thread; the first error of either is raised."""
        engine = _in_thread(lambda: self._timed("engine", start_engine))
        tokenizer = _in_thread(lambda: self._timed("tokenizer", lambda: load_tokenizer(self._config.engine)))
        stop = asyncio.ensure_future(self._stop.wait())
        pending: set[asyncio.Future] = {engine, tokenizer}
        while pending:
            done, _ = await asyncio.wait({stop, *pending}, return_when=asyncio.FIRST_COMPLETED)
            if stop in done:
                raise _StopError
            for future in done:
                future.result()
            pending -= done
        stop.cancel()
        return engine.result(), tokenizer.result()

    async def _serve(self, ports: Sequence[Listener], engine: EngineClient, tokenizer: Tokenizer | None) -> int:
        """Serves until a signal or the engine's death, then ends the engine and the server."""
        with self._phases.phase("serve"):
            frontend = AsyncFrontEnd(
                engine,
                tokenizer,
                seed=self._config.engine.seed,
                max_unread_tokens=self._config.max_unread_tokens,
                step_timeout=self._config.step_timeout,
                on_tokens=self._served.limiter.charge,
                log_prompts=self._config.access.log_prompts,
                failpoints=self._config.engine.failpoints,
                admission=_admission(self._config, engine.ready),
                metrics=self._served.metrics,
                grammars=self._config.engine.structured_outputs,
            )
            keep_what_is_loaded()
            self._served.serve(frontend, tokenizer)
            for port in ports:
                port.announce()
        for line in (
            *start_lines(engine.ready, self._served.name),
            *phases_log(self._phases.all(), engine.ready.info.phases),
        ):
            _log.info("%s", line)
        _log.info("ready on %s in %.1f s", " and ".join(port.address for port in ports), seconds_since_start())
        log_task = asyncio.ensure_future(log_while_busy(lambda: frontend.stats))
        died = asyncio.ensure_future(_death(frontend))
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({died, stop}, return_when=asyncio.FIRST_COMPLETED)
        self._served.drain()
        for port in ports:
            port.drain()
        if not died.done():
            await self._drain(frontend, died)
        for task in (log_task, died, stop):
            task.cancel()
        problem = f"the engine has died: {frontend.failure}" if frontend.failure else ""
        ended = await self._end(frontend, _HURRY_SECONDS if problem else END_SECONDS)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        problem = problem or ended
        await _stop(ports)
        return _fail(problem) if problem else 0

    def _timed(self, name: str, call: Callable[[], T]) -> T:
        with self._phases.phase(name):
            return call()

    async def _drain(self, frontend: AsyncFrontEnd, died: asyncio.Future[str]) -> None:
        """Waits for running requests to finish, until drain_seconds are over, a second signal arrives, or the engine
        dies.
        """
        if frontend.num_open:
            _log.info("%d requests may finish for %g s", frontend.num_open, self._config.drain_seconds)
        draining = asyncio.ensure_future(frontend.drain(self._config.drain_seconds))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({draining, hurry, died}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurry):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _end(self, frontend: AsyncFrontEnd, seconds: float) -> str:
        """Ends the running requests and the engine; returns one line on what went wrong with it, or "".

        seconds: time after which an engine that does not end is killed; a second signal reduces it to _HURRY_SECONDS.
        """
        closing = asyncio.ensure_future(frontend.close(0.0, seconds))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({closing, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not closing.done():
            await asyncio.wait({closing}, timeout=_HURRY_SECONDS)
            frontend.kill()
        return await closing

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            _log.info("%s again: ending at once", number.name)
            self._hurry.set()
        else:
            _log.info("%s: shutting down", number.name)
            self._stop.set()


def _admission(config: ServerConfig, ready: EngineReady) -> Admission:
    """Returns what decides which requests are let in."""
    scheduler = config.engine.scheduler
    return Admission(
        config.queue,
        Engine(
            max_num_seqs=ready.max_num_seqs,
            max_open=ready.max_num_seqs + ready.max_num_waiting,
            in_order=scheduler.policy in ("fcfs", "fair") and scheduler.formation == "greedy",
            prompt_weight=scheduler.ordering.prompt_token_weight,
            output_weight=scheduler.ordering.output_token_weight,
        ),
    )


async def _death(frontend: AsyncFrontEnd) -> str:
    """Waits until the engine has ended and returns its last line."""
    # The streams have ended by then; this is for the health status and the exit code.
    while not frontend.failure:  # noqa: ASYNC110  the front end has no event for it
        await asyncio.sleep(_WATCH_SECONDS)
    return frontend.failure


class Listener(Protocol):
    """Serves one port. It listens from `start` on, so that a port in use is found before the model is loaded."""

    @property
    def address(self) -> str:
        """HOST:PORT."""
        ...

    async def start(self) -> None:
        """Binds the port and answers that the model is loading. Raises OSError, in one line."""
        ...

    def announce(self) -> None:
        """Tells probes that the model is loaded."""
        ...

    def drain(self) -> None:
        """Tells probes that the server ends; running requests continue."""
        ...

    async def stop(self) -> None:
        """Closes the port; open calls get a moment to end."""
        ...


def listeners(config: ServerConfig, served: ServedModel, tls: ServerTls | None = None) -> list[Listener]:
    """Returns the ports to serve. tls: None takes connections in clear text."""
    # Descriptors are shared alike.
    most = connection_limit(config.limits.max_connections, 2 if config.http_port else 1)
    limits = dataclasses.replace(config.limits, max_connections=most)
    found: list[Listener] = [
        GrpcServer(
            config.host,
            config.port,
            config.max_message_bytes,
            served,
            limits,
            returns_memory=config.engine_process,
            reflection_enabled=config.access.reflection,
            tls=tls,
        )
    ]
    if config.http_port:
        found.append(
            HttpServer(
                config.host,
                config.http_port,
                served,
                config.http,
                limits,
                config.max_message_bytes,
                web_origins=config.access.web_origins,
                tls=tls,
            )
        )
    return found


async def _stop(ports: Sequence[Listener]) -> None:
    for port in ports:
        await port.stop()


class Launch(NamedTuple):
    """An engine that is starting. start: waits for it and returns it. kill: kills its process, if it has one."""

    start: Callable[[], EngineClient]
    kill: Callable[[], None] = lambda: None


def launch_engine(config: ServerConfig) -> Launch:
    """Launches an engine. An engine process starts its imports at once."""
    if config.engine_process:
        launched = LaunchedEngine()
        return Launch(lambda: EngineProcess(config.engine, launched), launched.process.kill)
    # Imported late: an engine brings jax, which takes seconds, and the port should be bound before that.
    return Launch(lambda: importlib.import_module("jaxserve.engine.inline").InlineEngine(config.engine, progress=True))


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Runs `function` in a thread that does not keep the process alive; returns its future result."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[..., None], value: object) -> None:
        if not future.done():
            set_it(value)

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, result)

    threading.Thread(target=run, daemon=True).start()
    return future


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    print(f"jaxserve.server: {message}", file=sys.stderr, flush=True)
    return EXIT_FAILED


def _exit_now(code: int) -> NoReturn:
    """Ends the process without waiting for threads that load a model; an engine process then ends by itself."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
