"""Measures everything on a GPU machine that is at hand for a quarter of an hour, in two commands:

    python benchmarks/gpu_suite.py --minutes 9 --output DIR
    python benchmarks/gpu_suite.py --minutes 4 --output DIR --resume DIR/suite.json

The order of the parts and the time of each are a table (benchmarks/gpu/parts.py), the most decisive first; the second
command goes on where the results of the first end. Every part runs in a process of its own; one that fails, hangs or
breaks the device costs only itself. `suite.json` is written after every case, `suite.md` after every part. Needs no
network, and nothing but what jaxserve needs; `--kit` names what was brought along (benchmarks/gpu/kit.py). Where jax
finds no GPU, the suite tries itself on the CPU with tiny sizes; its results then say so. See docs/gpu_suite.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Sequence
from typing import Any

# The script's own directory comes first on sys.path when it is run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.gpu import kit
from benchmarks.gpu import suite_pages as pages
from benchmarks.gpu import suite_plots as plots
from benchmarks.gpu import suite_process as process
from benchmarks.gpu.parts import PARTS, TUNING, Part
from benchmarks.gpu.record import FAILED, NOT_RUN, OK, RESTART_STATUS, RUNNING, Settings, dumps

MINUTES = 9.0
REPORT_SECONDS = 15.0  # kept for ending the last part, the last report and the plots
START_SECONDS = 45.0  # of a part's process at most, until its first case
GRACE_SECONDS = 15.0  # beyond a part's budget: for the case in progress
PROBE_SECONDS = 90.0
MOST_STARTS = 4  # of a part whose process dies
LOG_BYTES = 4 * 2**20
TIME_UP = "the command's time was up"
INTERRUPTED = "interrupted"

RESULTS = ("suite.json", "suite.md", "suite.log", "tuning.json", *plots.NAMES)
"""Every file that the suite leaves; what takes more files, or larger ones, may not come back from a lent machine."""


DRAWN = ("decode", "prefill", "step")
"""Parts that plots are made of."""


def say(text: str) -> None:
    """Prints a line. A reader that has gone away (`| head`, a closed terminal) does not end the suite."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = io.StringIO()


class Suite:
    """Runs parts one after another and keeps their results."""

    def __init__(self, settings: Settings, parts: Sequence[Part], deadline: float):
        """deadline: on `time.monotonic`, of everything."""
        self._settings = settings
        self._parts = parts
        self._deadline = deadline
        self._output = pathlib.Path(settings.output)
        self._log = self._output / "suite.log"
        self.results: dict[str, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}

    @property
    def _left(self) -> float:
        return self._deadline - REPORT_SECONDS - time.monotonic()

    def resume(self, document: dict[str, Any]) -> None:
        """Takes the results of an earlier command; a case that it did not come to, or did not end, is run again."""
        for part in self._parts:
            entry = next((one for one in document["parts"] if one["name"] == part.name), None)
            if entry is None or (entry["status"] == NOT_RUN and not entry["cases"]):
                continue
            for one in (entry, *entry["cases"]):
                if one["status"] == RUNNING or one.get("reason") in (INTERRUPTED, TIME_UP):
                    one |= {"status": NOT_RUN, "reason": "not ended by the command before"}
            self.results[part.name] = entry
            path = self._settings.result(part.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dumps({"cases": entry["cases"], "summary": entry["summary"]}), encoding="utf-8")

    def run(self) -> None:
        """Runs every part within its budget; then, while there is time, the cases that had none."""
        for budgeted in (True, False):
            for part in self._parts:
                if not unfinished(self.results.get(part.name), again=budgeted):
                    continue
                if self._left < part.case_seconds + 3:
                    self.results.setdefault(part.name, _entry(part, NOT_RUN, "time"))
                    continue
                budget = part.budget if budgeted else self._left
                say(f"== {part.title} (at most {min(budget, self._left):.0f} s)")
                entry = self.results[part.name] = self._run(part, budget)
                say(f"== {part.title}: {entry['status']}")
                self.write(final=False)
                if entry["reason"] == INTERRUPTED:
                    for later in self._parts:
                        self.results.setdefault(later.name, _entry(later, NOT_RUN, INTERRUPTED))
                    return

    def _run(self, part: Part, budget: float) -> dict[str, Any]:
        start = time.monotonic()
        before = self.results.get(part.name, {}).get("seconds", 0.0)
        trouble = ""
        for attempt in range(MOST_STARTS):
            left, limit = self._left - part.case_seconds, budget - (time.monotonic() - start)
            if attempt and min(left, limit) < 3:
                break
            arguments = (part.name, str(self._settings.file), f"{limit:.1f}", f"{left:.1f}")
            command = process.python("benchmarks.gpu.child", *arguments)
            limit += START_SECONDS + max(GRACE_SECONDS, 2 * part.case_seconds)
            try:
                # The case in progress when the budget is used up may end, as far as there is time at all.
                ended = process.run(
                    command,
                    self._log,
                    min(limit, self._left),
                    env=process.environment(self._settings.gpu),
                    heard=lambda line: self._heard(part, line),
                )
            except KeyboardInterrupt:
                trouble = INTERRUPTED
                break
            trouble = "" if ended.status == 0 else ended.text
            if ended.status is None and self._left < 1:
                trouble = TIME_UP
            if ended.status is None or ended.status == 0:
                break
            say(f"   {part.name}: its process died ({ended.text})")
            if ended.status != RESTART_STATUS and not self._settings.result(part.name).is_file():
                break  # it did not come as far as a case
        entry = self._collect(part, trouble)
        entry["seconds"] = round(before + time.monotonic() - start, 1)
        return entry

    def _heard(self, part: Part, line: str) -> None:
        """A case has ended: the results so far are written, for whatever ends the suite next."""
        self.results[part.name] = _entry(part, RUNNING, "") | self._settings.load(part.name)
        self._write_json(final=False)
        say("   " + line)

    def _collect(self, part: Part, trouble: str) -> dict[str, Any]:
        """A part's entry from the file that it wrote; `trouble` says how its process ended, "" for well."""
        written = self._settings.load(part.name)
        cases, summary = written.get("cases", []), written.get("summary", {})
        cut_short = trouble in (INTERRUPTED, TIME_UP)
        for case in cases:
            if case["status"] == RUNNING:
                reason = trouble or "the process died in this case"
                case |= {"status": NOT_RUN if cut_short else FAILED, "reason": reason}
        if trouble:
            status, reason = NOT_RUN if cut_short else FAILED, trouble
            if trouble.startswith("time") and any(case["status"] == OK for case in cases):
                reason = f"{trouble}; what was measured before is kept"
        else:
            status, reason = summary.pop("status", FAILED), summary.pop("reason", "it left no result")
        entry = _entry(part, status, reason) | {"summary": summary, "cases": cases}
        if status == FAILED:
            entry["log_tail"] = process.tail(self._log)
        if self._log.is_file() and self._log.stat().st_size > LOG_BYTES:
            self._log.write_text(process.tail(self._log, LOG_BYTES // 2), encoding="utf-8")
        return entry

    def document(self, complete: bool) -> dict[str, Any]:
        """Everything so far, as it is written."""
        settings = self._settings
        return {
            "benchmark": "gpu_suite",
            "format": 2,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "complete": complete,
            "mode": settings.mode,
            "note": "" if settings.gpu else pages.CPU_NOTE,
            **self.about,
            "machine": report.machine(),
            "versions": report.versions(),
            "settings": {"implementation": settings.implementation, "seed": settings.seed},
            "parts": [self.results.get(part.name) or _entry(part, NOT_RUN, "not yet") for part in self._parts],
        }

    def _write_json(self, *, final: bool) -> dict[str, Any]:
        document = self.document(final)
        partial = self._output / "suite.json.partial"
        partial.write_text(dumps(document), encoding="utf-8")
        partial.replace(self._output / "suite.json")  # a reader sees the old one or the new one
        return document

    def write(self, *, final: bool) -> None:
        """suite.json and suite.md; at the end the plots too. A fault in one of them does not stop the others."""
        document = self._write_json(final=final)
        drawn: list[str] = []
        if final and any(
            case["status"] == OK for one in document["parts"] if one["name"] in DRAWN for case in one["cases"]
        ):
            drawn, trouble = plots.draw_in_a_process(self._output, max(5.0, self._deadline - time.monotonic() - 2))
            if trouble:
                say(f"no plots: {trouble}")
        try:
            page = pages.markdown(document, drawn)
        except Exception:  # the figures are in suite.json; the parts that follow must not suffer
            page = f"This page could not be made:\n\n{textwrap.indent(traceback.format_exc(), '    ')}"
            say(page)
        (self._output / "suite.md").write_text(page, encoding="utf-8")


def unfinished(entry: dict[str, Any] | None, *, again: bool) -> bool:
    """Whether a part has cases that it did not come to. again: also where it broke before it knew them."""
    if entry is None or entry["status"] in (NOT_RUN, RUNNING):
        return True
    if any(case["status"] == NOT_RUN for case in entry["cases"]):
        return True
    return again and entry["status"] == FAILED and not all(case["status"] == OK for case in entry["cases"])


def _entry(part: Part, status: str, reason: str) -> dict[str, Any]:
    return {
        "name": part.name,
        "title": part.title,
        "status": status,
        "reason": reason,
        "seconds": 0.0,
        "summary": {},
        "cases": [],
    }


def probe(output: pathlib.Path, scratch: pathlib.Path, cpu: bool) -> dict[str, Any]:
    """What jax says its default device is, asked in a process of its own; `platform` is "cpu" where that fails."""
    if cpu:
        return {"platform": "cpu", "reason": "asked for by --cpu"}
    answer, log = scratch / "probe.json", output / "suite.log"
    ended = process.run(
        process.python("benchmarks.gpu.probe", str(answer)),
        log,
        PROBE_SECONDS,
        env=process.environment(gpu=True, extra={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    )
    try:
        return json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        trouble = {"reason": f"jax did not start: {ended.text}", "log_tail": process.tail(log)}
        return {"platform": "cpu", "gpu_expected": True, **trouble}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when no part failed, 1 when one did or jax does not use the GPU, 130 when it was interrupted."""
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    before = _before(parser, options.resume)
    output = pathlib.Path(options.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="gpu_suite_") as scratch:
        return _measure(parser, options, before, output, pathlib.Path(scratch), start)


def _measure(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    before: dict[str, Any] | None,
    output: pathlib.Path,
    scratch: pathlib.Path,
    start: float,
) -> int:
    bundle = options.bundle
    if options.kit is not None:
        site = kit.install_wheels(options.kit, scratch / "site")
        if site is not None:
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        bundle = bundle or kit.unpack_bundle(options.kit, scratch / "bundle")
    device = probe(output, scratch, options.cpu)
    mode = "gpu" if device["platform"] == "gpu" else "cpu"
    say(f"device: {device.get('kind', device['platform'])}{_said(device)}")
    if mode == "cpu":
        say(pages.CPU_NOTE)
    settings = Settings(
        mode=mode,
        implementation=options.implementation,
        output=str(output),
        scratch=str(scratch),
        bundle=str(pathlib.Path(bundle).resolve()) if bundle else None,
        seed=options.seed,
    )
    settings.file.write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")
    parts = TUNING if options.tune else PARTS
    if options.only:
        parts = tuple(part for part in (*PARTS, *TUNING[1:]) if part.name in options.only)
    suite = Suite(settings, parts, start + 60 * options.minutes)
    suite.about = {"tune": options.tune, "probe": device, "commands": []}
    if before is not None:
        _check_same(parser, before, suite.document(False))
        suite.resume(before)
        suite.about["commands"] += before["commands"]
    command = {"minutes": options.minutes, "commit": report.versions()["jaxserve_commit"]}
    suite.about["commands"].append(command)
    interrupted = False
    try:
        suite.run()
    except KeyboardInterrupt:  # between two parts
        interrupted = True
    command["seconds"] = round(time.monotonic() - start, 1)
    suite.write(final=True)
    states = [suite.results.get(part.name, {}).get("status") for part in parts]
    interrupted |= any(entry["reason"] == INTERRUPTED for entry in suite.results.values())
    for part, state in zip(parts, states, strict=True):
        say(f"{part.title}: {state} {suite.results.get(part.name, {}).get('reason', '')[:200]}")
    files = [output / name for name in RESULTS if (output / name).is_file()]
    size = sum(file.stat().st_size for file in files)
    say(f"written: {output / 'suite.md'}, suite.json; {len(files)} files, {size:,} bytes")
    say(f"{time.monotonic() - start:.0f} s")
    if device.get("gpu_expected"):
        say(f"no GPU was measured: {device['reason']}")
    return 130 if interrupted else int(FAILED in states or device.get("gpu_expected", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, help="directory of the results; those of an earlier run are replaced"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default {MINUTES:g})")
    parser.add_argument("--resume", type=pathlib.Path, metavar="FILE", help="suite.json of the command to go on with")
    parser.add_argument("--cpu", action="store_true", help="try the suite itself on the CPU, though there is a GPU")
    parser.add_argument("--tune", action="store_true", help="search configurations and write the tuning table instead")
    parser.add_argument("--kit", type=pathlib.Path, metavar="DIR", help="what benchmarks.gpu.kit packed")
    parser.add_argument("--bundle", help="directory of compiled programs, in place of the kit's")
    parser.add_argument("--implementation", default="auto", help="of the kernels under test (default: the platform's)")
    parser.add_argument("--only", type=_names, help="comma-separated parts to run, instead")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    known = {part.name for part in (*PARTS, *TUNING)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown part {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return names


def _before(parser: argparse.ArgumentParser, path: pathlib.Path | None) -> dict[str, Any] | None:
    """The document to go on with, read before the output directory is emptied."""
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"--resume is {path}, which cannot be read: {error}; give the suite.json of an earlier command")
    if not isinstance(document, dict) or (document.get("benchmark"), document.get("format")) != ("gpu_suite", 2):
        parser.error(f"--resume is {path}, which is no suite.json of format 2; give that of an earlier command")
    return document


def _check_same(parser: argparse.ArgumentParser, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to put figures of different things into one document."""
    differ = [name for name in ("mode", "tune", "settings") if before[name] != now[name]]
    differ += ["device"] if before["probe"].get("kind") != now["probe"].get("kind") else []
    differ += [name for name in ("jax", "jaxserve_commit") if before["versions"][name] != now["versions"][name]]
    if differ:
        parser.error(f"--resume has results of another {', '.join(differ)}; run the suite without it")


def _said(device: dict[str, Any]) -> str:
    return f" ({device['reason']})" if device.get("reason") else ""


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
