"""Runs offline batches: `python -m jaxserve.batch --config tiny.gin --input in.jsonl --output out.jsonl`.

The input holds OpenAI batch lines (custom_id, method, url, body); the output gets one line for each, as requests
finish. A body may also say tenant, priority (higher is more urgent) and deadline (Unix seconds; a line whose deadline
passes becomes an error line). A line that cannot be served becomes an error line and stops nothing. A run that was
stopped, by a kill too, is resumed by the same command: lines whose result is in the output already are not computed
again. A digest of its request stands beside each result, so that a line that has changed since is refused by name.
Requests without a seed draw one from the configuration's seed and their custom_id, so a resumed run gives what
an unbroken one would. Either file may be a pipe, and `-` is standard input or output; a pipe cannot be resumed.

Exit codes: 0 the input was processed, error lines or not; 1 the run could not begin, or the engine, a file or a disk
failed; 2 a faulty command line or configuration; 128 + n stopped by signal n (130 SIGINT, 143 SIGTERM, 129 SIGHUP), at
the second one at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from jaxserve.config import gin_config
from jaxserve.config.changed import changed_settings
from jaxserve.config.logprobs_config import LogprobsConfig
from jaxserve.config.settings import ServerConfig
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.channel import EngineClient
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.batch_errors import BatchFileError, LineError, reason
from jaxserve.frontend.batch_files import InputFile, OutputFile, open_input
from jaxserve.frontend.batch_lines import BatchLine, KeyedLine, count_lines, keyed_lines, read_lines
from jaxserve.frontend.batch_resume import SETTINGS_BYTES, Digest, Resumption
from jaxserve.frontend.chat_format import ReplyPlan
from jaxserve.frontend.delta import EngineDeadError
from jaxserve.frontend.frontend import FrontEnd, Prepared
from jaxserve.frontend.offline import FinishedRequest, TokenBar, run_all
from jaxserve.frontend.openai import CHAT_URL, parse_body
from jaxserve.frontend.openai_logprobs import LogprobShapes
from jaxserve.frontend.openai_replies import ReplyMessage
from jaxserve.frontend.openai_responses import Answer, response_body
from jaxserve.frontend.stop_signals import StopSignals
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.planning.checkpoint_defaults import defaults_line, sampling_defaults
from jaxserve.request import FinishReason

EXIT_FAILED = 1
_FAREWELL = "jaxserve.batch: ended at once by a second signal; the same command resumes it"
_NOT_COMPLETED = frozenset({FinishReason.ERROR, FinishReason.ABORT, FinishReason.DEADLINE})
_MAX_MESSAGE = 1000  # characters of an error line's message: a client's value in it may be of any length


@dataclasses.dataclass
class Summary:
    """Counts the lines of the input by their outcome. resumed: their results were in the output before."""

    completed: int = 0
    errors: int = 0
    resumed: int = 0

    def __str__(self) -> str:
        total = self.completed + self.errors + self.resumed
        return f"{total} lines: {self.completed} completed, {self.errors} errors, {self.resumed} done before"


class BatchRun:
    """Serves one pass over an input file.

    Attributes:
        model: the name in responses.
        seed: base of the seeds of requests that set none.
        settings: everything else that determines the tokens; results keep a digest of it.
        check_stop: called after each step; may raise.
        grammars: bounds the grammars of structured outputs.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        model: str,
        seed: int,
        *,
        settings: str = "",
        check_stop: Callable[[], None] = lambda: None,
        grammars: StructuredOutputsConfig = StructuredOutputsConfig(),
    ):
        self._client = client
        self._front_end = FrontEnd(client, tokenizer, seed=seed, grammars=grammars)
        self._model = model
        self._seed = seed
        self._settings = _settings_digest(model, seed, settings)
        self._check_stop = check_stop
        self._under_way: dict[str, KeyedLine] = {}
        self._plans: dict[str, ReplyPlan] = {}  # of those under way whose replies are parsed
        self._other_models: set[str] = set()
        self.summary = Summary()

    def run(self, source: InputFile, output: OutputFile, bar: TokenBar) -> None:
        """Serves every unfinished line of `source`. Results that were written stay valid, whatever is raised.

        Args:
            source: the input.
            output: takes the results, and holds those of earlier runs.
            bar: shows the progress.

        Raises:
            EngineDeadError: the engine failed.
            BatchFileError: a file cannot be read or written.
            Exception: whatever check_stop raises.
        """
        requests = self._requests(source, output, bar)

        def stepped(tokens: int) -> None:
            bar.add_tokens(tokens)
            self._check_stop()

        with contextlib.closing(run_all(self._front_end, self._client, requests, stepped)) as finished:
            for completion in finished:
                keyed = self._under_way.pop(completion.request_id)
                failed = _NOT_COMPLETED.intersection(sample.finish_reason for sample in completion.samples)
                if failed:
                    self._plans.pop(completion.request_id, None)
                    late = FinishReason.DEADLINE in failed
                    code = "deadline_exceeded" if late else "request_failed"
                    self._write_error(output, keyed, code, completion.error)
                else:
                    output.write(self._result(keyed, completion), self._digest(keyed))
                    self.summary.completed += 1
                bar.add_request(len(completion.prompt_token_ids))
        output.repair()

    def _requests(self, source: InputFile, output: OutputFile, bar: TokenBar) -> Iterator[Prepared | None]:
        """Yields the requests that are still to be computed, and writes error lines on the way.

        Yields None where a pipe has no line at present while requests are running that must not wait for it.
        """
        earlier = Resumption(output.path, output.done, self._settings)
        lines = read_lines(source, lambda: not self._under_way or source.line_is_there())
        for keyed in keyed_lines(lines):
            if keyed is None:
                yield None
                continue
            if earlier.is_done(keyed):
                self.summary.resumed += 1
                continue
            fault = keyed.fault
            if keyed.line is not None:
                try:
                    prepared = self._prepare(keyed.line)
                except ValueError as error:
                    fault = LineError("invalid_request", str(error))
                else:
                    self._under_way[prepared.request_id] = keyed
                    yield prepared
                    continue
            assert fault is not None
            self._write_error(output, keyed, fault.code, str(fault))
            bar.add_request()
            self._check_stop()
        if not source.is_regular:  # of a file they were said before
            for note in earlier.notes():
                _say(note)

    def _prepare(self, line: BatchLine) -> Prepared:
        request = parse_body(line.url, line.body, defaults=self._client.ready.sampling_defaults)
        params = request.params
        if params.seed is None:
            params = dataclasses.replace(params, seed=_seed_for(self._seed, line.custom_id))
        tokenizer = self._front_end.tokenizer
        prompt = request.single_prompt(tokenizer)
        plan = dataclasses.replace(request, params=params).reply_plan(tokenizer, prompt)
        prepared = self._front_end.prepare(
            prompt,
            plan.params,
            request.options,
            request_id=f"line-{line.number}",
            shown_token_ids=plan.shown_token_ids,
        )
        if plan.is_parsed:
            self._plans[prepared.request_id] = plan
        if request.model not in (None, self._model) and request.model not in self._other_models:
            if len(self._other_models) < 10:
                _say(f"line {line.number} asks for model {request.model!r}; this run serves {self._model!r}")
            self._other_models.add(request.model)
        return prepared

    def _digest(self, keyed: KeyedLine) -> Digest:
        return Digest(keyed.digest, self._settings)

    def _result(self, keyed: KeyedLine, completion: FinishedRequest) -> dict[str, Any]:
        assert keyed.line is not None
        body, prompt = keyed.line.body, completion.prompt_logprobs
        shapes = LogprobShapes(
            self._front_end.tokenizer,
            chat=keyed.line.url == CHAT_URL,
            as_ids=bool(body.get("return_tokens_as_token_ids")),
        )
        answers = [
            Answer(
                sample.text,
                sample.finish_reason.value,
                len(completion.prompt_token_ids),
                len(sample.token_ids),
                completion.num_cached_tokens,
                sample.token_ids,
                truncated_tokens=completion.num_truncated_tokens,
                logprobs=None if sample.logprobs is None else shapes.of(sample.logprobs, sample.token_ids),
                prompt_logprobs=None if prompt is None else shapes.of_prompt(prompt),
                index=index,
            )
            for index, sample in enumerate(completion.samples)
        ]
        if (plan := self._plans.pop(completion.request_id, None)) is not None:
            answers = [_parsed(answer, plan) for answer in answers]
        answered = response_body(keyed.line.url, keyed.number, self._model, int(time.time()), answers)
        return {
            "id": _result_id(keyed.number),
            "custom_id": keyed.key,
            "response": {"status_code": 200, "request_id": completion.request_id, "body": answered},
            "error": None,
        }

    def _write_error(self, output: OutputFile, keyed: KeyedLine, code: str, message: str) -> None:
        if len(message) > _MAX_MESSAGE:
            message = f"{message[:_MAX_MESSAGE]}... ({len(message)} characters)"
        output.write(
            {
                "id": _result_id(keyed.number),
                "custom_id": keyed.key,
                "response": None,
                "error": {"code": code, "message": f"line {keyed.number}: {message}"},
            },
            self._digest(keyed),
        )
        self.summary.errors += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a batch from the command line; returns the exit code (see the module)."""
    parser = argparse.ArgumentParser(prog="jaxserve.batch", description="Serves a file of OpenAI batch lines.")
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="batch lines: custom_id, method, url, body; - is standard input"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="results; an existing file is resumed; - is standard output"
    )
    parser.add_argument("--composition", metavar="DIR", help="write what steps consisted of, as JSON and a plot")
    parsed, config, _ = gin_config.load_from_command_line(parser, arguments)
    if parsed.composition is not None:
        engine = dataclasses.replace(config.engine, composition_dir=parsed.composition)
        config = dataclasses.replace(config, engine=engine)
    _fill_standard_streams()
    job = _Job(config)
    try:
        with StopSignals(_FAREWELL) as signals:
            _prepare_composition(config.engine.composition_dir, (parsed.input, parsed.output))
            with open_input(parsed.input) as source:
                output = OutputFile(parsed.output, parsed.input)
                with _closing(output.close):
                    return job.run(source, output, signals.check)
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        _say(f"interrupted by {signal.Signals(number).name}; {job.standing()}")
        return 128 + number
    except EngineDeadError as error:
        return _fail(f"{error}; {job.standing()}")
    except (ValueError, OSError, MemoryError) as error:  # files, checkpoint or tokenizer
        return _fail(f"{error}; {job.standing()}" if job.under_way else str(error))


class _Job:
    """Runs the command once over opened files."""

    def __init__(self, config: ServerConfig):
        self._config = config
        self._total: int | None = None
        self._done_before = 0
        self._resume = "the same command begins it again"
        self._run: BatchRun | None = None
        self.under_way = False

    def run(self, source: InputFile, output: OutputFile, check_stop: Callable[[], None]) -> int:
        """Returns the exit code. Raises the errors that `main` reports as messages."""
        config, engine = self._config, self._config.engine
        self._survey(source, output)
        tokenizer = load_tokenizer(engine)
        for line in changed_settings(config):
            _say(f"config: {line}")
        client = InlineEngine(engine, progress=True)
        if defaults := client.ready.sampling_defaults:
            _say(defaults_line(defaults))
        with _closing(lambda: _close(client, engine.composition_dir)):
            self._run = run = BatchRun(
                client,
                tokenizer,
                _model_name(config),
                engine.seed,
                settings=_settings(config),
                check_stop=check_stop,
                grammars=engine.structured_outputs,
            )
            self.under_way = True
            bar = TokenBar(self._total, self._done_before, unit="line")
            with contextlib.closing(bar):
                run.run(source, output, bar)
            self.under_way = False
            output.close()
            # Where the results go to standard output, nothing else does.
            stream = sys.stderr if output.is_standard or sys.stdout is None else sys.stdout
            said = _print(f"{run.summary}; {bar.speed}", stream)
        return 0 if said else EXIT_FAILED

    def standing(self) -> str:
        """Describes how many lines are done and how to resume."""
        summary = self._run.summary if self._run is not None else Summary()
        done = max(self._done_before, summary.resumed) + summary.completed + summary.errors
        lines = f"{done} lines are done" if self._total is None else f"{done} of {self._total} lines are done"
        return f"{lines}; {self._resume}"

    def _survey(self, source: InputFile, output: OutputFile) -> None:
        """Counts the lines and compares them with the results that are there, before anything is computed."""
        if not output.is_regular:
            self._resume = "the results went into a pipe, which cannot be resumed"
        elif not source.is_regular:
            self._resume = "the same command resumes it when it is given the same input again"
        else:
            self._resume = "the same command resumes it"
        if source.is_regular:
            if len(output.done):
                settings = _settings_digest(
                    _model_name(self._config), self._config.engine.seed, _settings(self._config)
                )
                earlier = Resumption(output.path, output.done, settings)
                earlier.survey(keyed_lines(read_lines(source)))
                self._total, self._done_before = earlier.lines, earlier.matched
                output.notes.extend(earlier.notes())
            else:
                self._total = count_lines(source)
            source.rewind()
        if len(output.done):
            _say(f"resuming: {len(output.done)} results are in the output already")
        for note in output.notes:
            _say(note)


@contextlib.contextmanager
def _closing(close: Callable[[], None]) -> Iterator[None]:
    """Calls `close` at the end; its error is only mentioned when another error is already propagating."""
    try:
        yield
    except BaseException:
        try:
            close()
        except BatchFileError as error:
            _say(str(error))
        raise
    close()


def _prepare_composition(directory: str | None, files: Sequence[str]) -> None:
    """Creates the directory before the model is loaded, and refuses one where the output would erase a file."""
    if directory is None:
        return
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise BatchFileError(f"composition directory {directory!r} cannot be made: {reason(error)}") from error
    for name in ("composition.json", "composition.png"):
        path = os.path.realpath(os.path.join(directory, name))
        if path in map(os.path.realpath, files):
            raise BatchFileError(f"composition in {directory!r} would replace {path!r}; give another directory")


def _close(client: EngineClient, composition_dir: str | None) -> None:
    try:
        client.close()
    except OSError as error:
        raise BatchFileError(
            f"composition in {composition_dir!r} cannot be written: {reason(error)}; the results are not affected"
        ) from error


def _model_name(config: ServerConfig) -> str:
    return config.served_model_name or pathlib.Path(config.engine.model or "dummy").name


def _settings(config: ServerConfig) -> str:
    """Returns as text all settings that determine the results, besides the request, the model's name and the seed."""
    engine = config.engine
    paths = [path and str(pathlib.Path(path).resolve()) for path in (engine.model, engine.tokenizer)]
    others = (engine.architecture, engine.load_format, engine.dtype, engine.max_model_len, engine.cache.kv_cache_dtype)
    if engine.logprobs != LogprobsConfig():
        others = (*others, engine.logprobs)
    defaults = sampling_defaults(engine)
    return repr((*paths, engine.skip_tokenizer_init, *others, *([defaults] if defaults else ())))


def _settings_digest(model: str, seed: int, settings: str) -> bytes:
    text = json.dumps([model, seed, settings])
    return hashlib.blake2b(text.encode(), digest_size=SETTINGS_BYTES).digest()


def _seed_for(seed: int, custom_id: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{custom_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _parsed(answer: Answer, plan: ReplyPlan) -> Answer:
    message = ReplyMessage(plan)
    message.add(answer.text)
    return message.finish(answer)


def _result_id(number: int) -> str:
    return f"batch_req_{number}"


def _fill_standard_streams() -> None:
    """Opens the null device where a standard stream is closed.

    Else the next file that is opened, the output perhaps, takes its number, and libraries that write to number 2 write
    into the results.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives


def _print(text: str, stream: TextIO) -> bool:
    """Prints a line and returns whether that succeeded; a failure does not affect the results."""
    try:
        print(f"jaxserve.batch: {text}", file=stream, flush=True)
    except OSError as error:
        # What the stream still holds goes there when the interpreter ends, and would be an error again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is not sys.stderr:
            _say(f"{text} (standard output cannot be written: {reason(error)})")
        return False
    return True


def _say(text: str) -> None:
    _print(text, sys.stderr)


def _fail(text: str) -> int:
    _say(" ".join(text.split()))
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
