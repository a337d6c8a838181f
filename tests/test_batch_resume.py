"""What a second run does with the results of the first; orderly stops."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxserve import batch
from jaxserve.frontend import offline
from tests.batch_helpers import environment, line, program, results, run, write
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


class Command:
    """Runs main() in this process with an engine of the rule."""

    def __init__(self, folder, monkeypatch, capsys, tokenizer):
        self.folder, self.engine, self._capsys = folder, RuleEngine(), capsys
        monkeypatch.setattr(batch, "InlineEngine", self._start)
        monkeypatch.setattr(batch, "load_tokenizer", lambda config: tokenizer)
        self.started = 0

    def _start(self, config, progress):
        self.started += 1
        self.engine.closed = False
        return self.engine

    def __call__(self, lines, *arguments, output="out.jsonl"):
        """Returns the exit code and what was written to standard error, without the settings."""
        self.started = 0
        self.engine.requests.clear()
        source = write(self.folder / "in.jsonl", lines)
        code = batch.main(["--input", source, "--output", str(self.folder / output), *arguments])
        said = [item for item in self._capsys.readouterr().err.splitlines() if "config: " not in item]
        return code, "\n".join(said)

    @property
    def output(self):
        return self.folder / "out.jsonl"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, tokenizer):
    return Command(tmp_path, monkeypatch, capsys, tokenizer)


FIRST = [line(name, prompt=name, temperature=0.5, stop=["x", "y"]) for name in "abc"]

# ---- requests that have changed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        line("b", prompt="B", temperature=0.5, stop=["x", "y"]),
        line("b", prompt="b", temperature=0.25, stop=["x", "y"]),
        line("b", prompt="b", temperature=0.5, stop=["y", "x"]),
        line("b", prompt="b", temperature=0.5, stop=["x", "y"], user="other"),
        line("b", "/v1/chat/completions", prompt="b", temperature=0.5, stop=["x", "y"]),
        line("b", prompt="b", temperature=0.5, stop=["x", "y"]) | {"method": "GET"},
        b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": 1}',
    ],
)
def test_fault_36_a_request_that_changed_under_its_custom_id_is_refused_by_name(command, changed):
    assert command(FIRST)[0] == 0
    before = command.output.read_bytes()
    place = [json.loads(item)["custom_id"] for item in before.splitlines()].index("b") + 1
    code, said = command([FIRST[0], changed, FIRST[2], line("new", prompt="z")])
    assert code == 1
    assert said == (
        f"jaxserve.batch: line 2 of the input, custom_id 'b', is not what it was when line {place} of output "
        f"{str(command.output)!r} answered it; give the line another custom_id, give another --output, or remove its "
        "line from the output to have it computed again"
    )
    assert command.output.read_bytes() == before
    assert command.started == 0  # before the model is loaded
    command.output.write_bytes(b"".join(item for item in before.splitlines(True) if b'"custom_id": "b"' not in item))
    assert command([FIRST[0], changed, FIRST[2]])[0] == 0  # the remedy
    assert set(results(command.output)) == set("abc")


def test_all_changes_are_counted(command):
    command(FIRST)
    code, said = command([line(name, prompt=name) for name in "abc"])
    assert code == 1
    assert "custom_id 'a', is not what it was" in said
    assert "answered it (2 more have changed too); " in said


def test_a_changed_error_line_is_refused_too(command):
    command([b"{", line("b", prompt="")])
    assert "custom_id 'b', is not what it was" in command([b"{", line("b", prompt="x")])[1]
    assert "custom_id 'malformed-line-1', is not" in command([b"{{", line("b", prompt="")])[1]


@pytest.mark.parametrize(
    "same",
    [
        b'{"body":{"stop":["x","y"],"temperature":0.5,"prompt":"b"},"url":"/v1/completions","method":"POST","custom_id":"b"}',
        rb'  {"custom_id": "\u0062", "method": "POST", "url": "\/v1\/completions", "body": {"prompt": "\u0062", '
        b'"temperature": 0.50, "stop": ["x", "y"], "seed": null, "user": null}, "more": null} \r',
    ],
)
def test_layout_order_and_null_are_no_change(command, same):
    command(FIRST)
    code, said = command([FIRST[2], same, FIRST[0]])
    assert (code, command.engine.requests) == (0, [])
    assert "3 results are in the output already" in said


def test_a_pipe_finds_changes_as_it_comes(tmp_path, tokenizer):
    run(tmp_path, FIRST, tokenizer)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(batch.BatchFileError, match="line 1 of the input, custom_id 'c', is not what it was"):
        run(tmp_path, [line("c", prompt="other")], tokenizer)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_the_output_of_another_batch_is_refused(command):
    command(FIRST)
    before = command.output.read_bytes()
    code, said = command([line(name, prompt=name) for name in "xyz"])
    assert code == 1
    assert "belongs to another batch: it holds 3 results, and the input has none of their custom_ids" in said
    assert command.output.read_bytes() == before


def test_lines_that_came_and_went_are_told(command):
    command(FIRST)
    code, said = command([line("new", prompt="n"), FIRST[1]])
    assert code == 0
    assert "2 results in the output belong to no line of the input; they stay" in said
    assert [json.loads(item)["custom_id"] for item in command.output.read_bytes().splitlines()][3:] == ["new"]


def test_results_of_a_version_without_digests_are_told(command):
    command(FIRST)
    lines = [json.loads(item) for item in command.output.read_bytes().splitlines()]
    write(command.output, [{name: item[name] for name in ("id", "custom_id", "response", "error")} for item in lines])
    code, said = command([*FIRST[:2], line("c", prompt="changed"), line("new", prompt="n")])
    assert code == 0
    assert "3 results in the output are of a version that kept no digest of the request" in said
    assert len(command.engine.requests) == 1


@pytest.mark.parametrize(
    "setting", ["EngineConfig.seed=7", "ServerConfig.served_model_name=x", "EngineConfig.dtype=bfloat16"]
)
def test_results_of_other_settings_are_told(command, setting):
    command(FIRST)
    code, said = command(FIRST, f"--gin.{setting}")
    assert code == 0
    assert "3 results in the output were computed with another model, tokenizer, dtype, context or seed" in said
    assert "another model" not in command(FIRST)[1]
    assert "another model" not in command(FIRST, "--gin.SchedulerConfig.max_num_seqs=3")[1]


# ---- the disk -----------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_what_is_done(command, monkeypatch):
    lines = [line(f"{index}", prompt=f"{index}") for index in range(20)]
    real, left = os.write, [9]

    def full(fd, data):
        if data[:5] == b'{"id"':
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        code, said = command(lines)
    assert code == 1
    assert said.splitlines()[-1] == (
        f"jaxserve.batch: output {str(command.output)!r} cannot be written: No space left on device; free space on its "
        "file system; 9 of 20 lines are done; the same command resumes it"
    )
    assert command(lines)[0] == 0
    assert len(results(command.output)) == 20


def test_a_composition_that_cannot_be_written_is_named(command, monkeypatch):
    def close():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command.engine, "close", close)
    code, said = command(FIRST, "--composition", "plots")
    assert code == 1
    assert (
        "composition in 'plots' cannot be written: No space left on device; free space on its file system; the" in said
    )
    assert len(results(command.output)) == 3


def test_a_composition_that_cannot_begin_is_named_first(command, monkeypatch):
    monkeypatch.chdir(command.folder)
    for directory, words in (
        ("in.jsonl", "composition directory 'in.jsonl' cannot be made: File exists"),
        (
            "in.jsonl/plots",
            "composition directory 'in.jsonl/plots' cannot be made: Not a directory; a part of its path",
        ),
    ):
        code, said = command(FIRST, "--composition", directory)
        assert (code, command.started) == (1, 0)
        assert words in said
    code, said = command(FIRST, "--composition", "plots", output="plots/composition.json")
    assert (code, command.started) == (1, 0)
    assert "composition in 'plots' would replace" in said


@pytest.mark.parametrize("loss", ["removed while it was written", "cut by another program"])
def test_results_that_another_program_took_away_are_missed(command, loss):
    def lose(step):
        if command.output.exists() and command.output.read_bytes().count(b"\n") == 2:
            command.output.unlink() if "removed" in loss else os.truncate(command.output, 0)

    command.engine._on_step = lose
    code, said = command([line(f"{index}", prompt=f"{index}") for index in range(4)])
    assert code == 1
    assert f"output {str(command.output)!r} was {loss}; the same command computes" in said


def test_a_bar_that_cannot_be_shown_stops_nothing(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            self.write("")

    monkeypatch.setattr(sys, "stderr", Full())
    bar = offline.TokenBar(3)
    bar.add_tokens(1)
    bar.add_request()
    bar.close()


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_says_what_is_done_and_how_to_go_on(command, number):
    lines = [line(f"{index}", prompt=f"{index}") for index in range(20)]
    handler = signal.getsignal(number)

    def stop(step):
        if len(command.output.read_bytes().splitlines()) >= 5:
            signal.raise_signal(number)

    command.engine._on_step = stop
    code, said = command(lines)
    before = results(command.output)
    assert code == 128 + number
    assert said.splitlines()[-1] == (
        f"jaxserve.batch: interrupted by {number.name}; {len(before)} of 20 lines are done; the same command resumes it"
    )
    assert 5 <= len(before) < 20
    assert not command.engine._live
    assert signal.getsignal(number) is handler
    command.engine._on_step = None
    assert command(lines)[0] == 0
    assert len(results(command.output)) == 20


def test_a_signal_whose_exception_is_lost_still_stops_the_run(command, monkeypatch):
    class Careless:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def stop(step):
        Careless()  # what is raised here is reported and dropped by the interpreter

    command.engine._on_step = stop
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    code, said = command(FIRST)
    assert code == 143
    assert "interrupted by SIGTERM; 0 of 3 lines are done" in said


def test_a_second_signal_ends_a_run_that_hangs(tmp_path):
    """The main thread is in a native call that no signal interrupts."""
    write(tmp_path / "in.jsonl", [line("a", prompt=[5])])
    hang = "lambda step: (print('at work', flush=True), [libc.pthread_mutex_lock(lock) for _ in range(2)])"
    setup = "import ctypes; libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)"
    path = program(tmp_path, hang, setup)
    process = subprocess.Popen(
        [sys.executable, path, "--input", "in.jsonl", "--output", "out.jsonl"],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"at work\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.search(rb"jaxserve\.batch: ended at once by a second signal; the same command resumes it\n$", err)
