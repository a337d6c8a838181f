"""Serving over HTTP beside vLLM's server: `python -m benchmarks.http_peer --vllm ENV/bin/vllm`.

Both servers run at the same time and take load in turn, from one load generator, vLLM's own (`vllm bench serve`), on
OpenAI's completions. The model has random weights and a vocabulary of short ASCII strings, so that every token is text
at once on either side. For each round and server: output tokens a second, and time to first token and per output token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from benchmarks import report
from benchmarks.load.server_process import started_server
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.work import SHAPES

METRICS = {
    "output tokens/s": "output_throughput",
    "mean TTFT ms": "mean_ttft_ms",
    "p99 TTFT ms": "p99_ttft_ms",
    "mean TPOT ms": "mean_tpot_ms",
}
"""What the generator measures, by the name that the table has for it."""

_START_SECONDS = 600.0


def write_tokenizer(directory: pathlib.Path, vocab_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json of a byte-pair encoding of printable ASCII: the characters, their
    pairs, and as many triples as the vocabulary has room for. Ids 0 to 2 are <unk>, <s> and </s>."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = [(first, second) for first in letters for second in letters]
    triples = [(first + second, third) for first, second in pairs for third in letters]
    merges = (pairs + triples)[: vocab_size - 3 - len(letters)]
    texts = ["<unk>", "<s>", "</s>", *letters, *(first + second for first, second in merges)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(texts[:3])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


@contextlib.contextmanager
def started_vllm(
    command: str, model: pathlib.Path, port: int, options: Sequence[str], variables: Sequence[str]
) -> Iterator[str]:
    """vLLM's server process; yields its URL when it is ready. variables: of its environment, as NAME=VALUE."""
    environment = _environment() | dict(variable.split("=", 1) for variable in variables)
    process = subprocess.Popen(
        [command, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options], env=environment
    )
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_ready(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Waits until the models are listed. Raises RuntimeError when the process ends or time is up."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server has ended with exit code {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
            return
        time.sleep(0.5)
    raise RuntimeError(f"{url} is not ready after {_START_SECONDS:g} s")


def load(command: str, url: str, name: str, model: pathlib.Path, options: argparse.Namespace, seed: int) -> Any:
    """Runs the generator against one server; returns what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "--backend": "openai",
            "--base-url": url,
            "--endpoint": "/v1/completions",
            "--model": str(model),
            "--served-model-name": name,
            "--dataset-name": "random",
            "--random-input-len": options.input_len,
            "--random-output-len": options.output_len,
            "--random-range-ratio": options.range_ratio,
            "--num-prompts": options.num_prompts,
            "--max-concurrency": options.max_concurrency,
            "--seed": seed,
            "--temperature": 0,
            "--result-dir": directory,
            "--result-filename": "result.json",
        }
        flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
        line = [command, "bench", "serve", *(str(part) for pair in arguments.items() for part in pair), *flags]
        subprocess.run(line, check=True, env=_environment(), stdout=sys.stderr, timeout=_START_SECONDS)
        return json.loads((pathlib.Path(directory) / "result.json").read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    """Returns this process's environment without what concerns its own Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="COMMAND", help="the program `vllm` of its own environment")
    parser.add_argument("--vllm-options", default="", help="of `vllm serve`, separated by spaces")
    parser.add_argument("--vllm-env", nargs="*", default=[], metavar="NAME=VALUE", help="of its environment")
    parser.add_argument("--model", choices=list(SHAPES), default="153m")
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--max-concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--range-ratio", type=float, default=0.5, help="lengths are up to this part more or less")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18000, help="of jaxserve; the one after it is vLLM's")
    parser.add_argument("--name", default=None, help="of the result; default: http_peer_MODEL_jaxVERSION")
    options = parser.parse_args(arguments)
    found: dict[str, list[Any]] = {"jaxserve": [], "vllm": []}
    with contextlib.ExitStack() as stack:
        model = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(model, SHAPES[options.model])
        write_tokenizer(model, SHAPES[options.model]["vocab_size"])
        vllm_options = ["--served-model-name", "peer", *options.vllm_options.split()]
        peer = stack.enter_context(started_vllm(options.vllm, model, options.port + 1, vllm_options, options.vllm_env))
        overrides = [
            f"--gin.EngineConfig.model='{model}'",
            "--gin.EngineConfig.dtype='bfloat16'",
            "--gin.ServerConfig.served_model_name='peer'",
        ]
        stack.enter_context(started_server("tiny.gin", overrides, http_port=options.port))
        urls = {"jaxserve": f"http://127.0.0.1:{options.port}", "vllm": peer}
        wait_ready(urls["jaxserve"])
        for round_number in range(options.rounds + 1):  # the first one warms both up
            for side, url in urls.items():
                one = load(options.vllm, url, "peer", model, options, seed=round_number)
                if round_number:
                    found[side].append(one)
    rows = []
    for name, metric in METRICS.items():
        ours, theirs = ([one[metric] for one in found[side]] for side in urls)
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((name, statistics.median(ours), statistics.median(theirs), statistics.median(ratios), spread))
    failed = {side: sum(one["num_prompts"] - one["completed"] for one in runs) for side, runs in found.items()}
    print(report.describe())
    print(report.table(("metric", "jaxserve", "vLLM", "ratio", "of the rounds"), rows))
    print(f"requests that failed: {failed}")
    name = options.name or f"http_peer_{options.model}_jax{report.versions()['jax']}"
    print(f"written: {report.write(name, vars(options), found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
