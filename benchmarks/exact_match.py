"""Held-out exact match of the default model through its gRPC server: `python -m benchmarks.exact_match`.

Starts `jaxserve.server` on a free port (or takes --address) and keeps 64 streams open until every example of every task
kind is answered, kinds mixed. An answer counts when its text is the right one to the letter and it ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pathlib
import time
from typing import Any

from benchmarks import report
from benchmarks.load.datasets import Example, held_out
from benchmarks.load.server_process import started_server
from jaxserve.models.tiny.tasks import KINDS
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import AsyncClient, Completion


async def ask_all(
    address: str, examples: list[Example], streams: int, max_tokens: int, patience: float
) -> tuple[list[Completion], dict[str, Any]]:
    """The completion of every example in order, and figures of the run; `streams` requests are open at a time."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    gate = asyncio.Semaphore(streams)
    open_now = most = 0

    async with AsyncClient(address) as client:
        await client.wait_ready(patience)

        async def ask(example: Example) -> Completion:
            nonlocal open_now, most
            async with gate:
                open_now += 1
                most = max(most, open_now)
                try:
                    return await client.generate_text(example.prompt, params)
                finally:
                    open_now -= 1

        start = time.perf_counter()
        completions = await asyncio.gather(*(ask(example) for example in examples))
        seconds = time.perf_counter() - start
    prompt = sum(completion.usage.prompt_tokens for completion in completions)
    output = sum(completion.usage.output_tokens for completion in completions)
    return completions, {
        "seconds": seconds,
        "requests_per_second": len(examples) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "input_tokens": prompt,
        "output_tokens": output,
        "max_concurrent_requests": most,
    }


def score(examples: list[Example], completions: list[Completion]) -> list[dict[str, Any]]:
    """Per kind: examples, exact answers, per cent and mean output tokens."""
    rows = []
    for kind in KINDS:
        pairs = [
            (example, completion)
            for example, completion in zip(examples, completions, strict=True)
            if example.kind == kind
        ]
        if not pairs:
            continue
        exact = sum(
            completion.text == example.answer and completion.finish_reason is FinishReason.STOP
            for example, completion in pairs
        )
        rows.append(
            {
                "kind": kind,
                "examples": len(pairs),
                "exact": exact,
                "per_cent": 100 * exact / len(pairs),
                "mean_prompt_tokens": sum(one.usage.prompt_tokens for _, one in pairs) / len(pairs),
                "mean_output_tokens": sum(one.usage.output_tokens for _, one in pairs) / len(pairs),
            }
        )
    return rows


def main() -> int:
    """Prints the table and writes the result; exit status 1 where fewer than six kinds reach --at-least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="HOST:PORT of a running server; without it one is started")
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument(
        "--gin", action="append", default=[], metavar="BINDING=VALUE", help="for the server; may repeat"
    )
    parser.add_argument("--per-kind", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--scale", type=float, default=1.0, help="largest size, as a share of the largest trained")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for the server")
    parser.add_argument("--at-least", type=float, default=95.0, help="per cent that six kinds must reach")
    options = parser.parse_args()
    examples = held_out(options.per_kind, options.seed, options.scale)
    overrides = [f"--gin.{binding}" for binding in options.gin]
    given = contextlib.nullcontext((options.address, 0))
    with given if options.address else started_server(options.config, overrides) as (address, _):
        completions, figures = asyncio.run(
            ask_all(address, examples, options.streams, options.max_tokens, options.patience)
        )
    rows = score(examples, completions)
    settings = {name: value for name, value in vars(options).items() if name != "address"}
    settings["config"] = pathlib.PurePath(options.config).name
    path = report.write("exact_match", settings, {"kinds": rows, "throughput": figures})
    print(report.describe())
    print(report.table(list(rows[0]), [list(row.values()) for row in rows]))
    print(", ".join(f"{name} {value:,.1f}" for name, value in figures.items()))
    print(f"written: {path}")
    reached = sum(row["per_cent"] >= options.at_least for row in rows)
    if reached < 6:
        return report.fail(f"{reached} kinds reach {options.at_least:g} %; at least six are wanted")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
