"""Writes batch inputs, runs them over a fake engine and reads the outputs."""

import json
import os
import pathlib
import re
import textwrap

from jaxserve import batch
from jaxserve.frontend.batch_files import OutputFile, open_input
from jaxserve.frontend.offline import TokenBar
from tests.frontend.fakes import RuleEngine


def line(custom_id, url="/v1/completions", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path, lines):
    """Writes lines: bytes as they are, everything else as JSON."""
    with open(path, "wb") as file:
        for item in lines:
            file.write((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n")
    return str(path)


def results(path):
    """The output's lines by custom_id, each with OpenAI's four fields alone; no custom_id occurs twice."""
    with open(path, "rb") as file:
        data = file.read()
    assert data.endswith(b"\n") or not data
    lines = [json.loads(item) for item in data.splitlines()]
    assert all(re.fullmatch(r"[0-9a-f]{32}\.[0-9a-f]{8}", item.pop("request_digest")) for item in lines)
    assert all(set(item) == {"id", "custom_id", "response", "error"} for item in lines)
    assert len({item["custom_id"] for item in lines}) == len({item["id"] for item in lines}) == len(lines)
    return {item["custom_id"]: item for item in lines}


def run(tmp_path, lines=None, tokenizer=None, engine=None):
    """Runs a batch in this process; returns (summary, results)."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if lines is not None:
        write(source, lines)
    job = batch.BatchRun(engine or RuleEngine(), tokenizer, "fake", seed=0)
    output = OutputFile(str(target), str(source))
    try:
        with open_input(str(source)) as file:
            job.run(file, output, TokenBar(None, enabled=False))
    finally:
        output.close()
    return job.summary, results(target)


def chat(custom_id, messages, **body):
    return line(custom_id, "/v1/chat/completions", messages=messages, **body)


def environment():
    """Variables for a process of its own that imports this tree."""
    return os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}


def program(folder, on_step="lambda step: None", setup=""):
    """Writes a program that is the command over an engine of the rule, without a tokenizer; returns its path.

    on_step: source of a function of the step's number. setup: a statement before it. Neither jax nor transformers is
    imported, which take seconds.
    """
    text = f"""
        import signal, sys, time, types
        from tests.frontend.fakes import RuleEngine

        {setup}
        engine = RuleEngine(on_step={on_step}, max_num_seqs=8)
        sys.modules["jaxserve.engine.inline"] = types.SimpleNamespace(InlineEngine=lambda config, progress: engine)

        from jaxserve import batch

        sys.exit(batch.main([*sys.argv[1:], "--gin.EngineConfig.skip_tokenizer_init=True"]))
    """
    path = pathlib.Path(folder) / "program.py"
    path.write_text(textwrap.dedent(text))
    return str(path)
