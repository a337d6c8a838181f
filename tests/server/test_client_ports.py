"""The command line client on both ports of one server: the same answers, and what is wrong said by name."""

import asyncio
import concurrent.futures
import contextlib
import http.server
import io
import json
import os
import pathlib
import pty
import signal
import socket
import ssl
import subprocess
import sys
import threading

import grpc
import pytest
import trustme
from google.protobuf.message import DecodeError

from jaxserve import client as command
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.clients.client_credentials import KEY_VARIABLE, Credentials
from jaxserve.serving.clients.client_failures import failure_of
from jaxserve.serving.clients.client_results import Conversation
from jaxserve.serving.clients.client_target import parse_target
from jaxserve.serving.clients.grpc_client import Client, generate_request
from jaxserve.serving.clients.http_client import HttpCallError, HttpClient
from jaxserve.serving.clients.shell_completion import SHELLS
from jaxserve.serving.grpc_port.convert import MAX_MESSAGES
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.grpc_port.oversized import check_generate
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.problem import UnauthenticatedError
from jaxserve.serving.served_model import ServedModel
from tests.server.fakes import WAIT_SECONDS, EchoEngine, save_tokenizer

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
PORTS = ("grpc", "http")


class KeyHolders:
    """Lets everybody call until `key` is set."""

    key = ""

    def identify(self, credential):
        if self.key and credential != f"Bearer {self.key}":
            raise UnauthenticatedError("the API key is missing or unknown")
        return Caller()


class Ports:
    """A server with both ports, in a thread."""

    def __init__(self, tokenizer: Tokenizer):
        self.engine = EchoEngine()
        self.callers = KeyHolders()
        self.model = ServedModel("echo", self.callers)
        self.addresses: dict[str, str] = {}
        self._tokenizer = tokenizer
        self._started, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        grpc_port = GrpcServer("127.0.0.1", 0, 64 * 1024, self.model)
        http_port = HttpServer("127.0.0.1", 0, self.model)
        for port in (grpc_port, http_port):
            await port.start()
        frontend = AsyncFrontEnd(self.engine, self._tokenizer)
        self.model.serve(frontend, self._tokenizer)
        grpc_port.announce()
        self.addresses = {"grpc": grpc_port.address, "http": f"http://{http_port.address}"}
        self._started.set()
        await asyncio.to_thread(self._stop.wait)
        self.engine.resume()
        await frontend.close(0.0)
        for port in (grpc_port, http_port):
            await port.stop()

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(WAIT_SECONDS), "the server did not start"
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    directory = save_tokenizer(tmp_path_factory.mktemp("chat_tokenizer"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with Ports(Tokenizer(directory)) as ports:
        yield ports


@pytest.fixture
def run(ports, monkeypatch, capsys):
    """Runs the client in this process; returns its exit code and what it wrote to stdout and stderr."""

    def run(protocol: str, *arguments: str, stdin: str = ""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = command.main([*arguments, "--address", ports.addresses.get(protocol, protocol)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=PORTS)
def protocol(request):
    return request.param


@pytest.fixture
def client(ports, protocol):
    with parse_target(ports.addresses[protocol], Credentials()).open() as client:
        yield client


def test_answers_are_the_same_on_both_ports(run):
    found = {}
    for protocol in PORTS:
        code, out, err = run(protocol, "--json", "--max-tokens", "3", "-", stdin="abcd\n😀\n")
        assert (code, err) == (0, "")
        found[protocol] = [json.loads(line) for line in out.splitlines()]
        for record in found[protocol]:
            assert record.pop("request_id")
    assert found["http"] == found["grpc"]
    assert found["grpc"][0]["text"] == "abc"
    assert found["grpc"][0]["usage"] == {"prompt_tokens": 5, "output_tokens": 3, "cached_tokens": 1}


def test_options_reach_the_engine(run, ports, protocol):
    options = "--temperature 0.5 --top-k 4 --top-p 0.5 --min-p 0.25 --seed 3 --max-tokens 9 --min-tokens 2 --ignore-eos"
    more = "--stop-token-ids 7 --tenant t --priority 5 --timeout 100"
    assert run(protocol, *options.split(), *more.split(), "a")[0] == 0
    request = ports.engine.requests[-1]
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 4, 0.5, 0.25)
    assert (request.seed, request.max_tokens, request.min_tokens, request.stop_token_ids) == (3, 9, 2, (7,))
    assert (request.options.tenant, request.options.priority) == ("t", 5)
    assert request.options.deadline is not None


def test_a_chat_has_a_history_which_can_be_reset(run, protocol):
    lines = "hi\nyou\n/reset\nnew\n/quit\nnever\n"
    code, out, err = run(protocol, "--chat", "--system", "S", stdin=lines)
    assert code == 0
    first = "[system]S[user]hi"
    second = f"{first}[assistant]{first}[user]you"
    assert out.splitlines() == [first, second, "[system]S[user]new"]
    assert err == "(the conversation is forgotten)\n"


def test_a_turn_that_fails_is_left_out_of_the_conversation(run, protocol):
    code, out, err = run(protocol, "--chat", "--json", stdin="a\n" + "b" * 300 + "\nc\n")
    assert (code, err) == (1, "")
    first, failed, last = map(json.loads, out.splitlines())
    assert failed["prompt"] == "b" * 300
    assert failed["error"]["code"] in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert "tokens" in failed["error"]["message"]
    assert last["text"] == f"[user]a[assistant]{first['text']}[user]c"


def test_events_are_the_pieces_of_an_answer(run, protocol):
    code, out, _ = run(protocol, "--json-events", "abc")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [event["event"] for event in events[:-1]] == ["chunk"] * (len(events) - 1)
    answer = events[-1]
    assert (answer["event"], answer["text"], answer["finish_reason"]) == ("answer", "abc", "stop")
    assert "abc".startswith("".join(event["text"] for event in events[:-1]))
    assert {event["request_id"] for event in events} == {answer["request_id"]}


def test_a_stream_that_is_closed_aborts_its_request(ports, client):
    ports.engine.pause()
    before = len(ports.engine.requests)
    stream = client.generate("abcdef", SamplingParams(temperature=0.0))
    with contextlib.closing(stream):
        ports.engine.allow(2)
        assert next(stream).text
    request_id = ports.engine.requests[before].request_id
    ports.engine.wait_for_abort(request_id)
    ports.engine.resume()


def test_other_calls(client):
    assert (client.model_info().name, client.model_info().max_model_len) == ("echo", 512)
    token_ids = client.tokenize("hé")
    assert len(token_ids) == 4  # <bos> and three bytes
    assert client.detokenize(token_ids) == "hé"
    client.wait_ready(10.0)
    assert client.generate_text(Conversation([{"role": "user", "content": "x"}])).text == "[user]x"
    assert client.generate_text([5, 6]).token_ids[:2] == (5, 6)


def test_messages_are_checked(ports):
    with Client(ports.addresses["grpc"]) as client:
        for messages, words in (
            ([], "messages must be a list of at least one message"),
            ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), f"at most {MAX_MESSAGES}"),
        ):
            with pytest.raises(Exception, match="INVALID_ARGUMENT") as raised:
                client.generate_text(Conversation(messages))
            assert words in str(raised.value)
    with HttpClient(ports.addresses["http"]) as client:
        with pytest.raises(HttpCallError, match="messages"):
            client.generate_text(Conversation([]))


def test_very_many_messages_are_refused_before_they_are_parsed():
    # Of a oneof field that is sent several times, the messages add up.
    part = generate_request(Conversation([{"role": "u", "content": "c"}] * (MAX_MESSAGES // 2 + 1))).SerializeToString()
    check_generate(part, lambda *_: None)
    for times in (2, 40):
        with pytest.raises(DecodeError, match=f"more than {MAX_MESSAGES} messages"):
            check_generate(times * part, lambda *_: None)


def test_keys_over_http(run, ports, monkeypatch):
    monkeypatch.setattr(ports.callers, "key", "secret")
    code, out, _ = run("http", "--json", "abc")
    error = json.loads(out)["error"]
    assert (code, error["code"]) == (1, "UNAUTHENTICATED")
    assert "--api-key" in error["remedy"]
    for key, expected in (("secret", 0), ("other", 1)):
        monkeypatch.setenv(KEY_VARIABLE, key)
        assert run("http", "abc")[0] == expected
        assert run("http", "--api-key", "secret", "abc")[1] == "abc\n"


def test_keys_over_grpc(run, monkeypatch):
    seen = []

    class Refusing(grpc.GenericRpcHandler):
        def service(self, handler_call_details):
            seen.append(dict(handler_call_details.invocation_metadata).get("authorization"))

            def refuse(_: bytes, context: grpc.ServicerContext):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is unknown")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Refusing(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setenv(KEY_VARIABLE, "of-variable")
    code, _, err = run(address, "a")
    run(address, "a", "--api-key", "of-option")
    server.stop(0).wait()
    assert seen == ["Bearer of-variable", "Bearer of-option"]
    remedy = "give a key of this server with --api-key or in JAXSERVE_API_KEY"
    assert (code, err) == (1, f"jaxserve.client: UNAUTHENTICATED: the API key is unknown; {remedy}\n")


def test_the_other_protocol_is_diagnosed_by_name(run, ports):
    grpc_address, url = ports.addresses["grpc"], ports.addresses["http"]
    plain = url.removeprefix("http://")
    code, _, err = run(f"http://{grpc_address}", "a")
    said = f"http://{grpc_address} is a port for gRPC, not for HTTP; use --address {grpc_address}"
    assert (code, err) == (1, f"jaxserve.client: {said}\n")
    code, _, err = run(plain, "a")
    assert (code, err) == (1, f"jaxserve.client: {plain} is a port for HTTP, not for gRPC; use --address {url}\n")
    for address in (f"grpcs://{grpc_address}", f"https://{plain}"):
        code, _, err = run(address, "a")
        assert code == 1
        assert "takes no encrypted connections (TLS); use --address" in err


def test_a_server_that_starts(run, protocol):
    async def start(found: dict, started: threading.Event, stop: threading.Event):
        model = ServedModel("echo")
        grpc_port, http_port = GrpcServer("127.0.0.1", 0, 2**16, model), HttpServer("127.0.0.1", 0, model)
        for port in (grpc_port, http_port):
            await port.start()
        found |= {"grpc": grpc_port.address, "http": f"http://{http_port.address}"}
        started.set()
        await asyncio.to_thread(stop.wait)
        for port in (grpc_port, http_port):
            await port.stop()

    found: dict[str, str] = {}
    started, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(start(found, started, stop)))
    thread.start()
    try:
        assert started.wait(WAIT_SECONDS)
        code, _, err = run(found[protocol], "a")
        assert code == 1
        assert err.startswith("jaxserve.client: UNAVAILABLE: ")
        assert "starting" in err
        assert err.endswith("; wait for it with --wait SECONDS\n")
        code, _, err = run(found[protocol], "--wait", "0.1", "a")
        assert (code, err) == (1, f"jaxserve.client: server at {found[protocol]} was not ready within 0.1 s\n")
    finally:
        stop.set()
        thread.join()


def test_certificates(run, tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  handshakes fail on purpose
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        _, _, err = run(f"https://{address}", "a")
        assert "is not trusted" in err
        assert "--ca FILE" in err
        assert run(f"https://{address}", "a", "--ca", str(tmp_path / "ca.pem"))[2].startswith(
            "jaxserve.client: UNIMPLEMENTED: the server answers 501"
        )
        assert "takes encrypted connections only (TLS); use --address https://" in run(f"http://{address}", "a")[2]
        server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "50051", "a"], "address is '50051'; it must be HOST:PORT"),
        (["--address", "ftp://x", "a"], "address is 'ftp://x'; it must be HOST:PORT or grpc://HOST:PORT"),
        (["--address", "host:port", "a"], "address is 'host:port'"),
        (["--system", "x", "a"], "system needs a conversation; use --chat"),
        (["--api-key", "a\n", "a"], "api_key has characters that no key has"),
        (["--certificate", "x.pem", "a"], "certificate is 'x.pem' and private_key is not set; give both"),
        (["--completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_faulty_options(capsys, arguments, words):
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            command.main([*more, *arguments])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert words in (json.loads(out)["error"]["message"] if more else err)


def test_files_that_cannot_be_used_are_named(capsys, tmp_path, protocol):
    address = {"grpc": "grpcs://127.0.0.1:1", "http": "https://127.0.0.1:1"}[protocol]
    with pytest.raises(SystemExit) as stopped:
        command.main(["--address", address, "a", "--ca", str(tmp_path / "none.pem")])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "none.pem" in err
    assert "No such file" in err


def test_failures_of_the_network_are_told_apart_from_refusals():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        target = parse_target(f"http://127.0.0.1:{free.getsockname()[1]}", Credentials())
        with pytest.raises(Exception, match="refused") as raised:
            target.open().model_info()
        failure = failure_of(raised.value, target)
        assert failure.unreachable
        assert failure.line == f"no server answers at {target.address}; start one with: python -m jaxserve.server"


def complete(script: pathlib.Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    code = f"""
        source {script}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
        handler=$(complete -p python | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $handler python
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=script.parent, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


def test_bash_completes_options_choices_and_files(tmp_path, capsys):
    assert command.main(["--completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "my prompt.txt").touch()
    start = ("python", "-m", "jaxserve.client")
    assert complete(script, *start, "--tem") == {"--temperature"}
    assert complete(script, *start, "--te") == {"--temperature", "--tenant"}
    assert complete(script, *start, "--json") == {"--json", "--json-events"}
    every = complete(script, *start, "-")
    helped = subprocess.run(
        [sys.executable, "-m", "jaxserve.client", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert {word for word in every if word.startswith("--")} <= set(helped.replace(",", " ").split())
    assert {"-h", "-n", "--chat", "--api-key", "--stop-token-ids"} <= every
    assert complete(script, *start, "--completion", "") == set(SHELLS)
    assert complete(script, *start, "--ca", "my") == {"my prompt.txt"}
    assert complete(script, *start, "my") == {"my prompt.txt"}
    assert complete(script, *start, "--max-tokens", "") == set()
    assert complete(script, "python", "-m", "jaxs") == {"jaxserve.client"}


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_have_every_option_and_are_valid(shell, capsys, tmp_path):
    assert command.main(["--completion", shell]) == 0
    out = capsys.readouterr().out
    for name in ("temperature", "chat", "api-key", "completion", "stop-token-ids"):
        assert f"--{name}" in out or f"-l {name}" in out
    with contextlib.suppress(FileNotFoundError):  # a shell that is not here cannot read it
        file = tmp_path / "script"
        file.write_text(out)
        subprocess.run([shell, "-n", str(file)], check=True, timeout=30)


def test_ctrl_c_cancels_an_answer_and_keeps_the_conversation(ports):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "wb", buffering=0) as keyboard:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.client", "--chat", "--address", ports.addresses["http"]],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(theirs)
        assert process.stdout is not None
        before = len(ports.engine.requests)
        keyboard.write(b"hi\n")
        ports.engine.wait_for_requests(before + 1)
        ports.engine.wait_until_gone(ports.engine.requests[before].request_id)
        ports.engine.pause()
        keyboard.write(b"long\n")
        ports.engine.wait_for_requests(before + 2)
        ports.engine.allow(2)
        expected = b"> [user]hi\n> [u"
        assert process.stdout.read(len(expected)) == expected
        process.send_signal(signal.SIGINT)
        ports.engine.wait_for_abort(ports.engine.requests[before + 1].request_id)
        ports.engine.resume()
        keyboard.write(b"you\n/quit\n")
        out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, err
    assert out.decode().rstrip().endswith("> [user]hi[assistant][user]hi[user]you\n>")
    assert b"echo, context 512 tokens. /reset forgets" in err
    assert b"(canceled)" in err
