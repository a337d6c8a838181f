"""Offline batches: `python -m jaxserve.batch --config tiny.gin --input in.jsonl --output out.jsonl`.

The input holds OpenAI batch lines (custom_id, method, url, body); the output gets one line for each, as requests
finish. A body may also say tenant, priority (higher is more urgent) and deadline (Unix seconds; a line whose deadline
passes becomes an error line). A line that cannot be served becomes an error line and stops nothing. A run that was
stopped, by a kill too, is resumed by the same command: lines whose result is in the output already are not computed
again. Requests without a seed draw one from the configuration's seed and their custom_id, so a resumed run gives what
an unbroken one would.

Exit codes: 0 the input was processed, error lines or not; 1 the run could not begin, or the engine failed; 2 a faulty
command line or configuration; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from jaxserve import gin_config
from jaxserve.config import ServerConfig
from jaxserve.engine.channel import EngineClient
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.batch_files import (
    MALFORMED_PREFIX,
    BatchLine,
    Keys,
    LineError,
    OutputFile,
    count_lines,
    open_input,
    parse_line,
    read_lines,
)
from jaxserve.frontend.delta import EngineDeadError
from jaxserve.frontend.frontend import FrontEnd, Prepared
from jaxserve.frontend.offline import Completion, TokenBar, run_all
from jaxserve.frontend.openai import parse_body, response_body
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.request import FinishReason

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclasses.dataclass
class Summary:
    """Lines of the input by what became of them. resumed: their results were in the output before."""

    completed: int = 0
    errors: int = 0
    resumed: int = 0

    def __str__(self) -> str:
        total = self.completed + self.errors + self.resumed
        return f"{total} lines: {self.completed} completed, {self.errors} errors, {self.resumed} done before"


class BatchRun:
    """One pass over an input file.

    model: the name in responses. seed: base of the seeds of requests that bring none.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer | None, model: str, seed: int):
        self._client = client
        self._front_end = FrontEnd(client, tokenizer, seed=seed)
        self._model = model
        self._seed = seed
        self._under_way: dict[str, BatchLine] = {}
        self._other_models: set[str] = set()
        self.summary = Summary()

    def run(self, source: BinaryIO, output: OutputFile, bar: TokenBar) -> None:
        """Serves every line of `source` that is not done. Raises EngineDeadError; what is written stays valid."""
        requests = self._requests(source, output, bar)
        with contextlib.closing(run_all(self._front_end, self._client, requests, bar.add_tokens)) as finished:
            for completion in finished:
                line = self._under_way.pop(completion.request_id)
                if completion.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    late = completion.finish_reason is FinishReason.ABORT
                    code = "deadline_exceeded" if late else "request_failed"
                    self._write_error(output, line.number, line.custom_id, code, completion.error)
                else:
                    output.write(self._result(line, completion))
                    self.summary.completed += 1
                bar.add_request(len(completion.prompt_token_ids))

    def _requests(self, source: BinaryIO, output: OutputFile, bar: TokenBar) -> Iterator[Prepared]:
        """The requests that are still to be computed; writes the error lines on the way."""
        seen = Keys()
        for number, data in read_lines(source):
            line, fault = None, None
            try:
                line = parse_line(number, data)
                key = line.custom_id
            except LineError as error:
                fault, key = error, error.key
            if key is not None and key in seen:
                fault = fault or LineError("duplicate_custom_id", f"custom_id {key!r} was used by an earlier line")
                key = None
            if key is None:
                key = f"{MALFORMED_PREFIX}{number}"
            seen.add(key)
            if key in output.done:
                self.summary.resumed += 1
                continue
            if line is not None and fault is None:
                try:
                    prepared = self._prepare(line)
                except ValueError as error:
                    fault = LineError("invalid_request", str(error))
                else:
                    self._under_way[prepared.request_id] = line
                    yield prepared
                    continue
            assert fault is not None
            self._write_error(output, number, key, fault.code, str(fault))
            bar.add_request()

    def _prepare(self, line: BatchLine) -> Prepared:
        request = parse_body(line.url, line.body, self._front_end.tokenizer)
        params = request.params
        if params.seed is None:
            params = dataclasses.replace(params, seed=_seed_for(self._seed, line.custom_id))
        prepared = self._front_end.prepare(
            request.prompt, params, request_id=f"line-{line.number}", **request.ownership
        )
        if request.model not in (None, self._model) and request.model not in self._other_models:
            if len(self._other_models) < 10:
                _say(f"line {line.number} asks for model {request.model!r}; this run serves {self._model!r}")
            self._other_models.add(request.model)
        return prepared

    def _result(self, line: BatchLine, completion: Completion) -> dict[str, Any]:
        body = response_body(line.url, line.number, self._model, int(time.time()), completion)
        return {
            "id": _result_id(line.number),
            "custom_id": line.custom_id,
            "response": {"status_code": 200, "request_id": completion.request_id, "body": body},
            "error": None,
        }

    def _write_error(self, output: OutputFile, number: int, key: str, code: str, message: str) -> None:
        self.summary.errors += 1
        output.write(
            {
                "id": _result_id(number),
                "custom_id": key,
                "response": None,
                "error": {"code": code, "message": f"line {number}: {message}"},
            }
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a batch from the command line; returns the exit code (see the module)."""
    parser = argparse.ArgumentParser(prog="jaxserve.batch", description="Serves a file of OpenAI batch lines.")
    parser.add_argument("--input", required=True, metavar="FILE", help="batch lines: custom_id, method, url, body")
    parser.add_argument("--output", required=True, metavar="FILE", help="results; an existing file is resumed")
    parser.add_argument("--composition", metavar="DIR", help="write what steps consisted of, as JSON and a plot")
    parsed, config, operative = gin_config.load_from_command_line(parser, arguments)
    if parsed.composition is not None:
        engine = dataclasses.replace(config.engine, composition_dir=parsed.composition)
        config = dataclasses.replace(config, engine=engine)
    try:
        with open_input(parsed.input) as source, contextlib.closing(OutputFile(parsed.output, parsed.input)) as output:
            return _serve(config, operative, source, output)
    except (ValueError, OSError, MemoryError) as error:  # files, checkpoint or tokenizer
        return _fail(str(error))
    except KeyboardInterrupt:
        _say("interrupted; the same command resumes it")
        return EXIT_INTERRUPTED


def _serve(config: ServerConfig, operative: str, source: BinaryIO, output: OutputFile) -> int:
    engine = config.engine
    total = count_lines(source)
    if len(output.done):
        _say(f"resuming: {len(output.done)} results are in the output already")
    tokenizer = load_tokenizer(engine)
    for line in operative.splitlines():
        if line.strip() and not line.startswith("#"):
            _say(f"config: {line.strip()}")
    client = InlineEngine(engine, progress=True)
    name = config.served_model_name or pathlib.Path(engine.model or "dummy").name
    run = BatchRun(client, tokenizer, name, engine.seed)
    bar = TokenBar(total, min(len(output.done), total), unit="line")
    try:
        run.run(source, output, bar)
    except EngineDeadError as error:
        bar.close()
        return _fail(f"{error}; the same command resumes the run. {run.summary}")
    finally:
        bar.close()
        client.close()
    print(f"jaxserve.batch: {run.summary}; {bar.speed}")
    return 0


def _seed_for(seed: int, custom_id: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{custom_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _result_id(number: int) -> str:
    return f"batch_req_{number}"


def _say(text: str) -> None:
    print(f"jaxserve.batch: {text}", file=sys.stderr)


def _fail(text: str) -> int:
    _say(" ".join(text.split()))
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
