"""`python -m jaxserve.client`: in this process where only the outcome matters, as a program where signals do."""

import contextlib
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys

import pytest

from jaxserve import client as command
from tests.server.fakes import WAIT_SECONDS
from tests.server.harness import serving_in_thread


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving_in_thread(tokenizer) as served:
        yield served


@pytest.fixture
def run(served, monkeypatch, capsys):
    """Runs the client in this process; returns its exit code and what it wrote to stdout and stderr."""

    def run(*arguments: str, stdin: bytes = b"", address: str = served.address):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = command.main([*arguments, "--address", address])
        return code, *capsys.readouterr()

    return run


def start(served, *arguments: str, **streams) -> subprocess.Popen:
    """Starts the client as a program."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxserve.client", "--address", served.address, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **streams,
    )


def test_one_prompt(run):
    assert run("copy: abc") == (0, "copy: abc\n", "")


def test_escapes_and_newline(run, served):
    assert run(r"a\nb")[1] == "a\\nb\n"
    assert run("-e", r"a\n\\n\q")[1] == "a\n\\n\\q\n"
    assert run("-n", "abc")[1] == "abc\n"
    assert served.engine.requests[-1].prompt_token_ids[-1] == ord("\n") + 3
    assert run("-n", "-e", r"abc\n")[1] == "abc\n"
    assert len(served.engine.requests[-1].prompt_token_ids) == 5  # <bos>, abc and one newline, not two
    assert run("-e", "--stop", r"\n", r"one\ntwo")[1] == "one\n"


@pytest.mark.parametrize(
    "prompt", ["-5+3", "-1", "-x", "-no", "- item", "--5", "-- x", "---", "--help me", "-5\n--json"]
)
def test_a_prompt_may_begin_with_a_dash(run, served, prompt):
    assert run("-n", prompt)[:2] == (0, prompt + "\n")
    assert run(prompt, "-n", "--json", "--max-tokens", "99")[0] == 0
    sent = [bytes(token_id - 3 for token_id in each.prompt_token_ids[1:]) for each in served.engine.requests[-2:]]
    assert sent == [prompt.encode() + b"\n"] * 2


def test_two_dashes_make_anything_the_prompt(served, monkeypatch, capsys):
    address = ["--address", served.address]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\n")))
    for prompt in ("-", "--", "--json", "-n", "--temperature=2", "-5", "plain"):
        assert command.main([*address, "--", prompt]) == 0
        assert capsys.readouterr().out == prompt + "\n"
    assert command.main([*address, "--"]) == 0
    assert capsys.readouterr().out == "--\n"
    assert command.main([*address, "-"]) == 0
    assert capsys.readouterr().out == "from stdin\n"


@pytest.mark.parametrize("value", ["-", "--", "---", "-5", "--json", "-n", "--tenant", "-h"])
def test_the_value_of_an_option_may_begin_with_a_dash(run, served, value):
    assert run("--stop", value, f"ab{value}cd")[:2] == (0, "ab\n")
    assert run(f"--stop={value}", f"ab{value}cd")[:2] == (0, "ab\n")
    assert run("--ten", value, "a")[0] == 0
    assert served.engine.requests[-1].options.tenant == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jsn", "a"], "there is no option --jsn; did you mean --json? Or put -- before it if it is the prompt"),
        (["--verbose"], "there is no option --verbose; put -- before it if it is the prompt"),
        (["--max_tokens=3", "a"], "there is no option --max_tokens; did you mean --max-tokens?"),
        (["a", "-5"], "2 prompts are given, 'a' and '-5'; put quotes around one"),
        (["one", "two", "three"], "3 prompts are given, 'one' and 'two'; put quotes around one"),
        (["--top", "3", "a"], "there is no option --top; did you mean --top-k or --top-p?"),
        (["--json=x", "a"], "argument --json: ignored explicit argument 'x'"),
        (["a", "--stop"], "argument --stop: expected one argument"),
        (["--max-tokens", "--json", "a"], "argument --max-tokens: '--json' is no int"),
        (["--priority", "-9999999999", "a"], "priority is -9999999999; it must be"),
    ],
)
def test_what_looks_like_an_option_and_is_none_is_refused(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_standard_input_is_one_prompt_a_line_or_one_altogether(run):
    assert run("-", stdin="one\r\n\ntwö\nthree".encode()) == (0, "one\ntwö\nthree\n", "")
    assert run(stdin=b"piped\n")[1] == "piped\n"
    assert run("--whole", stdin=b"one\ntwo\n")[1] == "one\ntwo\n"
    code, out, err = run(stdin=b"good\nbad \xc3\x28\n")
    assert (code, out) == (1, "good\n")
    assert err == "jaxserve.client: line 2 is not valid UTF-8 at byte 4\n"


def test_json_has_ids_text_reason_and_usage(run):
    code, out, _ = run("--json", "--max-tokens", "2", "-", stdin="abc\n😀\n".encode())
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first.pop("request_id")
    assert first == {
        "prompt": "abc",
        "token_ids": [ord("a") + 3, ord("b") + 3],
        "text": "ab",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 4, "output_tokens": 2, "cached_tokens": 1},
        "index": 0,
    }
    assert second["prompt"] == "😀"


def test_samples_are_answers_one_after_the_other(run):
    options = "--temperature", "1", "--max-tokens", "2"
    code, out, _ = run("--n", "3", *options, "abcd")
    assert (code, out) == (0, "ab\nbc\ncd\n")
    code, out, _ = run("--json", "--n", "2", *options, "abcd")
    assert [(one["index"], one["text"]) for one in map(json.loads, out.splitlines())] == [(0, "ab"), (1, "bc")]


def test_options_reach_the_engine(run, served):
    options = "--temperature 0.5 --top-k 4 --top-p 0.5 --min-p 0.25 --seed 3 --max-tokens 9 --ignore-eos"
    assert run(*options.split(), "--tenant", "t", "--priority", "5", "--timeout", "100", "a")[0] == 0
    request = served.engine.requests[-1]
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 4, 0.5, 0.25)
    assert (request.seed, request.max_tokens, request.stop_token_ids) == (3, 9, ())
    assert (request.options.tenant, request.options.priority) == ("t", 5)
    assert request.options.deadline is not None
    assert run(*"--ignore-eos --stop-token-ids 7 --stop-token-ids 9 --min-tokens 2 a".split())[0] == 0
    request = served.engine.requests[-1]
    assert (request.temperature, request.stop_token_ids, request.min_tokens) == (0.0, (7, 9), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "nan"], "temperature is nan"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--timeout", "0"], "timeout is 0"),
        (["--priority", str(2**31)], "priority is 2147483648"),
        (["--stop", ""], "stop has ''"),
    ],
)
def test_faulty_options_are_one_line_and_exit_code_2(run, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        run(*options, "a")
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_what_the_server_refuses_is_one_line_and_the_others_are_answered(run):
    code, out, err = run("-", "--max-tokens", "500", stdin=b"a\n" + b"b" * 100 + b"\n")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("jaxserve.client: FAILED_PRECONDITION: prompt has 2 tokens and max_tokens is 500")
    assert lines[1].startswith("jaxserve.client: INVALID_ARGUMENT: prompt has 101 tokens")


def test_a_prompt_that_is_not_utf8(run):
    code, out, err = run("a\udcff")
    assert (code, out, err) == (1, "", "jaxserve.client: the prompt is not valid UTF-8 at character 1\n")


def test_no_server(run):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, out, err = run("a", address=address)
        assert (code, out) == (1, "")
        assert err == f"jaxserve.client: no server answers at {address}; start one with: python -m jaxserve.server\n"
        code, out, err = run("a", "--wait", "0.2", address=address)
        assert (code, err) == (1, f"jaxserve.client: server at {address} was not ready within 0.2 s\n")


def test_text_is_printed_as_it_arrives_and_ctrl_c_cancels(tokenizer):
    with serving_in_thread(tokenizer) as served:
        served.engine.pause()
        process = start(served, "abc")
        served.engine.wait_for_requests(1)
        served.engine.allow(2)
        assert process.stdout.read(2) == b"ab"
        process.send_signal(signal.SIGINT)
        served.engine.wait_for_abort(served.engine.requests[0].request_id)
        out, err = process.communicate(timeout=WAIT_SECONDS)
        assert (process.returncode, out, err) == (130, b"", b"")


def test_a_reader_that_has_seen_enough(served):
    process = start(served, "-", stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"abc\n" * 50)
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(WAIT_SECONDS) == 1


def test_a_dialogue(served):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "wb", buffering=0) as keyboard:
        process = start(served, stdin=theirs)
        os.close(theirs)
        keyboard.write(b"hello\n\nworld\n\x04")
        out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, err
    assert out.decode().replace("> ", "").split() == ["hello", "world"]
    assert b"echo, context 512 tokens" in err
