"""What a client may send before it is anybody, what of it reaches the log, that none of it is run; and --dry-run."""

import ast
import logging
import pathlib
import socket

import grpc
import pytest

import jaxserve
from jaxserve import server
from jaxserve.config.access_config import AccessConfig
from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving import server_run
from jaxserve.telemetry.log_lines import LOG_FORMAT, EscapingFormatter
from tests.server.access_harness import secured
from tests.server.fakes import WAIT_SECONDS
from tests.server.harness import GREEDY

Code = grpc.StatusCode
LIMITS = LimitsConfig(max_metadata_bytes=8192)
PACKAGE = pathlib.Path(jaxserve.__file__).parent


@pytest.fixture(scope="module")
def served(tokenizer):
    with secured(tokenizer, AccessConfig(), LIMITS) as served:
        yield served


# ---- headers ----


def test_fault_14_oversized_metadata_is_refused(served):
    with served.client() as client, grpc.insecure_channel(served.grpc.address) as channel:
        for size in (9_000, 200_000, 2_000_000):
            call = channel.unary_unary("/jaxserve.v1.JaxServe/Tokenize")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", metadata=[("x-large", "x" * size)], timeout=WAIT_SECONDS)
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            assert client.tokenize("a")
        assert channel.unary_unary("/jaxserve.v1.JaxServe/Tokenize")(b"", metadata=[("x-large", "x" * 6_000)])


# ---- logs ----


def formatted(message: str, *arguments, error: Exception | None = None) -> list[str]:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("jaxserve", logging.ERROR, "", 0, message, arguments, info)
    return EscapingFormatter(LOG_FORMAT).format(record).split("\n")


def test_fault_28_nothing_in_a_record_passes_for_another_line():
    (line,) = formatted("tenant %s", "a\n2026-01-01 00:00:00 INFO jaxserve: forged\r\x1b[2J\x00\u2028\u202e\x85")
    assert line.endswith(r"tenant a\n2026-01-01 00:00:00 INFO jaxserve: forged\r\x1b[2J\x00\u2028\u202e\x85")
    (line,) = formatted("plain %s \\n ünïcödé 漢字", "text")
    assert line.endswith("plain text \\n ünïcödé 漢字")
    try:
        raise ValueError("bad\n2026-01-01 00:00:00 INFO jaxserve: forged\x1b[2J")
    except ValueError as error:
        first, *more = formatted("failed", error=error)
    assert first.endswith("ERROR jaxserve: failed")
    assert more[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.isprintable() for line in more)
    assert r"forged\x1b[2J" in more[-1]


def test_prompts_are_logged_only_when_asked_for(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    for wanted in (False, True):
        caplog.clear()
        with secured(tokenizer, AccessConfig(), log_prompts=wanted) as served, served.client() as client:
            assert client.generate_text("secret\nprompt", GREEDY, request_id="an\nid").text == "secret\nprompt"
            client.detokenize(client.tokenize("secret"))
            for fields in ({"request_id": "secret" * 99}, {"tenant": "secret" * 99}, {"deadline": 1.0}):
                with pytest.raises(grpc.RpcError):
                    client.generate_text("secret", GREEDY, **fields)
            served.get("/secret?secret=secret", method="POST", origin="http://secret", secret="secret")
            with socket.create_connection(served.http.address.rsplit(":", 1), WAIT_SECONDS) as connection:
                connection.sendall(b"secret secret\r\n\r\n")
                connection.recv(4096)
            served.engine.pause()
            served.engine.fail_request("x", "no such")
        ours = [record for record in caplog.records if record.name != "httpx"]
        found = [record for record in ours if "secret" in record.getMessage()]
        if wanted:
            (record,) = found
            assert record.getMessage() == r"request 'an\nid' of '': prompt 'secret\nprompt'"
        else:
            assert not found


# ---- no code of others ----


def test_nothing_that_arrives_is_executed():
    """Nothing in the package reads what could run code: pickles in any guise, or text that is evaluated."""
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "yaml"}
    forbidden |= {"multiprocessing"}  # its queues and pipes carry pickles
    calls = {"eval", "exec", "__import__"}
    linked = [path.resolve() for path in PACKAGE.iterdir() if path.is_symlink()]
    paths = [path for folder in (PACKAGE, *linked) for path in folder.rglob("*.py")]
    assert pathlib.Path(server_run.__file__).resolve() in {path.resolve() for path in paths}
    assert {path.name for path in linked} >= {"models", "pallas_kernels", "server"}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg in ("allow_pickle", "trust_remote_code", "weights_only"):
                        assert isinstance(keyword.value, ast.Constant), f"{path}:{node.lineno}"
                        assert keyword.value.value is (keyword.arg == "weights_only"), f"{path}:{node.lineno}"
                assert getattr(node.func, "id", "") not in calls, f"{path}:{node.lineno}"
                assert getattr(node.func, "attr", "") != "ProcessPoolExecutor", f"{path}:{node.lineno}"
            for name in names:
                assert name.partition(".")[0] not in forbidden, f"{path}:{node.lineno} imports {name}"


# ---- --dry-run ----


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """Runs the server's checks in this process; returns exit code and output."""
    monkeypatch.setattr(server_run, "log_to_stderr", lambda: None)  # the test's own log stays
    monkeypatch.setattr(server_run, "launch_engine", None)

    def run(*bindings: str):
        ports = ("--gin.ServerConfig.port=0", "--gin.ServerConfig.http_port=0")
        code = server.main(["--config", "tiny.gin", "--dry-run", *ports, *bindings])
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_says_what_it_checked(dry_run):
    code, out, err = dry_run("--gin.EngineConfig.compilation_cache_dir=None")
    assert (code, err) == (0, "")
    kinds = [line.partition(":")[0] for line in out.splitlines()]
    assert kinds == [
        "configuration",
        "keys",
        "TLS",
        "gRPC port",
        "open files",
        "tokenizer",
        "device",
        "model",
        "memory",
        "compilation cache",
        "nothing stands in the way of a start",
    ]
    assert "memory: 2,048 pages, 32,768 tokens" in out


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["AccessConfig.api_keys='/none/keys'"], "api_keys /none/keys cannot be read: No such file or directory"),
        (["TlsConfig.certificate='/none/c'", "TlsConfig.private_key='/none/k'"], "certificate /none/c cannot be read"),
        (["LimitsConfig.max_connections=10000000"], "the limit of open files is"),
        (["EngineConfig.tokenizer='/none'"], "tokenizer"),
        (
            ["EngineConfig.model='/none'", "EngineConfig.skip_tokenizer_init=True"],
            "model is '/none'; there is no such directory",
        ),
        (["CacheConfig.num_pages=100000000"], "page pool of 100000000 pages"),
        (["EngineConfig.bundle='/none'"], "/none"),
    ],
)
def test_a_dry_run_fails_with_one_line(dry_run, bindings, words):
    code, out, err = dry_run(*(f"--gin.{binding}" for binding in bindings))
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("jaxserve.server: ")
    assert words in err
    assert "nothing stands in the way" not in out


def test_a_dry_run_finds_a_port_in_use(dry_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = dry_run(f"--gin.ServerConfig.http_port={port}")
    assert (code, f"port {port} is in use" in err) == (1, True)
