"""The page at `/`: what is served, that it needs nothing from elsewhere, and the live figures behind it."""

import asyncio
import contextlib
import html.parser
import json
import re

import fastapi
import httpx
import pytest

from jaxserve.engine.messages import EngineStats
from jaxserve.serving.http_port import live_stats
from jaxserve.serving.http_port.guard import HttpGuard
from jaxserve.serving.http_port.live_stats import MAX_WATCHERS, LiveStats, Totals, quantiles, sample
from jaxserve.serving.http_port.routes import live, page
from jaxserve.serving.problem import UnauthenticatedError
from jaxserve.serving.served_model import ServedModel
from jaxserve.telemetry.histograms import Histogram, HistogramCounts
from jaxserve.telemetry.request_meter import RequestMeter
from tests.server.fakes import WAIT_SECONDS
from tests.server.harness import GREEDY, serving

SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def get(path: str, method: str = "GET", **headers: str) -> httpx.Response:
    """The response of an application that has the page alone."""

    async def ask() -> httpx.Response:
        app = fastapi.FastAPI()
        app.include_router(page.router())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


class Document(html.parser.HTMLParser):
    """Collects the elements of a document, and the text inside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside in ("script", "style"):
            self.inline += data.strip()


@pytest.mark.parametrize("name", page.TYPES)
def test_files_have_their_type_and_a_strict_policy(name):
    answer = get("/" if name == "index.html" else f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (page.DIRECTORY / name).read_bytes()
    expected = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].split(";")[0] == expected[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_folder_holds_what_is_served_and_nothing_else():
    assert {path.name for path in page.DIRECTORY.iterdir()} == set(page.TYPES)
    assert get("/page/../routes/page.py").status_code == 404
    assert get("/page/nothing.js").status_code == 404


@pytest.mark.parametrize("name", page.TYPES)
def test_nothing_comes_from_elsewhere(name):
    text = (page.DIRECTORY / name).read_text(encoding="utf-8")
    assert not re.findall(
        r"(?:[a-z]+:)?//[\w.-]+\.\w+[^\s\"'`]*", re.sub(r"(?m)^\s*//.*$", "", text).replace(SVG_NAMESPACE, "")
    )
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?#)", text)
    # What comes from a server or a model is put in as text.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_the_document_has_no_inline_code_and_labels_everything():
    document = Document((page.DIRECTORY / "index.html").read_text(encoding="utf-8"))
    assert document.inline == ""
    labels = {attributes.get("for") for tag, attributes in document.elements if tag == "label"}
    inside_labels = re.findall(
        r"<label[^>]*>[^<]*<(?:input|textarea) id=\"([\w-]+)\"", (page.DIRECTORY / "index.html").read_text()
    )
    files = []
    for tag, attributes in document.elements:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if tag in ("input", "textarea"):
            assert attributes["id"] in labels | set(inside_labels)
        files += [attributes[name] for name in ("src", "href") if name in attributes and attributes[name][0] != "#"]
    assert set(files) <= {f"page/{name}" for name in page.TYPES}
    for path in files:
        assert get(f"/{path}").status_code == 200
    assert ("html", {"lang": "en"}) in document.elements


def test_scripts_find_the_elements_and_modules_that_they_name():
    text = (page.DIRECTORY / "index.html").read_text(encoding="utf-8")
    for name in page.TYPES:
        if name.endswith(".js"):
            code = (page.DIRECTORY / name).read_text(encoding="utf-8")
            for identifier in re.findall(r"element\(\"([\w-]+)\"\)", code):
                assert f'id="{identifier}"' in text
            for module in re.findall(r"from \"\./([\w.]+)\"", code):
                assert module in page.TYPES


def test_a_file_that_the_browser_has_is_not_sent_again():
    tag = get("/").headers["etag"]
    answer = get("/", **{"if-none-match": tag})
    assert (answer.status_code, answer.content) == (304, b"")
    assert get("/", **{"if-none-match": '"other"'}).status_code == 200
    assert get("/", method="HEAD").headers["content-type"].startswith("text/html")


class Stream:
    """One request to /live of an application, driven by hand."""

    def __init__(self, app, **headers: str):
        self.messages: asyncio.Queue[dict] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.blocked = False
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": "/live", "headers": encoded, "query_string": b""}
        self.task = asyncio.ensure_future(app(scope | {"root_path": "", "scheme": "http"}, self._receive, self._send))

    async def _receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if self.blocked:
            await asyncio.Event().wait()
        self.messages.put_nowait(message)

    async def start(self) -> dict:
        message = await self.messages.get()
        assert message["type"] == "http.response.start"
        return message

    async def event(self) -> tuple[str, object]:
        """The name and the data of the next event."""
        body = (await self.messages.get())["body"].decode()
        match = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", body)
        assert match, body
        return match[1], json.loads(match[2])

    async def samples_until(self, condition) -> list[dict]:
        seen: list[dict] = []
        while not any(condition(one) for one in seen):
            name, data = await self.event()
            seen += data if name == "samples" else []
        return seen

    async def leave(self) -> None:
        self.gone.set()
        await self.task


@contextlib.asynccontextmanager
async def watched(served: ServedModel):
    """An application with the live figures of a model, sampled without rest."""
    stats = LiveStats(served, interval=0.002)
    app = fastapi.FastAPI()
    app.include_router(live.router(served, stats))
    yield app, stats


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test, WAIT_SECONDS))


def test_live_figures_of_a_server_that_starts_serves_and_drains(tokenizer):
    async def body():
        async with serving(tokenizer) as parts:
            loading = ServedModel("echo")
            async with watched(loading) as (app, _):
                stream = Stream(app)
                headers = dict((await stream.start())["headers"])
                assert headers[b"content-type"].startswith(b"text/event-stream")
                assert headers[b"cache-control"] == b"no-store"
                name, samples = await stream.event()
                assert (name, samples[0]["state"]) == ("samples", "starting")
                loading.serve(parts.frontend, tokenizer)
                while (event := await stream.event())[0] == "samples":
                    pass
                assert event[0] == "server"
                assert event[1]["model"] == "echo"
                assert (event[1]["max_model_len"], event[1]["num_pages"], event[1]["max_num_seqs"]) == (512, 16, 8)
                await stream.samples_until(lambda one: one["state"] == "ready")
                loading.drain()
                await stream.samples_until(lambda one: one["state"] == "draining")
                parts.engine.die("out of memory")
                await stream.samples_until(lambda one: one["state"] == "failed")
                await stream.task  # nothing follows

    run(body())


def test_live_figures_follow_requests(tokenizer):
    async def body():
        async with serving(tokenizer) as parts, watched(parts.model) as (app, _):
            stream = Stream(app)
            await stream.start()
            await stream.samples_until(lambda one: one["state"] == "ready")
            parts.engine.pause()
            answer = asyncio.ensure_future(parts.client.generate_text("abcd", GREEDY))
            await parts.until(parts.engine.wait_for_requests, 1)
            parts.engine.allow(1)
            seen = await stream.samples_until(lambda one: one["first_token"])
            assert [one["first_token"]["count"] for one in seen if one["first_token"]] == [1]
            await stream.samples_until(lambda one: one["running"] == 1)
            parts.engine.resume()
            seen = await stream.samples_until(lambda one: one["running"] == 0)
            await answer
            seen += await stream.samples_until(lambda one: one["generation_rate"] == 0)
            assert sum(one["gap"]["count"] for one in seen if one["gap"]) == 4  # five tokens
            times = [one["time"] for one in seen]
            assert times == sorted(set(times))
            # A page that comes later finds what was before it.
            later = Stream(app)
            await later.start()
            assert (await later.event())[0] == "server"
            history = (await later.event())[1]
            assert any(one["first_token"] for one in history)
            for each in (stream, later):
                await each.leave()

    run(body())


def test_live_streams_are_few_and_a_client_that_goes_away_frees_its_own(tokenizer):
    async def body():
        served = ServedModel("echo")
        async with watched(served) as (app, stats):
            streams = [Stream(app) for _ in range(MAX_WATCHERS)]
            for stream in streams:
                await stream.start()
            refused = Stream(app)
            start = await refused.start()
            assert start["status"] == 429
            assert dict(start["headers"])[b"retry-after"].isdigit()
            error = json.loads((await refused.messages.get())["body"])["error"]
            assert f"at most {MAX_WATCHERS} may be" in error["message"]
            await streams.pop().leave()
            assert stats.num_watchers == MAX_WATCHERS - 1
            again = Stream(app)
            assert (await again.start())["status"] == 200
            for stream in (*streams, again):
                await stream.leave()
            assert stats.num_watchers == 0

    run(body())


def test_a_client_that_reads_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(live, "_SEND_SECONDS", 0.01)

    async def body():
        async with watched(ServedModel("echo")) as (app, stats):
            stream = Stream(app)
            await stream.start()
            stream.blocked = True
            await stream.task
            assert stats.num_watchers == 0

    run(body())


def test_sampling_ends_when_nobody_has_looked_for_long(monkeypatch):
    monkeypatch.setattr(live_stats, "MAX_SAMPLES", 3)

    async def body():
        stats = LiveStats(ServedModel("echo"), interval=0.0)
        others = asyncio.all_tasks()
        with stats.watching():
            (sampling,) = asyncio.all_tasks() - others
        await sampling
        with stats.watching():  # and begins anew
            assert await anext(aiter(stats.follow()))

    run(body())


def test_live_figures_need_a_key_where_there_are_keys():
    class Keys:
        def identify(self, credential):
            raise UnauthenticatedError(f"{credential} is no key")

    async def body():
        served = ServedModel("echo", Keys())
        async with watched(served) as (app, _):
            stream = Stream(HttpGuard(app, served), authorization="Bearer k")
            assert (await stream.start())["status"] == 401
            assert b"Bearer k is no key" in (await stream.messages.get())["body"]

    run(body())


def test_a_sample_is_the_difference_of_two_readings():
    metrics = RequestMeter()
    tokens = {"prefill_tokens": HistogramCounts((), 100.0), "decode_tokens": HistogramCounts((), 10.0)}
    before = Totals(10.0, EngineStats(num_steps=3, padding_tokens=7, step_histograms=tokens), metrics.histograms())
    metrics.observe("time_to_first_token_seconds", 0.5)
    metrics.observe("inter_token_latency_seconds", 0.0125)
    tokens = {"prefill_tokens": HistogramCounts((), 300.0), "decode_tokens": HistogramCounts((), 30.0)}
    stats = EngineStats(num_steps=7, padding_tokens=27, generation_tokens=50, num_running=4, step_histograms=tokens)
    found = sample("ready", before, Totals(12.0, stats, metrics.histograms()))
    assert (found.prefill, found.decode, found.padding) == (50.0, 5.0, 5.0)
    assert (found.prefill_rate, found.generation_rate, found.step_rate, found.running) == (100.0, 25.0, 2.0, 4)
    assert found.first_token is not None
    assert found.gap is not None
    assert found.gap.count == 1
    assert 10.0 < found.gap.p50 < 15.0  # its bucket


def test_quantiles_are_those_of_the_values_to_the_width_of_a_bucket():
    bounds = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    values = [0.0005 * (1 + index % 180) for index in range(1000)]
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    found = quantiles(bounds, histogram.read().counts)
    assert found is not None
    ordered = sorted(values)
    for share, estimate in ((0.50, found.p50), (0.95, found.p95), (0.99, found.p99)):
        exact = ordered[round(share * 1000) - 1]
        low = max(bound for bound in (0.0, *bounds) if bound < exact)
        high = min(bound for bound in bounds if bound >= exact)
        assert 1000 * low <= estimate <= 1000 * high
    assert quantiles((1.0, 2.0), (0, 4, 0)) == live_stats.Quantiles(4, 1500.0, 1950.0, 1990.0)
    assert quantiles((1.0, 2.0), (0, 0, 1)) == live_stats.Quantiles(1, 2000.0, 2000.0, 2000.0)
    assert quantiles((1.0,), (0, 0)) is None
