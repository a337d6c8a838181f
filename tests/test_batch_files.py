"""The files of a batch: foreign, irregular and torn outputs, locks, and errors of the operating system."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend import batch_files, batch_lines
from jaxserve.frontend.batch_errors import BatchFileError, reason
from jaxserve.frontend.batch_files import OutputFile, open_input
from jaxserve.frontend.batch_lines import read_lines
from tests.batch_helpers import line, results, run, write
from tests.budgets import budget
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import load

LINES = [line("a", prompt="xx"), line('q"\\\n🍏', prompt="y"), b"{", line("c", prompt="")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", LINES)


def refusal(path, source):
    with pytest.raises(BatchFileError) as caught:
        OutputFile(str(path), str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- outputs that are something else ---------------------------------------------------------------------------------

RESULT = {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200}, "error": None}


@pytest.mark.parametrize(
    "content",
    [
        b"notes without a newline",
        b'{"a": 1}',
        b'{"id": 7, "na',
        b'{"id": "batch_req_x", "cus',
        b'{"id": "batch_req_1", "custom_id": 7',
        b'{"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, "request_id": "req_af',
        b"\n",
        b"\x1f\x8b\x08\x00 compressed",
        b"\0" * 5000,
        b"{" * 5000,
        b"[" * 100_000,
        json.dumps(line("a", prompt="the input's own kind of line")).encode() + b"\n",
        json.dumps(RESULT | {"response": None}).encode() + b"\n",
        json.dumps(RESULT | {"error": {"code": "x"}}).encode() + b"\n",
        json.dumps(RESULT | {"id": "vllm-1"}).encode() + b"\n",
        json.dumps(RESULT | {"custom_id": 1}).encode() + b"\n",
        json.dumps(RESULT | {"request_digest": "none"}).encode() + b"\n",
        json.dumps(RESULT | {"more": 1}).encode() + b"\n",
        '{"id": "batch_req_1", "custom_id": "ü'.encode(),
    ],
)
@pytest.mark.parametrize("before", [b"", json.dumps(RESULT | {"custom_id": "before"}).encode() + b"\n"])
def test_fault_36_a_foreign_output_is_refused_and_left_alone(tmp_path, source, content, before):
    path = tmp_path / "out.jsonl"
    path.write_bytes(before + content)
    number = 2 if before else 1
    words = f"output {str(path)!r} holds something else in line {number}; give another name or remove it"
    assert refusal(path, source) == words
    assert path.read_bytes() == before + content


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, source, monkeypatch):
    path = tmp_path / "out.jsonl"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "something else in line 1" in refusal(path, source)
    with open(path, "wb") as file:  # it begins as ours would
        file.write(b'{"id": "batch_req_1", "custom_id": "a", "response": null, "error": {"code": "')
        file.truncate(1 << 40)
    monkeypatch.setattr(batch_files, "MAX_RESULT_BYTES", 1 << 20)
    assert "something else in line 1" in refusal(path, source)
    assert path.stat().st_size == 1 << 40


def test_one_custom_id_twice_in_an_output_is_refused(tmp_path, source):
    path = write(tmp_path / "out.jsonl", [RESULT, RESULT | {"custom_id": "b"}, RESULT])
    assert "holds custom_id 'a' twice, in lines 1 and 3; remove one of them" in refusal(path, source)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/dev/full", "is a character device; give a file or a pipe"),
        ("/dev/zero", "is a character device; give a file or a pipe"),
        ("/dev/urandom", "is a character device; give a file or a pipe"),
        ("folder", "is a directory; name a file in it"),
        ("socket", "is a socket; give a file or a pipe"),
        ("in.jsonl", "is the input; give another name"),
        ("symbolic", "is the input; give another name"),
        ("hard", "is the input; give another name"),
        ("in.jsonl/out", "cannot be written: Not a directory; a part of its path is no directory: check the path"),
        ("x" * 300, "cannot be written: File name too long; give a shorter name"),
        ("circle", "cannot be written: Too many levels of symbolic links; its symbolic links lead in a circle"),
        ("", "cannot be written: No such file or directory; check its name"),
        ("nul\0", "holds a NUL character"),
    ],
)
def test_fault_36_an_output_that_is_no_file_is_refused_by_name(tmp_path, source, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.symlink("in.jsonl", "symbolic")
    os.link("in.jsonl", "hard")
    os.symlink("circle", "circle")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert refusal(name, source).startswith(f"output {name!r} {words}")
    assert len((tmp_path / "in.jsonl").read_bytes().splitlines()) == len(LINES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/dev/zero", "is a character device; give a file or a pipe"),
        ("/dev/random", "is a character device; give a file or a pipe"),
        (".", "is a directory; name a file in it"),
        ("missing", "cannot be read: No such file or directory; check its name"),
    ],
)
def test_an_input_that_is_no_file_is_refused_by_name(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BatchFileError) as caught:
        open_input(name)
    assert str(caught.value).startswith(f"input {name!r} {words}")
    assert not os.listdir(tmp_path)


# ---- torn outputs ----------------------------------------------------------------------------------------------------


def choices(out):
    return {key: value["error"] or value["response"]["body"]["choices"] for key, value in out.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("unbroken")
    _, out = run(folder, LINES, tokenizer)
    return choices(out), (folder / "out.jsonl").read_bytes()


@budget(150)
@given(st.data())
def test_fault_36_an_output_cut_at_any_byte_is_completed(tmp_path_factory, tokenizer, unbroken, data):
    expected, whole = unbroken
    length = data.draw(st.integers(0, len(whole)))
    folder = tmp_path_factory.mktemp("cut")
    (folder / "out.jsonl").write_bytes(whole[:length])
    summary, out = run(folder, LINES, tokenizer)
    assert choices(out) == expected
    assert summary.resumed in (whole[:length].count(b"\n"), whole[:length].count(b"\n") + 1)
    assert (folder / "out.jsonl").read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])


def test_a_whole_last_line_without_newline_is_kept(tmp_path, tokenizer, unbroken):
    (tmp_path / "out.jsonl").write_bytes(unbroken[1][:-1])
    engine = RuleEngine()
    summary, out = run(tmp_path, LINES, tokenizer, engine)
    assert (len(engine.requests), summary.resumed, choices(out)) == (0, 4, unbroken[0])
    assert not (tmp_path / "out.jsonl").read_bytes().endswith(b"\n\n")


def test_an_output_that_another_program_has_changed_is_not_cut(tmp_path, source, unbroken):
    path = tmp_path / "out.jsonl"
    path.write_bytes(unbroken[1][:-5])
    output = OutputFile(str(path), source)
    with open(path, "ab") as other:
        other.write(b"more")
    with pytest.raises(BatchFileError, match="was changed by another program; give another name"):
        output.repair()
    output.close()
    assert path.read_bytes() == unbroken[1][:-5] + b"more"


# ---- locks -----------------------------------------------------------------------------------------------------------


def refuse_with(number):
    def lock(file, kind):
        raise OSError(number, os.strerror(number))

    return lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_flock_the_other_kind_of_lock_is_taken(tmp_path, source, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse_with(number))
    path = str(tmp_path / "out.jsonl")
    output = OutputFile(path, source)
    assert output.notes == []
    program = f"import fcntl; fcntl.lockf(open({path!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr
    output.close()
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_of_the_other_kind_that_another_run_holds(tmp_path, source, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse_with(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "lockf", refuse_with(number))
    assert refusal(tmp_path / "out.jsonl", source).endswith("is being written by another run")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_any_locks_the_run_goes_on_and_says_so(tmp_path, tokenizer, monkeypatch, number):
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, refuse_with(number))
    summary, _ = run(tmp_path, LINES, tokenizer)
    assert summary.completed == 2
    output = OutputFile(str(tmp_path / "out.jsonl"), str(tmp_path / "in.jsonl"))
    output.close()
    (note,) = output.notes
    assert f"is on a file system without locks ({os.strerror(number)})" in note


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_lock_that_fails_is_no_other_run(tmp_path, source, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse_with(number))
    path = tmp_path / "out.jsonl"
    assert refusal(path, source).startswith(f"output {str(path)!r} cannot be locked: {os.strerror(number)}; ")


# ---- errors of the operating system ----------------------------------------------------------------------------------


def failing_write(after, number, partial=30):
    """os.write that takes `after` bytes, then a part, and from then on fails; a disk that fills up."""
    left = after

    def write(fd, data):
        nonlocal left
        if left <= 0:
            raise OSError(number, os.strerror(number))
        count = len(data) if len(data) <= left else min(partial, len(data))
        left = left - count if count == len(data) else 0
        return real(fd, bytes(data[:count]))

    real = os.write
    return write


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space on its file system"),
        (errno.EDQUOT, "free space or raise the quota"),
        (errno.EIO, "check its disk or the connection to it"),
        (errno.EFBIG, "raise the limit on the size of files (ulimit -f) or use another file system"),
        (errno.ESTALE, "the file server has replaced it: mount the file system again"),
    ],
)
def test_fault_36_a_disk_that_fails_is_named_and_leaves_whole_lines(
    tmp_path, tokenizer, monkeypatch, unbroken, number, remedy
):
    engine, path = RuleEngine(), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing_write(unbroken[1].index(b"\n") + 1 + 400, number))
        with pytest.raises(BatchFileError) as caught:
            run(tmp_path, LINES, tokenizer, engine)
    assert str(caught.value) == f"output {str(path)!r} cannot be written: {os.strerror(number)}; {remedy}"
    before = results(path)
    assert 0 < len(before) < 4
    assert not engine._live  # what was under way has been ended
    _, out = run(tmp_path, LINES, tokenizer)
    assert choices(out) == unbroken[0]


def test_a_loss_that_is_reported_at_the_end_is_named(tmp_path, source, monkeypatch):
    for name in ("fsync", "close"):
        output = OutputFile(str(tmp_path / f"{name}.jsonl"), source)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), output._fd))
            with pytest.raises(
                BatchFileError, match="may lack results that were written last: Input/output error; check"
            ):
                output.close()
        if name == "close":
            os.close(output._fd)


def failing(real, number):
    def call(fd):
        if fd == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    return call


def test_an_input_that_cannot_be_read_to_its_end_is_named(tmp_path, source, tokenizer, monkeypatch):
    with open_input(source) as file:
        monkeypatch.setattr(file, "_reader", BrokenReader())
        with pytest.raises(BatchFileError, match=re.escape(f"input {source!r} cannot be read: Stale file handle; the")):
            list(read_lines(file))
        monkeypatch.undo()


class BrokenReader:
    def readline(self, size):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_an_error_without_words_of_the_system_has_words():
    assert reason(OSError("no seek")) == "no seek"
    assert reason(OSError()) == "OSError"


def test_a_line_that_never_ends_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(batch_lines, "MAX_UNENDED_BYTES", 5000)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 4000 + b"\n" + b"y" * 6000)
    with (
        open_input(str(path)) as file,
        pytest.raises(BatchFileError, match=r"^line 2 of the input has not ended after"),
    ):
        list(read_lines(file))
