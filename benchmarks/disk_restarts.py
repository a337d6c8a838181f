"""No kill and no damaged file makes a wrong token: `python -m benchmarks.disk_restarts --config tiny.gin`.

An engine in a process of its own serves prompts that begin alike from pools that overflow, so that cached pages are
written to disk and read back all the time. It is killed (SIGKILL) at a random moment and started again on the same
directory, `--kills` times; between two starts, every third time, files are damaged at random: bits changed, cut,
swapped with each other, half of a page under a temporary name; and once the directory belongs to another model
meanwhile. Every answer is compared with that of an engine without a cache. Exit status 1 where one differs, or where
nothing was read from disk or refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import report
from benchmarks.identity import task_prompts
from jaxserve import LLM, SamplingParams
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig

PROMPTS, OUTPUT = 40, 8
PAGES, HOST_GIB, DISK_BYTES = 60, 2**-10, 4 << 20
LONGEST_SECONDS = 3.0


def configured(config: EngineConfig, directory: str | None) -> EngineConfig:
    """Returns the configuration with small pools over a directory; with None without a cache."""
    cache = dataclasses.replace(config.cache, num_pages=PAGES, enable_prefix_caching=directory is not None)
    if directory is not None:
        cache = dataclasses.replace(
            cache, swap_space=HOST_GIB, disk_cache_dir=directory, disk_cache_max_bytes=DISK_BYTES
        )
    scheduler = dataclasses.replace(config.scheduler, max_num_seqs=4, max_num_batched_tokens=64)
    preemption = dataclasses.replace(scheduler.preemption, recompute_seconds_per_token=1.0, swap_seconds_per_page=1e-6)
    scheduler = dataclasses.replace(scheduler, preemption=preemption)
    return dataclasses.replace(config, cache=cache, scheduler=scheduler, token_buckets=(64,), row_buckets=(8,))


def prompts(config: EngineConfig) -> list[tuple[int, ...]]:
    """Returns prompts of 180 to 280 tokens, of which some begin alike."""
    texts = task_prompts(config, 60, 0)
    assert texts is not None
    rng, made = random.Random(0), []
    for number in range(PROMPTS):
        head = [token for text in texts[number % 8 : number % 8 + 4] for token in text][:160]
        tail = [token for text in rng.sample(texts, 3) for token in text]
        made.append(tuple((head + tail)[: rng.randint(180, 280)]))
    return made


def serve(config: EngineConfig, seed: int) -> None:
    """Serves prompts in random order until it is killed, and prints each answer as a line of JSON."""
    rng, asked = random.Random(seed), prompts(config)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT)
    with LLM(config=config) as llm:
        core: Any = llm._client.core  # type: ignore[attr-defined]
        print(json.dumps({"start": core.stats().disk}), flush=True)
        while True:
            numbers = rng.sample(range(PROMPTS), 4)
            found = llm.generate([{"prompt_token_ids": asked[one]} for one in numbers], params, use_tqdm=False)
            answers = {number: list(one.outputs[0].token_ids) for number, one in zip(numbers, found, strict=True)}
            stats = core.stats()
            print(json.dumps({"answers": answers, "disk": stats.disk, "hits": stats.host_cache_hits}), flush=True)


def damage(directory: pathlib.Path, rng: random.Random) -> int:
    """Damages some files; returns how many."""
    files = sorted(directory.glob("*.page"))
    chosen = rng.sample(files, min(len(files), 12))
    for path in chosen:
        data = bytearray(path.read_bytes())
        kind = rng.choice(("bits", "header", "cut", "swapped", "partial"))
        if kind == "bits":
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "header":
            data[rng.randrange(80)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[rng.randrange(len(data)) :]
        elif kind == "swapped":
            data = bytearray(rng.choice(files).read_bytes())
        else:
            path = path.with_suffix(".partial")
        path.write_bytes(bytes(data))
    return len(chosen)


def run_child(arguments: list[str], directory: str, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Starts a process, kills it after so many seconds of service, and returns what it has printed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.disk_restarts",
        *arguments,
        "--directory",
        directory,
        "--seed",
        f"{seed}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        lines += child.stdout.read().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def main() -> int:
    """Prints the counts and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    options, server, _ = gin_config.load_from_command_line(parser)
    config = server.engine
    if options.directory is not None:
        serve(configured(config, options.directory), options.seed)
        return 0
    asked, rng = prompts(config), random.Random(options.seed)
    with LLM(config=configured(config, None)) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT)
        found = llm.generate([{"prompt_token_ids": one} for one in asked], params, use_tqdm=False)
        expected = {str(number): list(one.outputs[0].token_ids) for number, one in enumerate(found)}
    counts = dict.fromkeys(("kills", "answers", "wrong", "read", "written", "refused", "damaged", "found_at_start"), 0)
    given = ["--config", options.config]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.kills):
            others = [*given, "--gin.EngineConfig.dtype='float32'"] if number == options.kills // 2 else given
            lines = run_child(others, folder, number, rng.uniform(0.05, LONGEST_SECONDS))
            counts["kills"] += 1
            last = lines[0]["start"] if lines else {}
            counts["found_at_start"] += last.get("pages", 0)
            for line in lines[1:]:
                last = line["disk"]
                if others is given:
                    counts["answers"] += len(line["answers"])
                    counts["wrong"] += sum(expected[name] != ids for name, ids in line["answers"].items())
            for name in ("read", "written", "refused"):
                counts[name] += last.get(name, 0)
            if number % 3 == 2:
                counts["damaged"] += damage(pathlib.Path(folder), rng)
    path = report.write(f"disk_restarts_jax{report.versions()['jax']}", {"kills": options.kills}, [counts])
    print(report.describe())
    print(report.table(tuple(counts), [tuple(counts.values())]))
    print(f"written: {path}")
    missing = [name for name in ("answers", "read", "written", "refused") if not counts[name]]
    if counts["wrong"]:
        return report.fail(f"{counts['wrong']} answers are wrong")
    return report.fail(f"none {', '.join(missing)}") if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
