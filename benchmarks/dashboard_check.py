"""Runs every query of the Grafana dashboard against a real Prometheus that scraped a loaded server:
`python -m benchmarks.dashboard_check`.

Starts a server with the default model, load for it, and a Prometheus (Debian's package `prometheus`, or any other on
PATH), all on free ports; prints each query with the value that it returned. A query that returns nothing, or NaN, fails
the check.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import pathlib
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from benchmarks import report
from benchmarks.load.server_process import started_server
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import AsyncClient

OBSERVABILITY = report.ROOT / "server" / "observability"
DASHBOARD = OBSERVABILITY / "grafana" / "dashboards" / "jaxserve.json"
VARIABLES = {"$model_name": ".*", "$__rate_interval": "20s"}
"""Values of the dashboard's variables in the queries that are run."""

_SCRAPE_SECONDS = 1.0


def dashboard_queries(path: pathlib.Path = DASHBOARD) -> list[str]:
    """Every query of the dashboard, in its order, as Grafana has it."""
    panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metric_names(query: str) -> set[str]:
    """The metrics that a query reads."""
    return set(re.findall(r"\b(?:jaxserve:|process_)[a-z0-9_]+", query))


def resolved(query: str) -> str:
    """The query with the values of its variables."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    if "$" in query:
        raise ValueError(f"query {query!r} has a variable that dashboard_check.VARIABLES lacks")
    return query


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def prometheus(http_port: int) -> Iterator[str]:
    """A Prometheus that scrapes the server of this HTTP port; yields its URL. Its data are in a scratch directory."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise FileNotFoundError("there is no 'prometheus' on PATH; on Debian: apt-get install prometheus")
    config = (OBSERVABILITY / "prometheus.yml").read_text(encoding="utf-8")
    config = config.replace("host.docker.internal:8000", f"127.0.0.1:{http_port}")
    config = re.sub(r"scrape_interval: \S+", f"scrape_interval: {_SCRAPE_SECONDS:g}s", config)
    with tempfile.TemporaryDirectory(prefix="jaxserve-prometheus-") as scratch:
        path = pathlib.Path(scratch)
        (path / "prometheus.yml").write_text(config, encoding="utf-8")
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [binary, f"--config.file={path}/prometheus.yml", f"--storage.tsdb.path={path}/data",
             f"--web.listen-address={address}", "--log.level=warn"],
        )  # fmt: skip
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


def ask(url: str, path: str, **parameters: str) -> Any:
    """The data of an answer of Prometheus's API."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=30) as answer:
        return json.load(answer)["data"]


def value_of(result: Sequence[Any]) -> str:
    """What a query returned, in a line: one value, or each with its labels."""
    found = []
    for series in result:
        labels = ", ".join(f"{name} {text}" for name, text in sorted(series["metric"].items()) if name[0] != "_")
        number = float(series["value"][1])
        found.append(f"{number:.6g}" + (f" ({labels})" if labels and len(result) > 1 else ""))
    return "; ".join(found)


def problem_of(result: Sequence[Any]) -> str:
    """Why a result is no value; "" if it is one."""
    if not result:
        return "EMPTY"
    return "NOT A NUMBER" if any(math.isnan(float(series["value"][1])) for series in result) else ""


async def load(address: str, seconds: float, concurrency: int, seed: int = 0) -> int:
    """Keeps as many requests under way for so long; some are cut short, cancelled or refused. Returns their number."""
    rng, sent = random.Random(seed), 0
    async with AsyncClient(address) as client:

        async def user() -> None:
            nonlocal sent
            while time.monotonic() < end:
                prompt = [rng.randrange(3, 200) for _ in range(rng.randrange(8, 200))]
                params = SamplingParams(max_tokens=rng.randrange(2, 120), ignore_eos=rng.random() < 0.8)
                sent += 1
                if sent % 50 == 0:
                    prompt = []  # refused
                with contextlib.suppress(grpc.RpcError):
                    async with contextlib.aclosing(client.generate(prompt, params)) as chunks:
                        async for _ in chunks:
                            if sent % 40 == 0:
                                break

        end = time.monotonic() + seconds
        await asyncio.gather(*(user() for _ in range(concurrency)))
    return sent


def check(url: str) -> tuple[list[tuple[str, str]], int]:
    """Every query with what it returned, and how many returned no value."""
    rows, failed = [], 0
    for query in dashboard_queries():
        result = ask(url, "query", query=resolved(query))["result"]
        problem = problem_of(result)
        failed += bool(problem)
        rows.append((query, problem or value_of(result)))
    return rows, failed


async def _checked(address: str, url: str, seconds: float, concurrency: int) -> tuple[int, Any]:
    """The number of requests, and what `check` says when the load is about to end."""
    async with AsyncClient(address) as client:
        await client.wait_ready(600)
    loading = asyncio.ensure_future(load(address, seconds, concurrency))
    await asyncio.sleep(0.8 * seconds)
    found = await asyncio.to_thread(check, url)
    return await loading, found


def main() -> int:
    """Prints each query and its value; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the load lasts")
    parser.add_argument("--concurrency", type=int, default=96, help="requests under way at once")
    parser.add_argument("overrides", nargs="*", metavar="--gin.BINDING=VALUE", help="settings of the server, behind --")
    options = parser.parse_args()
    http_port = free_port()
    server = started_server(options.config, options.overrides, http_port=http_port)
    with server as (address, _), prometheus(http_port) as url:
        sent, (rows, failed) = asyncio.run(_checked(address, url, options.seconds, options.concurrency))
        (target,) = ask(url, "targets", state="active")["activeTargets"]
        version = ask(url, "status/buildinfo")["version"]
    print(f"{sent} requests; Prometheus {version}, target {target['health']} {target['lastError']}")
    for query, value in rows:
        print(f"{query}\n    {value}")
    print(f"{len(rows)} queries, {failed} without a value")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
