"""Batches whose input or output is a pipe, a standard stream or a device."""

import json
import os
import subprocess
import sys
import threading

import pytest

from jaxserve import batch
from jaxserve.frontend.batch_errors import BatchFileError
from jaxserve.frontend.batch_files import OutputFile, open_input
from jaxserve.frontend.offline import TokenBar
from tests.batch_helpers import environment, line, program, results, run, write
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", [line("a", prompt=[5]), line("b", prompt=[6, 7]), b"{"])


def test_a_pipe_in_and_a_pipe_out(tmp_path, tokenizer):
    reader, writer = os.pipe()
    answers, results_end = os.pipe()
    with open(writer, "wb") as file:
        file.write(b"".join(json.dumps(line(str(index), prompt=f"p{index}")).encode() + b"\n" for index in range(9)))
    serve(f"/dev/fd/{reader}", f"/dev/fd/{results_end}", tokenizer)
    os.close(reader)
    os.close(results_end)
    with open(answers, "rb") as file:
        assert {json.loads(item)["custom_id"] for item in file} == set("012345678")


def serve(source, target, tokenizer, engine=None):
    job = batch.BatchRun(engine or RuleEngine(), tokenizer, "fake", seed=0)
    output = OutputFile(target, source)
    with open_input(source) as file:
        job.run(file, output, TokenBar(None, enabled=False))
    output.close()
    return job.summary


def test_a_pipe_that_pauses_does_not_hold_what_is_under_way(tmp_path, tokenizer):
    """The writer sends its second line only after the first one's answer: waiting for it would be for ever."""
    path, target = str(tmp_path / "pipe"), tmp_path / "out.jsonl"
    os.mkfifo(path)
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(serve(path, str(target), tokenizer)), daemon=True)
    thread.start()
    with open(path, "wb", buffering=0) as pipe:
        for count, name in enumerate(("a", "b"), 1):
            data = json.dumps(line(name, prompt=name)).encode() + b"\n"
            pipe.write(data[:20])
            pipe.write(data[20:])
            for _ in range(3000):
                if target.exists() and target.read_bytes().count(b"\n") == count:
                    break
                threading.Event().wait(0.01)
            else:
                pytest.fail(f"line {count} was not answered")
    thread.join(30)
    assert summaries[0].completed == 2


def test_a_pipe_without_reader_ends_the_run_by_name(tmp_path, source, tokenizer):
    reader, writer = os.pipe()
    output = OutputFile(f"/dev/fd/{writer}", source)
    os.close(reader)
    job = batch.BatchRun(RuleEngine(), tokenizer, "fake", seed=0)
    with open_input(source) as file, pytest.raises(BatchFileError, match="Broken pipe; its reader has gone"):
        job.run(file, output, TokenBar(None, enabled=False))
    output.close()
    os.close(writer)


def test_a_pipe_is_not_its_own_answer(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    with pytest.raises(BatchFileError, match=r"is the input; give another name$"):
        OutputFile(path, path)


def test_a_pipe_as_input_resumes_a_file(tmp_path, tokenizer):
    run(tmp_path, [line("a", prompt="x"), line("b", prompt="y")], tokenizer)
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write((tmp_path / "in.jsonl").read_bytes() + json.dumps(line("new", prompt="z")).encode())
    summary = serve(f"/dev/fd/{reader}", str(tmp_path / "out.jsonl"), tokenizer)
    os.close(reader)
    assert (summary.completed, summary.resumed) == (1, 2)


def test_the_null_device_takes_results(tokenizer, source):
    assert serve(source, os.devnull, tokenizer).completed == 2


# ---- the command as a program ----------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path):
    """Runs a line of a shell in which $BATCH is the command, over an engine of the rule."""

    def run_shell(text):
        names = {"BATCH": f"{sys.executable} {program(tmp_path)}"}
        return subprocess.run(
            ["bash", "-c", text], env=environment() | names, cwd=tmp_path, capture_output=True, text=True, timeout=100
        )

    return run_shell


def test_from_standard_input_to_standard_output(shell, source):
    done = shell("cat in.jsonl | $BATCH --input - --output - | cat")
    assert [json.loads(item)["custom_id"] for item in done.stdout.splitlines()] == ["malformed-line-3", "a", "b"]
    assert "jaxserve.batch: 3 lines: 2 completed, 1 errors, 0 done before" in done.stderr


def test_standard_output_that_is_a_file_is_resumed(shell, source, tmp_path):
    done = shell(
        "$BATCH --input in.jsonl --output /dev/stdout >> out.jsonl; head -c 500 out.jsonl > torn.jsonl; "
        "$BATCH --input in.jsonl --output - >> torn.jsonl"
    )
    assert len(results(tmp_path / "out.jsonl")) == len(results(tmp_path / "torn.jsonl")) == 3
    assert (
        "2 completed, 0 errors, 1 done before" in done.stderr or "1 completed, 0 errors, 2 done before" in done.stderr
    )


def test_closed_standard_streams_do_not_become_the_files(shell, source, tmp_path):
    done = shell(
        "$BATCH --input in.jsonl --output out.jsonl <&- >&- 2>&-; echo code $?; "
        "$BATCH --input - --output other.jsonl <&-; echo code $?"
    )
    assert done.stdout.split() == ["code", "0", "code", "1"]
    assert len(results(tmp_path / "out.jsonl")) == 3
    assert done.stderr == "jaxserve.batch: input '-' is closed; give a file\n"
    assert not (tmp_path / "other.jsonl").exists()


def test_what_nobody_can_read_stops_no_run(shell, source, tmp_path):
    done = shell(
        "$BATCH --input in.jsonl --output out.jsonl 2> /dev/full; echo code $?; "
        "$BATCH --input in.jsonl --output again.jsonl > /dev/full; echo code $?"
    )
    assert done.stdout.endswith("code 0\ncode 1\n")
    assert "standard output cannot be written: No space left on device" in done.stderr
    assert len(results(tmp_path / "again.jsonl")) == len(results(tmp_path / "out.jsonl")) == 3
