"""Offline batches over an engine whose answers are the prompts themselves; with the real one in test_batch_model.py."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jaxserve import batch
from jaxserve.frontend.batch_errors import BatchFileError
from jaxserve.frontend.batch_files import OutputFile
from jaxserve.frontend.batch_lines import parse_line
from jaxserve.frontend.delta import EngineDeadError
from jaxserve.frontend.tokenizer import Tokenizer
from tests.batch_helpers import chat, line, results, run, write
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import byte_level, load, save


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


# ---- results ---------------------------------------------------------------------------------------------------------


def test_a_completion(tmp_path, tokenizer):
    summary, out = run(tmp_path, [line("a", prompt="hi 🍏", temperature=0, model="fake")], tokenizer)
    result = out["a"]
    assert (result["id"], result["error"]) == ("batch_req_1", None)
    assert result["response"]["status_code"] == 200
    body = result["response"]["body"]
    assert body["object"] == "text_completion"
    assert (body["id"], body["model"]) == ("cmpl-1", "fake")
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, "hi 🍏", "stop")
    assert choice["token_ids"] == [*tokenizer.encode("hi 🍏", add_special_tokens=False), 2]
    assert body["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 8,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert str(summary) == "1 lines: 1 completed, 0 errors, 0 done before"


def test_every_parameter_reaches_the_engine(tmp_path, tokenizer):
    params = {"temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": 9, "min_tokens": 2}
    engine = RuleEngine()
    body = {"prompt": [5, 6], **params, "max_tokens": 4, "stop_token_ids": [7], "ignore_eos": True, "stop": None}
    run(tmp_path, [line("a", **body)], tokenizer, engine)
    (request,) = engine.requests
    assert {name: getattr(request, name) for name in params} == params
    assert (request.prompt_token_ids, request.max_tokens, request.stop_token_ids) == ((5, 6), 4, (7,))


def test_whose_a_line_is_and_how_urgent_reaches_the_engine(tmp_path, tokenizer):
    engine, deadline = RuleEngine(), time.time() + 1000
    run(tmp_path, [line("a", prompt=[5], tenant="x", priority=-3, deadline=deadline)], tokenizer, engine)
    (request,) = engine.requests
    assert (request.options.tenant, request.options.priority, request.options.deadline) == ("x", -3, deadline)


def test_faulty_owners_and_late_lines_are_error_lines(tmp_path, tokenizer):
    lines = [
        line("priority", prompt=[5], priority="high"),
        line("tenant", prompt=[5], tenant=7),
        line("deadline", prompt=[5], deadline="soon"),
        line("truth", prompt=[5], deadline=True),
        line("late", prompt=[5], deadline=time.time() - 60),
        line("good", prompt=[5], deadline=time.time() + 60),
    ]
    summary, out = run(tmp_path, lines, tokenizer)
    assert (summary.completed, summary.errors) == (1, 5)
    errors = {key: value["error"] for key, value in out.items() if value["error"]}
    assert errors["priority"]["message"].startswith("line 1: priority is 'high'; it must be a whole number from")
    assert errors["tenant"]["message"] == "line 2: tenant is 7; it must be text"
    assert errors["deadline"]["message"] == "line 3: deadline is 'soon'; it must be a finite number of seconds"
    assert errors["truth"]["message"] == "line 4: deadline is True; it must be a finite number of seconds"
    assert errors["late"]["code"] == "deadline_exceeded"
    assert "before the request arrived" in errors["late"]["message"]


def test_token_ids_and_stop_strings(tmp_path, tokenizer):
    lines = [
        line("ids", prompt=[5, 6]),
        line("stop", prompt="one two", stop=" "),
        line("stops", prompt="ab", stop=["b"]),
    ]
    _, out = run(tmp_path, lines, tokenizer)
    choices = {key: value["response"]["body"]["choices"][0] for key, value in out.items()}
    assert choices["ids"]["token_ids"] == [5, 6, 2]
    assert (choices["stop"]["text"], choices["stop"]["finish_reason"]) == ("one", "stop")
    assert choices["stops"]["text"] == "a"


def test_fields_that_ask_for_nothing_are_taken(tmp_path, tokenizer):
    body = {"n": 1, "stream": False, "echo": False, "logprobs": None, "presence_penalty": 0.0, "best_of": 1}
    summary, _ = run(tmp_path, [line("a", prompt="hi", **body)], tokenizer)
    assert summary.completed == 1


def test_samples_are_choices(tmp_path, tokenizer):
    lines = [line("a", prompt="abc", n=3), line("b", prompt="xyz", n=2, max_tokens=2)]
    summary, out = run(tmp_path, [*lines, line("c", prompt=[0, 5], n=2), line("d", prompt="a", n=129)], tokenizer)
    assert (summary.completed, summary.errors) == (2, 2)
    body = out["a"]["response"]["body"]
    found = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert found == [(0, "abc"), (1, "bc"), (2, "c")]
    assert body["usage"]["completion_tokens"] == 4 + 3 + 2
    assert body["usage"]["prompt_tokens"] == len(tokenizer.encode("abc"))
    assert len(out["b"]["response"]["body"]["choices"]) == 2
    assert out["c"]["error"]["message"] == "line 3: logits are not finite"
    assert "n is 129; at most 128 samples" in out["d"]["error"]["message"]


def test_seeds_depend_on_the_configuration_and_the_custom_id_alone(tmp_path, tokenizer):
    seeds = []
    for index, names in enumerate(("abc", "cb")):
        engine = RuleEngine()
        folder = tmp_path / str(index)
        folder.mkdir()
        run(folder, [line(name, prompt=name) for name in names], tokenizer, engine)
        seeds.append({tokenizer.decode(request.prompt_token_ids): request.seed for request in engine.requests})
    assert len(set(seeds[0].values())) == 3
    assert all(seeds[0][name] == seed for name, seed in seeds[1].items())


def test_blank_lines_line_endings_and_a_byte_order_mark(tmp_path, tokenizer):
    first = b"\xef\xbb\xbf" + json.dumps(line("a", prompt="x")).encode() + b"\r"
    summary, out = run(tmp_path, [first, b"", b"  ", line("b", prompt="y")], tokenizer)
    assert set(out) == {"a", "b"}
    assert summary.completed == 2


def test_a_last_line_without_newline(tmp_path, tokenizer):
    (tmp_path / "in.jsonl").write_text(json.dumps(line("a", prompt="x")))
    assert run(tmp_path, None, tokenizer)[0].completed == 1


def test_only_a_window_of_the_input_is_under_way(tmp_path, tokenizer):
    engine = RuleEngine()
    summary, _ = run(tmp_path, [line(f"id {index}", prompt=f"p{index}") for index in range(100)], tokenizer, engine)
    assert summary.completed == 100
    assert engine.max_unfinished <= 2 * engine.ready.max_num_seqs


def test_another_model_is_mentioned(tmp_path, tokenizer, capsys):
    run(tmp_path, [line(name, prompt="x", model="gpt") for name in "ab"], tokenizer)
    assert capsys.readouterr().err == ("jaxserve.batch: line 1 asks for model 'gpt'; this run serves 'fake'\n")


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_chat_without_a_template_is_an_error_line(tmp_path, tokenizer):
    _, out = run(tmp_path, [chat("a", [{"role": "user", "content": "hi"}])], tokenizer)
    assert out["a"]["error"] == {
        "code": "invalid_request",
        "message": "line 1: messages cannot be used: the tokenizer has no chat template; send a prompt instead",
    }


def test_chat(tmp_path):
    pytest.importorskip("jinja2")
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    tokenizer = load(tmp_path / "tokenizer", chat_template=template)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    _, out = run(tmp_path, [chat("a", messages, max_completion_tokens=100)], tokenizer)
    body = out["a"]["response"]["body"]
    assert (body["id"], body["object"]) == ("chatcmpl-1", "chat.completion")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "system=s;user=u;"}


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_computed_again(tmp_path, tokenizer):
    lines = [line(name, prompt=name) for name in "abc"]
    run(tmp_path, lines, tokenizer)
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    torn_key = json.loads(whole.splitlines()[-1])["custom_id"]
    path.write_bytes(whole[:-10])
    engine = RuleEngine()
    summary, out = run(tmp_path, lines, tokenizer, engine)
    assert [tokenizer.decode(request.prompt_token_ids) for request in engine.requests] == [torn_key]
    assert set(out) == set("abc")
    assert (summary.completed, summary.resumed) == (1, 2)


def test_an_engine_that_fails_leaves_what_was_done(tmp_path, tokenizer):
    lines = [line(f"{index}", prompt=f"{index}") for index in range(20)] + [b"{"]
    engine = RuleEngine()

    def die(step):
        engine.dead = "out of memory" if step == 12 else ""

    engine._on_step = die
    with pytest.raises(EngineDeadError, match=r"^the engine has ended: out of memory$"):
        run(tmp_path, lines, tokenizer, engine)
    before = results(tmp_path / "out.jsonl")
    assert 0 < len(before) < 20
    assert all(result["error"] is None for result in before.values())
    summary, out = run(tmp_path, lines, tokenizer)
    assert len(out) == 21
    assert all(out[key] == result for key, result in before.items())
    assert summary.resumed == len(before)


MALFORMED = [b"{", line(3, prompt="x"), line("b", "/v2"), line("c", prompt=""), line("0", prompt="again")]


def test_a_run_killed_half_way_is_resumed(tmp_path, tokenizer):
    """300 lines, 5 of them malformed, SIGKILL half way; the engine is slowed so that the kill finds it at work."""
    save(tmp_path / "tokenizer", byte_level())
    lines = [line(str(index), prompt=f"prompt {index}") for index in range(295)]
    for index, bad in enumerate(MALFORMED):
        lines.insert(10 + 60 * index, bad)
    source, target = write(tmp_path / "in.jsonl", lines), str(tmp_path / "out.jsonl")
    program = textwrap.dedent(
        f"""
        import time
        from jaxserve import batch
        from jaxserve.frontend.tokenizer import Tokenizer
        from tests.frontend.fakes import RuleEngine

        engine = RuleEngine(on_step=lambda step: time.sleep(0.002), max_num_seqs=8)
        run = batch.BatchRun(engine, Tokenizer({str(tmp_path / "tokenizer")!r}), "fake", 0)
        output = batch.OutputFile({target!r}, {source!r})
        with batch.open_input({source!r}) as file:
            run.run(file, output, batch.TokenBar(300, enabled=False))
        """
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with process.stderr:
        while process.poll() is None and (not os.path.exists(target) or _line_count(target) < 150):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    before = _line_count(target)
    assert 150 <= before < 300
    summary, out = run(tmp_path, None, tokenizer)
    assert len(out) == 300
    assert sum(result["error"] is not None for result in out.values()) == 5
    assert summary.resumed == before
    assert summary.completed + summary.errors == 300 - before
    for index in range(295):
        assert out[str(index)]["response"]["body"]["choices"][0]["text"] == f"prompt {index}"


def _line_count(path):
    with open(path, "rb") as file:
        return file.read().count(b"\n")


# ---- files that cannot be used ---------------------------------------------------------------------------------------


ENOENT = "check its name and that its directory exists"


def assert_refused(message, path, source):
    with pytest.raises(BatchFileError, match=f"^{re.escape(message)}$"):
        OutputFile(str(path), str(source))


def test_output_files_that_cannot_be_used(tmp_path):
    source = write(tmp_path / "in.jsonl", [line("a", prompt="x")])
    assert_refused(f"output {source!r} is the input; give another name", source, source)
    missing = str(tmp_path / "no" / "out.jsonl")
    assert_refused(f"output {missing!r} cannot be written: No such file or directory; {ENOENT}", missing, source)
    target = tmp_path / "out.jsonl"
    first = OutputFile(str(target), source)
    assert_refused(f"output {str(target)!r} is being written by another run", target, source)
    first.close()
    OutputFile(str(target), source).close()


def test_parse_line_gives_what_the_line_says():
    parsed = parse_line(3, line("a", prompt="x"))
    assert (parsed.number, parsed.custom_id, parsed.url, parsed.body) == (3, "a", "/v1/completions", {"prompt": "x"})


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs main() with an engine of the rule and a tokenizer of this folder; returns its exit code."""
    save(tmp_path / "model", byte_level())
    engine = RuleEngine()
    monkeypatch.setattr(batch, "InlineEngine", lambda config, progress: engine)
    monkeypatch.setattr(batch, "load_tokenizer", lambda config: Tokenizer(tmp_path / "model"))

    def run_main(*arguments, source=str(tmp_path / "in.jsonl")):
        return batch.main(["--input", source, "--output", str(tmp_path / "out.jsonl"), *arguments])

    run_main.engine = engine
    return run_main


def test_the_command(tmp_path, command, capsys):
    write(tmp_path / "in.jsonl", [line("a", prompt="abc"), b"{"])
    assert command("--config", "tiny.gin", "--gin.ServerConfig.served_model_name=mine") == 0
    shown = capsys.readouterr()
    pattern = r"jaxserve\.batch: 2 lines: 1 completed, 1 errors, 0 done before; in \d+ tok/s, out \d+ tok/s\n"
    assert re.fullmatch(pattern, shown.out)
    assert re.search(r"Generating: 100%.*2/2 .*tok/s", shown.err)
    assert results(tmp_path / "out.jsonl")["a"]["response"]["body"]["model"] == "mine"
    assert command.engine.closed
    command.engine.closed = False
    assert command() == 0
    shown = capsys.readouterr()
    assert "jaxserve.batch: 2 lines: 0 completed, 0 errors, 2 done before" in shown.out
    assert "jaxserve.batch: resuming: 2 results are in the output already\n" in shown.err


def test_the_command_says_in_one_line_why_it_cannot_begin(tmp_path, command, capsys):
    missing = str(tmp_path / "no.jsonl")
    assert command(source=missing) == 1
    assert (
        capsys.readouterr().err
        == f"jaxserve.batch: input {missing!r} cannot be read: No such file or directory; {ENOENT}\n"
    )
    write(tmp_path / "in.jsonl", [line("a", prompt="abc")])
    with pytest.raises(SystemExit) as caught:
        command("--gin.SchedulerConfig.max_seqs=3")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "jaxserve.batch: --gin.SchedulerConfig.max_seqs=3: SchedulerConfig has no"
    )


def test_a_missing_tokenizer_is_one_line(tmp_path, command, capsys, monkeypatch):
    write(tmp_path / "in.jsonl", [line("a", prompt="abc")])
    monkeypatch.setattr(batch, "load_tokenizer", lambda config: Tokenizer(tmp_path / "no"))
    assert command() == 1
    where = str(tmp_path / "no")
    said = f"jaxserve.batch: tokenizer directory {where!r} does not exist; set EngineConfig.tokenizer\n"
    assert capsys.readouterr().err == said


def test_the_command_when_the_engine_fails(tmp_path, command, capsys):
    write(tmp_path / "in.jsonl", [line("a", prompt="abc")])
    command.engine.dead = "out of memory"
    assert command() == 1
    assert capsys.readouterr().err.endswith(
        "jaxserve.batch: the engine has ended: out of memory; 0 of 1 lines are done; the same command resumes it\n"
    )


INTERRUPTED = "jaxserve.batch: interrupted by SIGINT; 0 of 1 lines are done; the same command resumes it\n"


def test_the_command_when_interrupted(tmp_path, command, capsys):
    def interrupt(step):
        raise KeyboardInterrupt

    write(tmp_path / "in.jsonl", [line("a", prompt="abc")])
    command.engine._on_step = interrupt
    assert command() == 130
    assert capsys.readouterr().err.endswith(INTERRUPTED)
