"""Files of keys and certificates: whose they must be, what they may hold, and how changes are taken over."""

import datetime
import hmac
import json
import os
import pathlib
import signal
import ssl
import sys

import grpc
import httpx
import pytest

from jaxserve import keys as command
from jaxserve import server
from jaxserve.config.access_config import AccessConfig, TlsConfig, exposure_warnings
from jaxserve.serving import server_run
from jaxserve.serving.access import key_file
from jaxserve.serving.access.api_keys import ApiKeys, key_of
from jaxserve.serving.access.callers import Caller, CallerLimits
from jaxserve.serving.access.key_file import MAX_KEYS, KeyFileError, new_key, parse_keys, read_keys
from jaxserve.serving.access.limiter import CallLimiter
from jaxserve.serving.access.refresh import FileRefresher
from jaxserve.serving.access.tls import ServerTls, TlsError
from jaxserve.serving.clients.client_credentials import Credentials
from jaxserve.serving.clients.grpc_client import Client
from jaxserve.serving.problem import CallerLimitError, UnauthenticatedError
from tests.server.access_harness import Certificates, KeyFile, secured
from tests.server.fakes import save_tokenizer
from tests.server.harness import GREEDY
from tests.server.process import Process

Code = grpc.StatusCode


@pytest.fixture
def keys(tmp_path):
    return KeyFile(tmp_path / "keys", "alice", "bob")


# ---- the file of keys ----


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o666, 0o777])
def test_fault_35_a_key_file_that_others_may_read_or_change_is_refused(keys, mode):
    keys.path.chmod(mode)
    with pytest.raises(KeyFileError) as caught:
        read_keys(str(keys.path))
    assert str(caught.value).startswith(f"api_keys {keys.path} has the mode {mode:04o}: others may ")
    assert "; chmod 600 it" in str(caught.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_fault_35_a_key_file_of_another_user_is_refused(keys, tmp_path):
    os.chown(keys.path, 4711, -1)
    with pytest.raises(KeyFileError, match=rf"api_keys {keys.path} belongs to user 4711, not to 0"):
        read_keys(str(keys.path))
    os.chown(keys.path, 0, -1)
    os.chown(tmp_path, 4711, -1)
    with pytest.raises(KeyFileError, match=rf"lies in {tmp_path}, which belongs to user 4711"):
        read_keys(str(keys.path))
    os.chown(tmp_path, 0, -1)
    assert len(read_keys(str(keys.path))) == 2


def test_fault_35_a_directory_that_others_may_change_is_refused(keys, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(KeyFileError, match=rf"lies in {tmp_path}, which has the mode 0777: others may replace it"):
        read_keys(str(keys.path))
    elsewhere = tmp_path / "own"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "keys").symlink_to(keys.path)
    with pytest.raises(KeyFileError, match="others may replace it"):
        read_keys(str(elsewhere / "keys"))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, words in (
        ("pipe", "is no regular file"),
        (".", "is no regular file"),
        ("none", "cannot be read: No such"),
    ):
        with pytest.raises(KeyFileError, match=words):
            read_keys(str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "name is ''; it must be 1 to 256 printable characters"),
        ({"name": "a\nb"}, r"name is 'a\nb'; it must be"),
        ({"name": "x" * 300}, "name has 300 characters"),
        ({"salt": "00"}, "salt is '00'; it must be 32 hexadecimal digits"),
        ({"hash": "no"}, "hash is 'no'; it must be 64 hexadecimal digits"),
        ({"expires": "tomorrow"}, "expires is 'tomorrow'; write a date or time such as"),
        ({"requests_per_minute": 0}, "requests_per_minute is 0; it must be at least 1"),
        ({"priority": 2**40}, "priority is 1099511627776; it must be"),
        ({"priority": "high"}, "$.priority"),
        ({"admin": "yes"}, "$.admin"),
        ({"amdin": True}, "`amdin`"),
        ({"tenant": "t" * 300}, "tenant has 300 characters"),
    ],
)
def test_a_faulty_line_is_named(keys, change, words):
    line = json.loads(keys.lines["alice"]) | change
    with pytest.raises(KeyFileError) as caught:
        parse_keys(f"# keys\n\n{json.dumps(line)}\n".encode(), "FILE")
    assert str(caught.value).startswith("api_keys FILE:3: ")
    assert words in str(caught.value)


def test_a_file_must_make_sense_as_a_whole(keys):
    line = keys.lines["alice"]
    parsed = {name: parse_keys(text.encode(), "F")[0] for name, text in keys.lines.items()}
    for text, words in (
        ("", "has no key"),
        ("# none\n", "has no key"),
        (f"{line}\n{line}", "F:2: the key of 'alice' is that of 'alice' on a line before"),
        (f"{line}\n{new_key('alice', admin=True)[1]}", "F:2: name 'alice' stands on two lines that allow different"),
        (line[:-20], "F:1: Input data was truncated"),
        (line + line, "F:1: JSON is malformed"),
    ):
        with pytest.raises(KeyFileError, match=words):
            parse_keys(text.encode(), "F")
    many = [line, *(new_key("alice", [parsed["alice"]])[1] for _ in range(MAX_KEYS))]
    with pytest.raises(KeyFileError, match=f"F:{MAX_KEYS + 1}: there are more than {MAX_KEYS} keys"):
        parse_keys("\n".join(many).encode(), "F")


def test_a_key_is_replaced_by_two_of_one_name(tmp_path):
    old, first = new_key("alice", expires="2030-01-01T12:00:00+00:00", priority=2)
    new, second = new_key("alice", priority=2)
    path = tmp_path / "keys"
    path.write_text(f"{first}\n{second}\n")
    path.chmod(0o600)
    at = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC).timestamp()
    before, after = (ApiKeys(str(path), lambda now=now: now) for now in (at - 1, at))
    assert before.identify(f"Bearer {old}") == before.identify(f"Bearer {new}") == Caller("alice", "alice", 2)
    assert after.identify(f"Bearer {new}").name == "alice"
    with pytest.raises(UnauthenticatedError, match="has expired"):
        after.identify(f"Bearer {old}")


def test_fault_26_every_key_is_compared_whichever_was_given(keys, monkeypatch):
    """And by a comparison that takes the same time wherever two digests differ."""
    third = new_key("carol", read_keys(str(keys.path)))[0]
    keys.add("dave")
    callers, compared = ApiKeys(str(keys.path)), []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return hmac.compare_digest(one, other)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(key_file, "hmac", Watched)
    for given in (*keys.keys.values(), third, "", "x", keys.keys["alice"][:-1]):
        compared.clear()
        try:
            name = callers.identify(f"Bearer {given}").name
        except UnauthenticatedError:
            name = None
        assert name == next((name for name, key in keys.keys.items() if key == given), None)
        assert compared == [32, 32, 32]


def test_key_of():
    assert key_of(None) == key_of("") == key_of("Digest x") == key_of("Basic !") == b""
    assert key_of("Bearer a b") == b"a b"
    assert len(key_of("Bearer " + "x" * 10_000)) < 1000


def test_the_command_adds_keys_that_a_server_takes(tmp_path, capsys):
    path = str(tmp_path / "keys")
    assert command.main(["alice", "--file", path]) == 0
    alice = capsys.readouterr().out.strip()
    options = ["--any-tenant", "--any-priority", "--admin", "--requests-per-minute", "60", "--expires", "2100-01-01"]
    assert command.main(["root", *options, "--file", path]) == 0
    root = capsys.readouterr().out.strip()
    assert command.main(["bob", "--tenant", "lab", "--priority", "-2"]) == 0
    bob, line = capsys.readouterr().out.split()
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)  # without a line end
    assert command.main(["carol", "--file", path]) == 0
    assert os.stat(path).st_mode & 0o777 == 0o600
    callers = ApiKeys(path)
    assert callers.identify(f"Bearer {alice}") == Caller("alice", "alice", 0)
    assert callers.identify(f"Bearer {bob}") == Caller("bob", "lab", -2)
    limits = CallerLimits(requests_per_minute=60)
    assert callers.identify(f"Bearer {root}") == Caller("root", None, None, is_admin=True, limits=limits)
    text = pathlib.Path(path).read_text()
    assert not any(key in text for key in (alice, bob, root))
    capsys.readouterr()
    assert command.main(["alice", "--admin", "--file", path]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "name 'alice' stands on two lines" in err
    assert pathlib.Path(path).read_text() == text
    assert os.listdir(tmp_path) == ["keys"]


# ---- limits ----


def test_allowances_grow_back_steadily():
    now = [0.0]
    limiter = CallLimiter(lambda: now[0])
    caller = Caller("a", limits=CallerLimits(requests_per_minute=6, tokens_per_minute=600))
    for _ in range(6):
        limiter.opened(caller)
    with pytest.raises(CallerLimitError) as caught:
        limiter.opened(caller)
    assert caught.value.retry_seconds == pytest.approx(10.0)
    now[0] = 10.0
    limiter.opened(caller)
    limiter.charge("a", 1200)  # owed: 600 are left of 600
    limiter.charge("somebody else", 10**9)
    now[0] = 60.0
    with pytest.raises(CallerLimitError, match="600 tokens per minute") as caught:
        limiter.opened(caller)
    assert caught.value.retry_seconds == pytest.approx(10.1)
    now[0] = 70.2
    limiter.opened(caller)
    for _ in range(8):
        limiter.closed(caller)
    assert limiter._open == {}


# ---- changes ----


def test_changes_are_taken_over_whole_or_not_at_all(keys, caplog):
    caplog.set_level("INFO")
    callers = ApiKeys(str(keys.path))
    refresher = FileRefresher([callers])

    def known(name: str) -> bool:
        try:
            return callers.identify(f"Bearer {keys.keys[name]}").name == name
        except UnauthenticatedError:
            return False

    refresher.look()
    assert not caplog.records
    keys.add("carol")
    refresher.look()
    assert not known("carol")  # it may still be written to
    refresher.look()
    assert known("carol")
    assert caplog.messages == [f"3 API keys read again from {keys.path}"]
    keys.write(keys.lines["alice"] + "\n" + keys.lines["bob"][:50])
    for _ in range(3):
        refresher.look()
    assert known("carol")
    assert known("bob")
    assert caplog.messages[1].startswith(f"the API keys stay as they were: api_keys {keys.path}:2: ")
    assert len(caplog.messages) == 2
    keys.path.unlink()
    for _ in range(2):
        refresher.look()
    assert known("alice")
    keys.write(keys.lines["bob"])
    refresher.look(at_once=True)
    assert (known("alice"), known("bob"), known("carol")) == (False, True, False)


# ---- TLS ----


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


def https(served, path: str = "/health", **options) -> int:
    """Status of the HTTP port, by TLS."""
    context = ssl.create_default_context(cafile=options.pop("ca"))
    if certificate := options.pop("certificate", None):
        context.load_cert_chain(*certificate)
    return httpx.get(f"https://{served.http.address}{path}", verify=context, **options).status_code


def test_tls_on_both_ports(tokenizer, certificates, keys, tmp_path):
    ca, other = certificates.ca, Certificates(tmp_path / "other")
    config = AccessConfig(api_keys=str(keys.path), tls=certificates.server())
    with secured(tokenizer, config) as served:
        with served.client(keys.keys["alice"], ca=ca) as client:
            assert client.generate_text("abc", GREEDY).text == "abc"
        with served.client("wrong", ca=ca) as client, pytest.raises(grpc.RpcError) as caught:
            client.tokenize("a")
        assert caught.value.code() is Code.UNAUTHENTICATED
        for credentials in ({}, {"ca": other.ca}):
            with served.client(keys.keys["alice"], **credentials) as client, pytest.raises(grpc.RpcError) as caught:
                client.tokenize("a")
            assert caught.value.code() is Code.UNAVAILABLE
        assert https(served, ca=ca) == 200
        assert https(served, "/openapi.json", ca=ca) == 401
        assert https(served, "/openapi.json", ca=ca, headers={"authorization": f"Bearer {keys.keys['bob']}"}) == 200
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            https(served, ca=other.ca)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{served.http.address}/health", verify=False)


def test_mutual_tls_on_both_ports(tokenizer, certificates, tmp_path):
    other = Certificates(tmp_path / "other")
    server, clients = certificates.server(), Certificates(tmp_path / "clients")
    tls = TlsConfig(server.certificate, server.private_key, clients.ca)
    good, bad = clients.issue("client", "somebody"), other.issue("client", "somebody")
    with secured(tokenizer, AccessConfig(tls=tls)) as served:
        with served.client(ca=certificates.ca, certificate=good[0], private_key=good[1]) as client:
            assert client.tokenize("a")
        assert https(served, "/openapi.json", ca=certificates.ca, certificate=good) == 200
        for files in (None, bad):
            named = {} if files is None else {"certificate": files[0], "private_key": files[1]}
            with served.client(ca=certificates.ca, **named) as client, pytest.raises(grpc.RpcError) as caught:
                client.tokenize("a")
            assert caught.value.code() is Code.UNAVAILABLE
            with pytest.raises(httpx.HTTPError):
                https(served, ca=certificates.ca, certificate=files)


def test_changed_certificates_serve_new_connections(tokenizer, tmp_path, caplog):
    """Also where the authority has changed, so that clients of the old one stay away; half a change is none."""
    first, second = Certificates(tmp_path / "1"), Certificates(tmp_path / "2")
    live = tmp_path / "live"
    live.mkdir(mode=0o700)

    def install(certificates: Certificates, *names: str) -> TlsConfig:
        made = certificates.server()
        sources = {"certificate": made.certificate, "private_key": made.private_key, "client_ca": certificates.ca}
        for name in names or sources:
            (live / name).write_bytes(pathlib.Path(sources[name]).read_bytes())
            (live / name).chmod(0o600)
        return TlsConfig(**{name: str(live / name) for name in sources})

    def reached(served, certificates: Certificates) -> tuple[bool, bool]:
        pair = certificates.issue("client", "somebody")
        with served.client(ca=certificates.ca, certificate=pair[0], private_key=pair[1]) as client:
            try:
                by_grpc = bool(client.tokenize("a"))
            except grpc.RpcError:
                by_grpc = False
        try:
            by_http = https(served, ca=certificates.ca, certificate=pair) == 200
        except httpx.HTTPError:
            by_http = False
        return by_grpc, by_http

    with secured(tokenizer, AccessConfig(tls=install(first))) as served:
        assert reached(served, first) == (True, True)
        install(second, "certificate")  # and not yet its key
        served.access.tls.reload()
        assert "TLS stays as it was: certificate " in caplog.messages[-1]
        assert reached(served, first) == (True, True)
        install(second)
        served.access.tls.reload()
        assert reached(served, second) == (True, True)
        assert reached(served, first) == (False, False)


def test_certificates_that_cannot_be_used_are_named(certificates, tmp_path):
    one, two = certificates.server("one"), certificates.server("two")
    text = tmp_path / "text"
    text.write_text("no certificate")
    open_key = tmp_path / "open.key"
    open_key.write_bytes(pathlib.Path(one.private_key).read_bytes())
    open_key.chmod(0o640)
    text.chmod(0o600)
    for config, words in (
        (TlsConfig(one.certificate, two.private_key), f"private_key {two.private_key} cannot be used"),
        (TlsConfig(str(text), one.private_key), f"certificate {text} and"),
        (TlsConfig(one.certificate, one.private_key, str(text)), f"client_ca {text}, cannot be used"),
        (TlsConfig(str(tmp_path / "none"), one.private_key), "none cannot be read: No such file"),
        (TlsConfig(one.certificate, str(open_key)), f"private_key {open_key} has the mode 0640: others may read it"),
    ):
        with pytest.raises(TlsError) as caught:
            ServerTls(config)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_settings_that_contradict_themselves():
    for make, words in (
        (lambda: TlsConfig(certificate="a"), "certificate is 'a' and private_key is not set"),
        (lambda: TlsConfig(private_key="a"), "private_key is 'a' and certificate is not set"),
        (lambda: TlsConfig(client_ca="a"), "client_ca is 'a' and certificate is not set"),
        (lambda: AccessConfig(web_origins=("example.com",)), "web_origins has 'example.com'"),
        (lambda: AccessConfig(web_origins=("https://example.com/x",)), "web_origins has"),
        (lambda: Credentials(certificate="a"), "certificate is 'a' and private_key is not set"),
        (lambda: Credentials("key\n"), "api_key has characters that no key has"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_open_ports_are_warned_of():
    keys, tls, ca = AccessConfig("f"), TlsConfig("a", "b"), TlsConfig("a", "b", "c")
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert exposure_warnings(AccessConfig(), host) == []
    for host in ("0.0.0.0", "::", "10.0.0.1", "my.host"):
        no_key, no_tls = exposure_warnings(AccessConfig(), host)
        assert f"host is {host} and api_keys is not set" in no_key
        assert f"host is {host} and TLS is off: prompts" in no_tls
        assert "TLS is off: keys, prompts" in "".join(exposure_warnings(keys, host))
        assert [line[:40] for line in exposure_warnings(AccessConfig(tls=tls), host)] == [no_key[:40]]
        assert exposure_warnings(AccessConfig(tls=ca), host) == exposure_warnings(AccessConfig("f", tls), host) == []


# ---- a whole process ----


def test_a_process_reads_its_files_again_at_sighup(tmp_path, keys, certificates):
    tls = certificates.server()
    process = Process(
        [
            sys.executable,
            "-m",
            "tests.server.echo_server",
            "run",
            str(save_tokenizer(tmp_path)),
            f"--gin.AccessConfig.api_keys='{keys.path}'",
            f"--gin.TlsConfig.certificate='{tls.certificate}'",
            f"--gin.TlsConfig.private_key='{tls.private_key}'",
            "--gin.ServerConfig.host='0.0.0.0'",
        ]
    )
    try:
        port = process.until(r"ready on 0\.0\.0\.0:(\d+) in").group(1)
        assert not any(" WARNING " in line for line in process.seen)
        address, key = f"127.0.0.1:{port}", keys.add("carol")
        process.popen.send_signal(signal.SIGHUP)
        process.until(f"3 API keys read again from {keys.path}")
        with Client(address, Credentials(key, ca=certificates.ca)) as client:
            assert client.generate_text("abc", GREEDY).text == "abc"
        process.popen.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0
    finally:
        process.close()


def test_fault_35_a_start_with_a_faulty_key_file_fails_before_anything_listens(keys, monkeypatch, capsys):
    keys.path.chmod(0o644)
    monkeypatch.setattr(server_run, "log_to_stderr", lambda: None)  # the test's own log stays
    monkeypatch.setattr(server_run, "launch_engine", None)
    assert server.main(["--config", "tiny.gin", f"--gin.AccessConfig.api_keys='{keys.path}'"]) == 1
    assert capsys.readouterr().err == (
        f"jaxserve.server: api_keys {keys.path} has the mode 0644: others may read it; chmod 600 it\n"
    )
