"""Both ports over the echo engine, with keys and TLS, in a thread of their own; and files of keys and certificates."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import trustme

from jaxserve.config.access_config import AccessConfig, TlsConfig
from jaxserve.config.client_limits import LimitsConfig
from jaxserve.engine.channel import EngineClient
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.serving.access.key_file import new_key
from jaxserve.serving.access.opened import Access, open_access
from jaxserve.serving.clients.client_credentials import Credentials
from jaxserve.serving.clients.grpc_client import Client
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.served_model import ServedModel
from tests.server.fakes import WAIT_SECONDS, EchoEngine
from tests.server.harness import MAX_MESSAGE_BYTES


@dataclasses.dataclass
class Secured:
    """A server with both ports."""

    engine: EchoEngine
    access: Access
    model: ServedModel
    frontend: AsyncFrontEnd
    grpc: GrpcServer
    http: HttpServer
    loop: asyncio.AbstractEventLoop

    def client(self, key: str = "", **files: Any) -> Client:
        """A client with this key and TLS files; a context manager."""
        return Client(self.grpc.address, Credentials(key, **files))

    def get(self, path: str, key: str | None = None, method: str = "GET", **headers: str) -> httpx.Response:
        """The answer of the HTTP port; `_` in headers' names is a dash."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}".strip()
        # Certificates of the system, which take a while to read, are not needed.
        return httpx.request(method, f"http://{self.http.address}{path}", headers=sent, verify=False)

    def run(self, body: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine that runs on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(body, self.loop).result(WAIT_SECONDS)


@contextlib.contextmanager
def secured(
    tokenizer: Any,
    config: AccessConfig,
    limits: LimitsConfig | None = None,
    log_prompts: bool = False,
    client: EngineClient | None = None,
) -> Iterator[Secured]:
    """A server that is ready. client: an engine other than the echo engine."""
    started: threading.Event = threading.Event()
    parts: list[Secured] = []
    errors: list[BaseException] = []
    stop: list[Callable[[], None]] = []

    async def body() -> None:
        engine, access = EchoEngine(), open_access(config)
        model = ServedModel("echo", access.callers, kv_events=config.kv_events)
        ports = (
            GrpcServer(
                "127.0.0.1",
                0,
                MAX_MESSAGE_BYTES,
                model,
                limits,
                reflection_enabled=config.reflection,
                tls=access.tls,
            ),
            HttpServer("127.0.0.1", 0, model, limits=limits, web_origins=config.web_origins, tls=access.tls),
        )
        for port in ports:
            await port.start()
        frontend = AsyncFrontEnd(client or engine, tokenizer, on_tokens=model.limiter.charge, log_prompts=log_prompts)
        model.serve(frontend, tokenizer)
        for port in ports:
            port.announce()
        end, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(end.set))
        parts.append(Secured(engine, access, model, frontend, *ports, loop))
        started.set()
        await end.wait()
        engine.resume()
        await frontend.close(0.0)
        for port in ports:
            await port.stop()
        engine.close()

    def run() -> None:
        try:
            asyncio.run(body())
        except BaseException as error:
            errors.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(WAIT_SECONDS), "the server did not start"
        if errors:
            raise errors[0]
        yield parts[0]
    finally:
        for end in stop:
            end()
        thread.join()
        assert not errors


class KeyFile:
    """A file of keys. path: of it. keys: by name."""

    def __init__(self, path: pathlib.Path, *names: str, **lines: dict[str, Any]):
        self.path = path
        self.keys: dict[str, str] = {}
        self.lines: dict[str, str] = {}
        for name in names:
            self.add(name)
        for name, fields in lines.items():
            self.add(name, **fields)

    def add(self, name: str, **fields: Any) -> str:
        """Adds a key, writes the file and returns the key."""
        self.keys[name], self.lines[name] = new_key(name, **fields)
        self.write("".join(f"{line}\n" for line in self.lines.values()))
        return self.keys[name]

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self.path.chmod(0o600)


class Certificates:
    """An authority and what it vouches for, as PEM files in a directory."""

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = self._write("ca.pem", self.authority.cert_pem)

    def server(self, name: str = "server") -> TlsConfig:
        """A certificate for 127.0.0.1."""
        certificate, key = self.issue(name, "127.0.0.1", "localhost")
        return TlsConfig(certificate=certificate, private_key=key)

    def issue(self, name: str, *identities: str) -> tuple[str, str]:
        """Files of a certificate and its key."""
        issued = self.authority.issue_cert(*identities)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return self._write(f"{name}.pem", chain), self._write(f"{name}.key", issued.private_key_pem)

    def _write(self, name: str, content: Any) -> str:
        path = self.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.bytes())
        path.chmod(0o600)
        return str(path)
