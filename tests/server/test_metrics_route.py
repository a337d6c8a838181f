"""What Prometheus reads, against what was done: by its own parser, over engines whose answers are known."""

from __future__ import annotations

import asyncio
import pathlib
from typing import Any

import grpc
import httpx
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest

from benchmarks.dashboard_check import dashboard_queries, metric_names
from jaxserve.engine.messages import EngineStats
from jaxserve.frontend.delta import DuplicateRequestError
from jaxserve.request import FinishReason, RequestOptions
from jaxserve.request_checks import InfeasibleError
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.http_port.app import make_app
from jaxserve.serving.prometheus_collector import BusyWindow
from jaxserve.serving.served_model import ServedModel
from tests.server.harness import GREEDY, run_served, status_of

COUNTERS = """num_preemptions prompt_tokens generation_tokens prefix_cache_queries prefix_cache_hits request_success
    admission_rejections bucket_padding_tokens compile_misses""".split()
GAUGES = "num_requests_running num_requests_waiting num_requests_swapped kv_cache_usage_perc device_busy_ratio".split()
HISTOGRAMS = """step_gap_seconds iteration_tokens batch_composition time_to_first_token_seconds
    inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
    request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds step_time_seconds
    step_host_overhead_seconds""".split()


async def scrape(model: ServedModel, accept: str = "text/plain") -> tuple[str, str]:
    transport = httpx.ASGITransport(make_app(model))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    return answer.text, answer.headers["content-type"]


def samples(text: str) -> dict[str, float]:
    """Values by name and labels other than the model's."""
    found = {}
    for family in prometheus_client.parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found[sample.name.removeprefix("jaxserve:") + (str(labels) if labels else "")] = sample.value
    return found


def test_every_name_is_there_before_the_engine_is():
    text, content_type = asyncio.run(scrape(ServedModel("echo")))
    assert content_type.startswith("text/plain; version=")
    families = {family.name: family for family in prometheus_client.parser.text_string_to_metric_families(text)}
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES), ("histogram", HISTOGRAMS)):
        for name in names:
            assert families[f"jaxserve:{name}"].type == kind, name
            assert families[f"jaxserve:{name}"].samples, name
    assert {"process_resident_memory_bytes", "process_cpu_seconds"} <= families.keys()
    values = samples(text)
    assert values["engine_ready"] == 0
    assert values["kv_cache_group_pages{'group': '0', 'state': 'used', 'window': '0'}"] == 0
    assert all(f"admission_rejections_total{{'reason': '{reason}'}}" in values for reason in ("queue_full", "deadline"))


def test_every_name_is_in_the_documentation_with_its_type():
    text, _ = asyncio.run(scrape(ServedModel("echo")))
    page = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    documented = {name.strip("|` ,"): row[1] for row in rows if len(row) == 3 for name in row[0].split("`, `")}
    shown = {
        family.name.removeprefix("jaxserve:") + ("_total" if family.type == "counter" else ""): family.type
        for family in prometheus_client.parser.text_string_to_metric_families(text)
        if family.name.startswith("jaxserve:")
    }
    assert documented == shown


def test_openmetrics_on_request():
    text, content_type = asyncio.run(scrape(ServedModel("echo"), "application/openmetrics-text; version=1.0.0"))
    assert content_type.startswith("application/openmetrics-text")
    found = prometheus_client.openmetrics.parser.text_string_to_metric_families(text)
    assert {f"jaxserve:{name}" for name in COUNTERS + GAUGES + HISTOGRAMS} <= {family.name for family in found}


def test_counts_are_those_of_the_requests(tokenizer):
    """Three requests to their ends, one aborted, five refused. The echo engine repeats the prompt, then ends."""

    async def body(served: Any) -> None:
        for text in ("abc", "hello"):
            assert (await served.client.generate_text(text, GREEDY)).finish_reason is FinishReason.STOP
        short = await served.client.generate_text("abcdef", SamplingParams(temperature=0.0, max_tokens=2))
        assert short.finish_reason is FinishReason.LENGTH
        served.engine.pause()
        stream = await served.frontend.submit("xy", GREEDY, request_id="twice")
        with pytest.raises(DuplicateRequestError):
            await served.frontend.submit("xy", GREEDY, request_id="twice")
        for error, prompt, options in (
            (ValueError, "", RequestOptions()),
            (InfeasibleError, "x" * 300, RequestOptions()),
            (Exception, "x", RequestOptions(deadline=1.0)),
        ):
            with pytest.raises(error):
                await served.frontend.submit(prompt, SamplingParams(max_tokens=5), options)
        code, _ = await status_of(served.client.generate_text([], GREEDY))  # refused by the port itself
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        served.engine.allow(1)
        assert len((await anext(stream)).token_ids) == 1
        stream.close()
        served.drain()
        code, _ = await status_of(served.client.generate_text("late", GREEDY))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert served.model.metrics.rejected["unavailable"] == 1
        values = samples((await scrape(served.model))[0])
        # <bos> stands before every prompt, and every answer that is not cut short ends with an id of its own.
        prompts, outputs = [4, 6, 7, 3], [4, 6, 2, 1]
        assert values["prompt_tokens_total"] == sum(prompts)
        assert values["generation_tokens_total"] == sum(outputs)
        for reason, count in {"stop": 2, "length": 1, "abort": 1, "error": 0}.items():
            assert values[f"request_success_total{{'finished_reason': '{reason}'}}"] == count
        reasons = dict.fromkeys(("duplicate", "infeasible", "deadline", "unavailable"), 1) | {"invalid": 2}
        for reason, count in (reasons | dict.fromkeys(("queue_full", "other", "forbidden"), 0)).items():
            assert values[f"admission_rejections_total{{'reason': '{reason}'}}"] == count, reason
        assert values["time_to_first_token_seconds_count"] == 4
        assert values["inter_token_latency_seconds_count"] == sum(outputs) - 4
        assert values["e2e_request_latency_seconds_count"] == 4
        assert values["request_decode_time_seconds_count"] == 4
        assert values["request_time_per_output_token_seconds_count"] == 3  # one has a single token
        assert (values["request_prompt_tokens_sum"], values["request_prompt_tokens_count"]) == (sum(prompts), 4)
        assert values["request_generation_tokens_bucket{'le': '4.0'}"] == 3
        assert values["request_generation_tokens_bucket{'le': '+Inf'}"] == 4

    run_served(body, tokenizer)


def test_counts_of_the_engine_are_shown_as_they_come(tokenizer):
    stats = EngineStats(
        num_running=3,
        num_waiting=5,
        num_swapped=2,
        pages_used=6,
        pages_free=1,
        pages_cached=1,
        padding_tokens=70,
        compile_misses=1,
        num_preemptions_recompute=4,
        num_preemptions_swap=9,
        prefix_cache_queries=100,
        prefix_cache_hits=25,
        prefix_cache_requests=8,
        prefix_cache_request_hits=3,
        prefix_cache_returned_tokens=12,
        prefix_cache_evictions={"capacity": 7, "flush": 2},
        prefix_waits={"waited": 5, "computed": 2, "waited_in_vain": 1},
        device_busy_seconds=1.5,
        group_pages=((0, 4, 1), (64, 2, 0)),
        shared_reads={"steps": 3, "rows_together": 8, "rows_apart": 2, "tokens_together": 640, "tokens_apart": 32},
    )

    async def body(served: Any) -> None:
        served.engine._emit(stats)
        while served.frontend.stats != stats:  # noqa: ASYNC110  the next scrape would do as well
            await asyncio.sleep(0.001)
        values = samples((await scrape(served.model))[0])
        expected = {
            "num_requests_running": 3, "num_requests_waiting": 5, "num_requests_swapped": 2,
            "kv_cache_usage_perc": 0.75, "bucket_padding_tokens_total": 70, "compile_misses_total": 1,
            "num_preemptions_total{'kind': 'recompute'}": 4, "num_preemptions_total{'kind': 'swap'}": 9,
            "prefix_cache_queries_total": 100, "prefix_cache_hits_total": 25, "prefix_cache_returned_tokens_total": 12,
            "prefix_cache_requests_total{'result': 'hit'}": 3, "prefix_cache_requests_total{'result': 'miss'}": 5,
            "prefix_waits_total{'choice': 'waited'}": 5, "prefix_waits_total{'choice': 'computed'}": 2,
            "prefix_waits_total{'choice': 'waited_in_vain'}": 1,
            "prefix_cache_evictions_total{'cause': 'capacity'}": 7,
            "prefix_cache_evictions_total{'cause': 'flush'}": 2,
            "prefix_cache_evictions_total{'cause': 'lost'}": 0, "kv_cache_pages{'state': 'cached'}": 1,
            "device_busy_seconds_total": 1.5,
            "kv_cache_group_pages{'group': '0', 'state': 'used', 'window': '0'}": 4,
            "kv_cache_group_pages{'group': '0', 'state': 'cached', 'window': '0'}": 1,
            "kv_cache_group_pages{'group': '1', 'state': 'used', 'window': '64'}": 2,
            "kv_cache_group_pages{'group': 'any', 'state': 'free', 'window': ''}": 1,
            "shared_read_steps_total": 3, "shared_read_rows_total{'choice': 'together'}": 8,
            "shared_read_rows_total{'choice': 'apart'}": 2, "shared_read_tokens_total{'choice': 'together'}": 640,
            "shared_read_tokens_total{'choice': 'apart'}": 32,
            "engine_ready": 1,
        }  # fmt: skip
        assert {name: values[name] for name in expected} == expected

    run_served(body, tokenizer)


def test_labels_do_not_grow_with_what_clients_send(tokenizer):
    async def body(served: Any) -> None:
        before = samples((await scrape(served.model))[0]).keys()
        for number in range(20):
            options = RequestOptions(tenant=f"tenant {number}", priority=number)
            stream = await served.frontend.submit("a", GREEDY, options, request_id=f"evil\nname{number}")
            async for _ in stream:
                pass
        assert samples((await scrape(served.model))[0]).keys() == before

    run_served(body, tokenizer)


def test_the_busy_ratio_is_of_the_last_seconds():
    window = BusyWindow(100.0, seconds=10.0)
    assert window.ratio() == 0.0
    found = []
    for now, busy in ((105.0, 5.0), (110.0, 7.5), (115.0, 7.5), (120.0, 7.5), (180.0, 7.5)):
        window.add(now, busy)
        found.append(window.ratio())
    assert found == [1.0, 0.75, 0.25, 0.0, 0.0]


def test_a_dashboard_asks_for_names_that_exist():
    text, _ = asyncio.run(scrape(ServedModel("echo")))
    shown = {
        sample.name
        for family in prometheus_client.parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    queries = dashboard_queries()
    assert len(queries) > 20
    unknown = {name for query in queries for name in metric_names(query)} - shown
    assert not unknown
    used = {name for query in queries for name in metric_names(query)}
    for name in COUNTERS + GAUGES + HISTOGRAMS:
        assert any(one.startswith(f"jaxserve:{name}") for one in used), name
