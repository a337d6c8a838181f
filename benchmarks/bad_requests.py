"""What clients are told of requests that cannot be: `python -m benchmarks.bad_requests --config tiny.gin`.

Every kind of bad value of every numeric parameter, contradictions, ids that do not exist, and grammars that are too
deep, too large, wrong or explode go to the HTTP port of a server that answers one stream after another meanwhile; then
distinct schemas come one after the other. For each: the line, the milliseconds until it was there, and how long the
streams waited. Exit status 1 where one of them is not refused with its field's name, a stream's tokens change, or what
a grammar leaves behind grows.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import report
from benchmarks.load.server_process import started_server
from benchmarks.long_prompts import memory_mb
from jaxserve.config.sampling_fields import Number, Whole
from jaxserve.sampling_params import SAMPLING_FIELDS
from jaxserve.serving.clients.grpc_client import Client

_SERVED_OR_REFUSED = "within the budget of a grammar"
"""What is said of a request that may be served as well: what it costs has been bounded."""

_PROMPT = "count: 7 to 11\n"


def numeric_cases() -> Iterator[tuple[str, str, str]]:
    """Yields name, body as JSON and what the error must name, of every numeric parameter."""
    for name, row in SAMPLING_FIELDS.items():
        if not isinstance(row.kind, Number | Whole):
            continue
        low, high = row.kind.low, row.kind.high
        values = {
            "below": json.dumps(low - 1),
            "above": json.dumps(high + 1 if isinstance(high, int) else high * 2 + 1),
            "not a number": "NaN",
            "infinite": "Infinity",
            "overflowing": "1e999",
            "text": '"1"',
            "of 400 digits": "1" + "0" * 400,
        }
        for kind, value in values.items():
            yield f"{name}, {kind}", f'{{"prompt": "a", "{name}": {value}}}', name


def other_cases(vocab_size: int) -> Iterator[tuple[str, str, str]]:
    """Yields the others."""

    def case(name: str, named: str, **fields: Any) -> tuple[str, str, str]:
        return name, json.dumps({"prompt": "a", "max_tokens": 4, **fields}), named

    def constrained(name: str, kind: str, value: Any) -> tuple[str, str, str]:
        return case(name, f"structured_outputs.{kind}", structured_outputs={kind: value})

    yield case("min_tokens above max_tokens", "min_tokens", min_tokens=5)
    yield case("n with temperature 0", "n", n=2, temperature=0)
    yield case("n above max_n", "n", n=129)
    yield case("stop without text", "stop", stop="a", detokenize=False)
    yield case("logprobs above the cap", "logprobs", logprobs=21)
    yield case("prompt_logprobs above the cap", "prompt_logprobs", prompt_logprobs=1000)
    yield case("a bias for an id that does not exist", "logit_bias", logit_bias={str(vocab_size): 1})
    yield case("a bias out of range", "logit_bias", logit_bias={"5": 101})
    yield case("a bias for a negative id", "logit_bias", logit_bias={"-1": 1})
    yield case("100,000 biases", "logit_bias", logit_bias={str(number): 1 for number in range(100_000)})
    yield case("an allowed id that does not exist", "allowed_token_ids", allowed_token_ids=[vocab_size])
    yield case("no allowed id", "allowed_token_ids", allowed_token_ids=[])
    yield case("a stop id that does not exist", "stop_token_ids", stop_token_ids=[-1])
    yield case("truncation to nothing", "truncate_prompt_tokens", truncate_prompt_tokens=0)
    yield case("an unknown field", "did you mean temperature", temprature=1)
    yield constrained("a schema that is no JSON", "json", "{'a'")
    yield constrained("a schema of a type that does not exist", "json", {"type": "nothing"})
    yield constrained("a schema that nothing follows", "json", {"allOf": [{"type": "null"}, {"type": "string"}]})
    yield constrained("a keyword that is not known", "json", {"type": "array", "uniqueItems": True})
    yield constrained("a schema nested 60,000 deep", "json", '{"items":' * 60_000 + "{}" + "}" * 60_000)
    yield constrained("a schema nested 9,000 deep", "json", '{"items":' * 9_000 + "{}" + "}" * 9_000)
    chain = {f"a{number}": {"items": {"$ref": f"#/$defs/a{number + 1}"}} for number in range(1_500)}
    yield constrained("1,500 references in a row", "json", {"$ref": "#/$defs/a0", "$defs": chain | {"a1500": {}}})
    yield constrained("a reference that leads nowhere", "json", {"$ref": "#/$defs/none"})
    yield constrained("60,000 groups", "regex", "(" * 60_000 + ")" * 60_000)
    for pattern in (
        "((a{1,200}){1,200}){1,200}b",
        "(.*a){30}.{300}",
        r"(\p{L}{0,2000}\p{N}?){0,2000}x",
        "(a?){9000}a{9000}",
    ):
        yield f"a regex that explodes: {pattern}", constrained("", "regex", pattern)[1], _SERVED_OR_REFUSED
    yield constrained("look-around", "regex", "a(?=b)")
    yield constrained("an unbalanced regex", "regex", "(a")
    yield constrained("a grammar without a start", "grammar", "rule: /a/")
    yield constrained("a grammar of 60,000 brackets", "grammar", "start: " + "(" * 60_000)
    yield constrained("a grammar that only calls itself", "grammar", "start: start")
    yield constrained("5,000 choices", "choice", [str(number) for number in range(5_000)])
    yield constrained("no choice", "choice", [])
    yield case("two constraints", "structured_outputs", structured_outputs={"regex": "a", "json": {}})
    yield case("two ways to constrain", "response_format", guided_regex="a", response_format={"type": "json_object"})


def post(url: str, body: bytes) -> tuple[int, str, float]:
    """Sends a body to /v1/completions: status, the error's line or the text, and seconds."""
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    begin = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=120.0) as response:
            status, data = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, data = error.code, error.read()
    seconds = time.perf_counter() - begin
    found = json.loads(data)
    return status, found["error"]["message"] if "error" in found else found["choices"][0]["text"], seconds


class Streams:
    """Reads one stream after another, in a thread, until it is left: their texts, and the gaps between messages."""

    def __init__(self, address: str):
        self._address = address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.texts: set[str] = set()
        self.count = 0
        self.gaps: list[float] = []

    def __enter__(self) -> Streams:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        with Client(self._address) as client:
            while not self._ended.is_set():
                text, last = "", None
                for chunk in client.generate(_PROMPT, {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}):
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    text, last = text + chunk.text, now
                self.texts.add(text)
                self.count += 1


def schema(number: int) -> bytes:
    """A request for an output of a schema that no other has."""
    shape = {"type": "object", "properties": {f"p{number}": {"const": number}}, "additionalProperties": False}
    return json.dumps({"prompt": "a", "max_tokens": 1, "structured_outputs": {"json": shape}}).encode()


def run(address: str, url: str, pid: int, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Sends everything; returns the result, and what does not hold."""
    with Client(address) as client:
        client.wait_ready(600.0)
        vocab_size = client.model_info().vocab_size
    trouble, rows = "", []
    with Streams(address) as streams:
        while not streams.count:
            time.sleep(0.05)
        for name, body, named in (*numeric_cases(), *other_cases(vocab_size)):
            status, line, seconds = post(url, body.encode())
            rows.append({"input": name, "status": status, "line": line[:300], "ms": 1e3 * seconds})
            if named == _SERVED_OR_REFUSED and status in (200, 400):
                continue
            if status != 400 or (named not in line and "JSON" not in line and "body" not in line):
                trouble = trouble or f"{name}: {status} {line[:200]}"
                print(f"NOT as it should be: {name}: {status} {line[:200]}", flush=True)
        memory, seconds = [memory_mb(pid)], []
        for number in range(options.schemas):
            status, line, took = post(url, schema(number))
            seconds.append(took)
            if status != 200:
                trouble = trouble or f"schema {number}: {status} {line[:200]}"
            if number in (options.schemas // 2, options.schemas - 1):
                memory.append(memory_mb(pid))
    if len(streams.texts) != 1:
        trouble = trouble or "the streams' texts differ"
    start, half, end = memory
    if end - half > 20:
        trouble = trouble or f"memory grows: {half:.0f} MB after half of the schemas, {end:.0f} after all"
    return {
        "cases": rows,
        "schemas": {
            "count": options.schemas,
            "ms_p50": 1e3 * statistics.median(seconds),
            "ms_most": 1e3 * max(seconds),
            "memory_mb": {"before": start, "half": half, "after": end},
        },
        "streams": {
            "count": streams.count,
            "gap_ms_p50": 1e3 * statistics.median(streams.gaps),
            "gap_ms_most": 1e3 * max(streams.gaps),
        },
    }, trouble


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--schemas", type=int, default=2_000, help="distinct ones, one after the other")
    options = parser.parse_args(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with started_server(options.config, (), http_port=port) as (address, pid):
        result, trouble = run(address, f"http://127.0.0.1:{port}", pid, options)
    path = report.write(f"bad_requests_jax{report.versions()['jax']}", vars(options), result)
    print(report.describe())
    print(
        report.table(
            ("input", "status", "ms", "line"),
            [tuple(row[key] for key in ("input", "status", "ms", "line")) for row in result["cases"]],
        )
    )
    print(json.dumps({name: result[name] for name in ("schemas", "streams")}, indent=1))
    print(f"written: {path}")
    return report.fail(trouble) if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
