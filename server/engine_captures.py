"""Makes files of captures: a timeline that Perfetto opens, and a zip of a profile."""

from __future__ import annotations

import asyncio
import io
import logging
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Sequence

import msgspec

from jaxserve.config.checks import between
from jaxserve.config.shown import shown
from jaxserve.frontend.captures import CapturedTimeline, CaptureError
from jaxserve.serving.served_model import ServedModel
from jaxserve.telemetry.chrome_trace import chrome_trace

LEAST_SECONDS = 0.1
MOST_SECONDS = 60.0
MOST_PROFILE_SECONDS = 10.0
"""Maximum seconds of a profile: one of a busy engine has about 8 MB for each, and takes longer to be written."""

DEFAULT_SECONDS = 2.0

MAX_PROFILE_BYTES = 256 * 1024 * 1024
"""Maximum bytes of a profile's files; a larger one is discarded."""

_log = logging.getLogger("jaxserve.server")


def seconds_of(query: Sequence[tuple[str, str]], most: float) -> float:
    """Returns the seconds, `most` at most, that the parameters of a query ask for. Raises ValueError."""
    if unknown := [name for name, _ in query if name != "seconds"]:
        raise ValueError(f"{shown(unknown[0])} is an unknown parameter of the query; 'seconds' is the only one")
    values = [value for _, value in query] or [str(DEFAULT_SECONDS)]
    try:
        (seconds,) = map(float, values)
    except ValueError:
        raise ValueError(f"seconds is {shown(', '.join(values))}; it must be one number") from None
    between("seconds", seconds, LEAST_SECONDS, most)
    return seconds


async def timeline(served: ServedModel, seconds: float) -> bytes:
    """Captures the engine's events for `seconds`; returns JSON in the trace-event format.

    Raises CaptureError, UnavailableError or EngineDeadError.
    """
    captured = await served.started().captures.timeline(seconds)
    # In a thread, because a large capture takes a second or two to format.
    return await asyncio.to_thread(_as_json, captured, served.name)


def _as_json(captured: CapturedTimeline, model: str) -> bytes:
    return msgspec.json.encode(chrome_trace(captured.events, dropped=captured.dropped, model=model))


async def profile(served: ServedModel, seconds: float) -> bytes:
    """Profiles the engine's process for `seconds`; returns a zip of the files.

    Raises CaptureError, UnavailableError or EngineDeadError.
    """
    captures = served.started().captures
    directory = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-profile-"))  # for this user alone
    try:
        await captures.profile(str(directory), seconds)
        return await asyncio.to_thread(_zipped, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=False, onerror=_not_removed)


def _zipped(directory: pathlib.Path) -> bytes:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > MAX_PROFILE_BYTES:
        raise CaptureError(f"the profile has {size} bytes; at most {MAX_PROFILE_BYTES} are kept: give fewer seconds")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in files:
            archive.write(path, path.relative_to(directory).as_posix())
    return buffer.getvalue()


def _not_removed(function: object, path: str, error: object) -> None:
    _log.warning("%s, of a profile, cannot be removed: %s", path, error)
