"""jaxserve's offline engine as a side of a comparison: `python -m benchmarks.sides.jaxserve_side SETTINGS`.

SETTINGS is JSON: {"options": {...}} for `LLM(**options)`, or {"config": NAME, "overrides": ["--gin.NAME=VALUE", ...]}
for the engine of a server's configuration. The protocol: benchmarks/sides/__init__.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from benchmarks import report
from jaxserve import LLM, SamplingParams
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.telemetry.recorder import StepRecorded


def main() -> None:
    """Serves lines until standard input ends."""
    config = engine_config(json.loads(sys.argv[1]))
    engine = InlineEngine(config, progress=True)
    steps: list[StepRecorded] = []
    engine.core.recorder.subscribe(lambda event: steps.append(event) if isinstance(event, StepRecorded) else None)
    ready = {
        "start_seconds": engine.ready.start_seconds,
        "executables": engine.ready.info.num_executables,
        "kv_cache": engine.ready.info.kv_cache,
    }
    with LLM(client=engine, tokenizer=load_tokenizer(config), config=config) as llm:
        say({"side": "ready", "versions": report.versions(), **ready})
        for line in sys.stdin:
            steps.clear()
            before = engine.core.runner.num_compilations
            answer = run(llm, json.loads(line))
            compiled = engine.core.runner.num_compilations - before
            say({"side": "done", **answer, "steps": step_shares(steps), "compilations": compiled})


def engine_config(settings: dict[str, Any]) -> EngineConfig:
    """The engine's configuration: of a server's gin file, or from options with vLLM's names."""
    if "config" in settings:
        arguments = ["--config", settings["config"], *settings["overrides"]]
        return gin_config.load_from_command_line(argparse.ArgumentParser(), arguments)[1].engine
    return EngineConfig.from_options(**settings["options"])


def run(llm: LLM, work: dict[str, Any]) -> dict[str, Any]:
    """Seconds for the whole work, and the tokens that came of it."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=work["ignore_eos"]) for count in work["new_tokens"]
    ]
    prompts = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in work["prompts"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error:
            raise RuntimeError(f"{output.request_id}: {output.error}")
    return {"seconds": seconds, "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def step_shares(events: list[StepRecorded]) -> dict[str, float]:
    """Where the steps' time went on the host, per step in milliseconds, and the share of padding tokens.

    waiting is the time in `collect`: the device was busy then. idle_share is the share of the wall time, at most, in
    which the device had nothing to do between steps.
    """
    count = max(1, len(events))
    tokens = sum(event.prefill_tokens + event.decode_tokens for event in events)
    padding = sum(event.padding for event in events)
    span = events[-1].time - events[0].time if events else 0.0
    return {
        "steps": len(events),
        "schedule_ms": 1e3 * sum(event.schedule_seconds for event in events) / count,
        "dispatch_ms": 1e3 * sum(event.dispatch_seconds for event in events) / count,
        "waiting_ms": 1e3 * sum(event.collect_seconds for event in events) / count,
        "update_ms": 1e3 * sum(event.update_seconds for event in events) / count,
        "idle_share": sum(event.idle_seconds for event in events) / span if span else 0.0,
        "padding_share": padding / max(1, tokens + padding),
    }


def say(message: dict[str, Any]) -> None:
    """One line on standard output, at once."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
