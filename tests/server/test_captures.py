"""Captures over HTTP: who may take them, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import io
import pathlib
import tempfile
import zipfile
from typing import Any

import httpx
import pytest

from jaxserve.frontend.captures import CaptureError
from jaxserve.serving import engine_captures
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.http_port.http_server import HttpServer
from tests.server.harness import Served, run_served
from tests.trace_format import check_trace


class NoAdmin:
    def identify(self, credential: str | None) -> Caller:
        return Caller(name="somebody")


def run_with_http(test: Any) -> None:
    async def body(served: Served) -> None:
        http = HttpServer("127.0.0.1", 0, served.model)
        await http.start()
        async with httpx.AsyncClient(base_url=f"http://{http.address}", timeout=60) as client:
            await test(served, client)
        await http.stop()

    run_served(body, None)


def test_files_come_back_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def body(_: Served, client: httpx.AsyncClient) -> None:
        timeline = await client.post("/debug/timeline?seconds=0.1")
        assert timeline.headers["content-type"] == "application/json"
        check_trace(timeline.json())
        profile = await client.post("/debug/profile?seconds=0.1")
        assert profile.headers["content-type"] == "application/zip"
        assert 'filename="profile.zip"' in profile.headers["content-disposition"]
        with zipfile.ZipFile(io.BytesIO(profile.content)) as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {"echo.txt": b"profile"}

    run_with_http(body)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ("timeline?seconds=61", 400, "seconds is 61.0; it must be finite and from 0.1 to 60"),
        ("profile?seconds=11", 400, "seconds is 11.0; it must be finite and from 0.1 to 10"),
        ("profile?seconds=nan", 400, "seconds is nan"),
        ("timeline?seconds=1&seconds=2", 400, "it must be one number"),
        ("timeline?second=1", 400, "'second' is an unknown parameter"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(call, status, words):
    async def body(_: Served, client: httpx.AsyncClient) -> None:
        answer = await client.post(f"/debug/{call}")
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]

    run_with_http(body)


def test_one_at_a_time_and_only_for_administrators():
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        first = asyncio.ensure_future(client.post("/debug/timeline?seconds=0.2"))
        while not served.frontend.captures._running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        second = await client.post("/debug/profile")
        assert second.status_code == 409
        assert "a timeline is being captured" in second.json()["error"]["message"]
        assert (await first).status_code == 200
        served.model.callers = NoAdmin()
        for path in ("timeline", "profile"):
            refused = await client.post(f"/debug/{path}?seconds=0.1")
            assert refused.status_code == 403
            assert "administrator's key" in refused.json()["error"]["message"]

    run_with_http(body)


def test_a_profile_that_is_too_large_is_discarded(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    monkeypatch.setattr(engine_captures, "MAX_PROFILE_BYTES", 99)
    with pytest.raises(CaptureError, match="the profile has 100 bytes; at most 99 are kept: give fewer seconds"):
        engine_captures._zipped(pathlib.Path(tmp_path))
