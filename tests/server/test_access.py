"""Who may call: on both ports nothing answers without a key but health, and nobody sees or ends what is another's."""

import base64
import contextlib
import socket
import threading

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from jaxserve import client as command
from jaxserve.config.access_config import AccessConfig
from jaxserve.serving.access.callers import Caller, require_admin
from jaxserve.serving.http_port.app import make_app
from jaxserve.serving.http_port.guard import ADMIN_PATHS
from jaxserve.serving.problem import ForbiddenError
from tests.server.access_harness import KeyFile, Secured, secured
from tests.server.fakes import WAIT_SECONDS
from tests.server.harness import GREEDY

Code = grpc.StatusCode
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
OPEN_CALLS = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/vllm.grpc.engine.VllmEngine/HealthCheck",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys", "alice", "bob")
    file.add("root", admin=True, tenant=None, priority=None)
    file.add("late", expires="2020-01-31")
    file.add("urgent", priority=7, tenant="paying")
    file.add("narrow", max_concurrent_requests=1)
    file.add("slow", requests_per_minute=2)
    file.add("little", tokens_per_minute=10)
    return file


@pytest.fixture(scope="module")
def served(tokenizer, keys):
    with secured(tokenizer, AccessConfig(api_keys=str(keys.path))) as served:
        yield served


def refusal(call) -> tuple[grpc.StatusCode, str]:
    """Code and details that a blocking call fails with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def grpc_methods(served: Secured, key: str) -> dict[str, bool]:
    """Every method that the server's reflection tells of, with whether it streams."""
    metadata = [("authorization", f"Bearer {key}")]

    class WithKey(grpc.StreamStreamClientInterceptor):
        def intercept_stream_stream(self, continuation, details, requests):
            return continuation(details._replace(metadata=metadata), requests)

    with grpc.insecure_channel(served.grpc.address) as channel:
        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithKey()))
        pool = descriptor_pool.DescriptorPool(database)
        return {
            f"/{name}/{method.name}": method.server_streaming
            for name in database.get_services()
            for method in pool.FindServiceByName(name).methods
        }


def test_every_call_of_every_service_needs_a_key_but_health(served, keys):
    methods = grpc_methods(served, keys.keys["alice"])
    assert len(methods) >= 9
    assert methods.keys() > OPEN_CALLS
    methods |= {"/jaxserve.v1.JaxServe/NoSuch": False, "/no.such.Service/Do": False, "/": False, "/x": True}
    with grpc.insecure_channel(served.grpc.address) as channel:
        for method, streams in methods.items():
            for metadata in ((), (("authorization", "Bearer wrong"),), (("x-api-key", keys.keys["alice"]),)):
                if streams:
                    call = channel.unary_stream(method)(b"", metadata=metadata, timeout=WAIT_SECONDS)
                    outcome = lambda call=call: next(call)  # noqa: E731
                else:
                    outcome = lambda make=channel.unary_unary(method), sent=metadata: make(  # noqa: E731
                        b"", metadata=sent, timeout=WAIT_SECONDS
                    )
                if method in OPEN_CALLS:
                    outcome()
                else:
                    assert refusal(outcome)[0] is Code.UNAUTHENTICATED, method
        known = channel.unary_unary("/no.such.Service/Do")
        metadata = (("authorization", f"Bearer {keys.keys['alice']}"),)
        assert refusal(lambda: known(b"", metadata=metadata))[0] is Code.UNIMPLEMENTED


def paths_of(app) -> set[str]:
    """Paths of all routes: of included routers and mounted applications, and those that the OpenAPI document names."""
    found, todo = set(app.openapi()["paths"]), [("", app.routes)]
    while todo:
        prefix, routes = todo.pop()
        for route in routes:
            if inner := getattr(getattr(route, "original_router", route), "routes", None):
                todo.append((prefix + getattr(route, "path", ""), inner))
            if path := getattr(route, "path", None):
                found.add(prefix + path)
    return found


def test_every_route_and_method_needs_a_key_but_health(served, keys):
    paths = paths_of(make_app(served.model))
    assert {"/health", "/openapi.json"} <= paths
    strange = {
        "/docs",
        "/pages",
        "/page.css",
        "/no/such",
        "//v1/models",
        "/healthy",
        "/Health",
        "/health%2f..%2fv1/models",
        "/metrics",
        "/admin",
    }
    with httpx.Client(base_url=f"http://{served.http.address}") as client:
        for path in paths | strange:
            for method in METHODS:
                answer = client.request(method, path.replace("{", "").replace("}", ""))
                is_open = path == "/" or path.startswith(("/health", "/page/"))
                if method in ("GET", "HEAD") and path in paths and is_open:
                    assert answer.status_code in (200, 405), path  # no route for HEAD, say
                    continue
                assert answer.status_code == 401, (method, path)
                assert "Bearer" in answer.headers["www-authenticate"]
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/openapi.json", headers={"authorization": f"Bearer {keys.keys['bob']}"}).status_code == 200
        assert client.get("/no/such", headers={"authorization": f"Bearer {keys.keys['bob']}"}).status_code == 404


def test_the_ways_to_give_a_key(served, keys):
    key = keys.keys["alice"]
    as_password = base64.b64encode(f"anyone:{key}".encode()).decode()
    for credential in (f"Bearer {key}", f"bearer  {key}", f"BASIC {as_password}"):
        assert served.get("/openapi.json", authorization=credential).status_code == 200
    wrong = [key, f"Bearer {key}x", f"Bearer {key[:-1]}", f"Bearer x{key}", "Bearer", f"Token {key}", "Basic ="]
    wrong += [f"Bearer {key.upper()}", "Bearer " + "x" * 5000, "Basic " + base64.b64encode(key.encode()).decode()]
    wrong += [f"Bearer {key},Bearer {key}", "Bearer \xe9", f"Bearer {keys.lines['alice']}"]
    for credential in wrong:
        answer = httpx.get(
            f"http://{served.http.address}/openapi.json",
            headers={b"authorization": credential.encode("latin-1")},
            verify=False,
        )
        assert answer.status_code == 401, credential
    twice = [("authorization", f"Bearer {key}")] * 2
    assert httpx.get(f"http://{served.http.address}/openapi.json", headers=twice).status_code == 401


def test_what_is_refused_says_why_and_never_shows_the_key(served, keys):
    for key, words in (("", "is missing"), ("wrong-key", "is wrong"), (keys.keys["late"], "has expired")):
        with served.client(key) as client:
            code, details = refusal(lambda client=client: client.tokenize("a"))
        assert code is Code.UNAUTHENTICATED
        assert words in details
        message = served.get("/v1/models", key).json()["error"]["message"]
        assert message == details
        assert not key or key not in message


def test_a_websocket_does_not_get_by(served):
    with socket.create_connection(served.http.address.rsplit(":", 1)) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b" 101 " not in connection.recv(4096)


def test_the_command_line_client_takes_its_key_from_the_environment_or_an_option(served, keys, monkeypatch, capsys):
    address = ["--address", served.grpc.address]
    monkeypatch.setenv("JAXSERVE_API_KEY", keys.keys["alice"])
    assert command.main(["abc", *address]) == 0
    assert capsys.readouterr().out == "abc\n"
    assert command.main(["abc", "--api-key", keys.keys["bob"], *address]) == 0
    assert served.engine.requests[-1].options.tenant == "bob"
    capsys.readouterr()
    monkeypatch.delenv("JAXSERVE_API_KEY")
    assert command.main(["abc", *address]) == 1
    assert capsys.readouterr().err == (
        "jaxserve.client: UNAUTHENTICATED: the API key is missing; send it as authorization: Bearer KEY; give a key "
        "of this server with --api-key or in JAXSERVE_API_KEY\n"
    )
    with pytest.raises(SystemExit):
        command.main(["abc", "--ca", "/none", *address])
    assert "No such file" in capsys.readouterr().err


# ---- whose is what ----


def test_ids_are_each_callers_own(served, keys):
    """Two callers may use one id without learning of each other, and nobody ends what is another's."""
    engine, started = served.engine, len(served.engine.requests)
    engine.pause()
    streams = {}
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(served.client(keys.keys[name])) for name in ("alice", "bob", "root")}
        for count, name in enumerate(("alice", "bob"), start=1):
            streams[name] = Answer(clients[name], f"prompt of {name}", request_id="mine")
            served.engine.wait_for_requests(started + count)
        assert (
            refusal(lambda: list(clients["alice"].generate("x", GREEDY, request_id="mine")))[0] is Code.ALREADY_EXISTS
        )
        for _ in range(2):
            assert not clients["root"].abort("mine")  # an administrator's ids are his own, too
        ids = [request.request_id for request in engine.requests[started:]]
        assert len(set(ids)) == 2
        for engine_id in ids:
            assert clients["bob"].abort(engine_id) is (engine_id == "mine")  # his own; and no engine's name for others'
        assert not clients["bob"].abort("mine")
        assert streams["bob"].text() == ""
        engine.resume()
        assert streams["alice"].text() == "prompt of alice"
        assert [request.options.tenant for request in engine.requests[started:]] == ["alice", "bob"]


class Answer:
    """A completion that is awaited in a thread."""

    def __init__(self, client, prompt: str, **fields):
        self._parts: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(client, prompt, fields))
        self._thread.start()

    def _read(self, client, prompt, fields) -> None:
        self._parts.append(client.generate_text(prompt, GREEDY, **fields).text)

    def text(self) -> str:
        self._thread.join(WAIT_SECONDS)
        return self._parts[0]


def test_what_a_key_fixes_cannot_be_asked_for_otherwise(served, keys):
    def options(name: str, **fields):
        with served.client(keys.keys[name]) as client:
            client.generate_text("a", GREEDY, **fields)
        return served.engine.requests[-1].options

    assert (options("alice").tenant, options("alice").priority) == ("alice", 0)
    assert (options("urgent").tenant, options("urgent", tenant="paying", priority=7).priority) == ("paying", 7)
    assert (options("root").tenant, options("root", tenant="any", priority=-3).tenant) == ("", "any")
    for name, fields, words in (
        ("alice", {"tenant": "bob"}, "tenant is 'bob'; requests of this key belong to 'alice'"),
        ("alice", {"priority": 1}, "priority is 1; requests of this key have 0"),
        ("urgent", {"priority": 8}, "priority is 8; requests of this key have 7"),
    ):
        with served.client(keys.keys[name]) as client:
            code, details = refusal(lambda: client.generate_text("a", GREEDY, **fields))  # noqa: B023
        assert (code, words in details) == (Code.PERMISSION_DENIED, True)


def test_the_whole_server_is_the_administrators_to_see(served, keys):
    with served.client(keys.keys["alice"]) as client, served.client(keys.keys["root"]) as root:
        client.generate_text("abc", GREEDY)
        assert not client.server_info().HasField("stats")
        assert client.server_info().max_num_seqs == 8
        assert root.server_info().stats.generation_tokens >= 4
    for path in ADMIN_PATHS:
        for below in (path, f"{path}/x"):
            assert served.get(below, keys.keys["alice"]).status_code == 403
            assert served.get(below, keys.keys["root"]).status_code in (200, 404, 405)
    require_admin(Caller(is_admin=True))
    with pytest.raises(ForbiddenError, match="a trace concerns the whole server and needs an admin's key"):
        require_admin(Caller("alice"), "a trace")


# ---- limits of a key ----


def test_calls_at_one_time(served, keys):
    served.engine.pause()
    with served.client(keys.keys["narrow"]) as client, served.client(keys.keys["alice"]) as other:
        seen = len(served.engine.requests)
        answer = Answer(client, "abc")
        served.engine.wait_for_requests(seen + 1)
        code, details = refusal(lambda: client.tokenize("a"))
        assert code is Code.RESOURCE_EXHAUSTED
        assert "at most 1 (max_concurrent_requests)" in details
        refused = served.get("/openapi.json", keys.keys["narrow"])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert other.tokenize("a")
        served.engine.resume()
        assert answer.text() == "abc"
        assert client.tokenize("a")
    assert served.get("/openapi.json", keys.keys["narrow"]).status_code == 200


def test_calls_a_minute_on_both_ports_together(served, keys):
    assert served.get("/openapi.json", keys.keys["slow"]).status_code == 200
    with served.client(keys.keys["slow"]) as client:
        client.tokenize("a")
        with pytest.raises(grpc.RpcError) as caught:
            client.tokenize("a")
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    pushback = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert 20_000 < int(pushback) <= 30_000  # half a minute for each of two
    refused = served.get("/openapi.json", keys.keys["slow"])
    assert refused.status_code == 429
    assert 20 < int(refused.headers["retry-after"]) <= 30


def test_tokens_a_minute(served, keys):
    with served.client(keys.keys["little"]) as client:
        assert client.generate_text("abcde", GREEDY).text == "abcde"  # 6 tokens and 6
        code, details = refusal(lambda: client.generate_text("a", GREEDY))
    assert code is Code.RESOURCE_EXHAUSTED
    assert "used up its 10 tokens per minute (tokens_per_minute)" in details


# ---- pages in a browser ----


def test_foreign_pages_do_not_reach_the_server_through_a_browser(served, keys):
    """A browser adds a password by itself, whichever page asks it to call; a bearer key is the page's own doing."""
    host = served.http.address
    password = "Basic " + base64.b64encode(f":{keys.keys['bob']}".encode()).decode()
    assert served.get("/openapi.json", authorization=password, origin=f"http://{host}").status_code == 200
    for origin in ("http://evil.example", "null", f"http://{host}.evil.example", "http://localhost:1"):
        assert served.get("/openapi.json", authorization=password, origin=origin).status_code == 403
        assert served.get("/openapi.json", keys.keys["bob"], origin=origin).status_code == 200


def test_without_keys_only_pages_of_this_machine_and_listed_ones_may_call(tokenizer):
    with secured(tokenizer, AccessConfig(web_origins=("https://chat.example",))) as served:
        host = served.http.address
        assert served.get("/openapi.json").status_code == 200
        assert served.get("/openapi.json", origin=f"http://{host}").status_code == 200
        assert served.get("/openapi.json", origin="https://chat.example").status_code == 200
        # Its name was made to point here: origin and host are the same.
        assert served.get("/openapi.json", origin="http://evil.example:1", host="evil.example:1").status_code == 403
        assert served.get("/openapi.json", origin="http://evil.example").status_code == 403
        with served.client() as client:
            assert client.server_info().HasField("stats")


def test_reflection_can_be_switched_off(tokenizer, keys):
    with secured(tokenizer, AccessConfig(reflection=False)) as served:
        with pytest.raises(grpc.RpcError) as caught:
            grpc_methods(served, "")
        assert caught.value.code() is Code.UNIMPLEMENTED
