"""Measures everything on a GPU machine: `python benchmarks/gpu_suite.py [--quick] [--cpu] [--tune] --output DIR`.

Ends within 9 minutes. Every part runs in a process of its own with a share of the time; one that fails, hangs or breaks
the device costs only itself, and what it measured before is kept. The results are written again after every part:
`suite.json`, `suite.md` and, where matplotlib is installed, plots. Needs no network, and nothing but what jaxserve
needs; what else it compares with (torch, FlashInfer) is used where it is installed. Where jax finds no GPU, the suite
tries itself on the CPU with tiny sizes; its results then say so on every page. See docs/gpu_suite.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import json
import pathlib
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from typing import Any

# The script's own directory comes first on sys.path when it is run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.gpu import pages, plots, process
from benchmarks.gpu.record import FAILED, NOT_RUN, OK, RESTART_STATUS, RUNNING, Settings, dumps

TOTAL_SECONDS = 9 * 60.0
QUICK_SECONDS = 4 * 60.0
REPORT_SECONDS = 20.0  # kept for ending the last part, the last report and the plots
GRACE_SECONDS = 15.0  # beyond a part's share: for the case in progress
PROBE_SECONDS = 90.0
MOST_STARTS = 4  # of a part whose process dies


@dataclasses.dataclass(frozen=True)
class Part:
    """name: of the module under benchmarks/gpu. weight: share of the time that is left when it starts."""

    name: str
    title: str
    weight: float


PARTS = (
    Part("environment", "Machine and ceilings", 8),
    Part("values", "Kernel values against float64", 12),
    Part("decode", "Decode attention", 12),
    Part("step", "Decode step of Llama-3.1-8B", 18),
    Part("prefill", "Prefill attention", 9),
    Part("write", "KV write", 5),
    Part("bundle", "Bundle compiled without a device", 8),
    Part("peers_jax", "Peers in jax", 9),
    Part("peers_torch", "Peers in torch", 5),
    Part("peers_flashinfer", "FlashInfer", 6),
)
TUNING = (PARTS[0], Part("tune", "Tuning", 30))


def say(text: str) -> None:
    """Prints a line. A reader that has gone away (`| head`, a closed terminal) does not end the suite."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = io.StringIO()


class Suite:
    """Runs parts one after another and keeps their results."""

    def __init__(self, settings: Settings, parts: Sequence[Part], deadline: float, tune: bool):
        self._settings = settings
        self._parts = parts
        self._deadline = deadline
        self._tune = tune
        self._output = pathlib.Path(settings.output)
        self._interrupted = False
        self.results: dict[str, dict[str, Any]] = {}
        self.probe: dict[str, Any] = {}

    def run(self) -> None:
        """Runs every part there is time for; an interrupt ends the one in progress and the suite."""
        for number, part in enumerate(self._parts):
            left = self._deadline - REPORT_SECONDS - time.monotonic()
            share = left * part.weight / sum(later.weight for later in self._parts[number:])
            if self._interrupted:
                self.results[part.name] = _entry(part, NOT_RUN, "interrupted")
            elif share < 3:
                self.results[part.name] = _entry(part, NOT_RUN, "time")
            else:
                say(f"== {part.title} (at most {share:.0f} s)")
                self.results[part.name] = self._run(part, share, left)
                say(f"== {part.title}: {self.results[part.name]['status']}")
            self.write(final=False)

    def _run(self, part: Part, share: float, left: float) -> dict[str, Any]:
        start = time.monotonic()
        log = self._output / "logs" / f"{part.name}.log"
        for attempt in range(MOST_STARTS):
            spent = time.monotonic() - start
            if attempt and share - spent < 3:
                break
            command = process.python(
                "benchmarks.gpu.child", part.name, str(self._output / "settings.json"), f"{share - spent:.1f}"
            )
            try:
                # The case in progress when the share is used up may end, as far as there is time at all.
                ended = process.run(
                    command,
                    log,
                    min(share - spent + GRACE_SECONDS, left - spent),
                    env=process.environment(self._settings.gpu),
                    heard=lambda line: say("   " + line),
                )
            except KeyboardInterrupt:
                self._interrupted = True
                return self._collect(part, log, "interrupted", start)
            if ended.status == 0 or ended.status is None:
                return self._collect(part, log, "" if ended.status == 0 else ended.text, start)
            say(f"   {part.name}: its process died ({ended.text})")
            if ended.status != RESTART_STATUS and not self._settings.result(part.name).is_file():
                break  # it did not come as far as a case
        return self._collect(part, log, ended.text, start)

    def _collect(self, part: Part, log: pathlib.Path, trouble: str, start: float) -> dict[str, Any]:
        """A part's entry from the file that it wrote; `trouble` says how its process ended, "" for well."""
        written = self._settings.load(part.name)
        cases, summary = written.get("cases", []), written.get("summary", {})
        for case in cases:
            if case["status"] == RUNNING:
                case |= {"status": FAILED, "reason": trouble or "the process died in this case"}
        if trouble:
            status, reason = FAILED, trouble
            if trouble.startswith("time") and any(case["status"] == OK for case in cases):
                reason = f"{trouble}; what was measured before is kept"
        else:
            status, reason = summary.pop("status", FAILED), summary.pop("reason", "it left no result")
        entry = _entry(part, status, reason) | {"summary": summary, "cases": cases}
        entry["seconds"] = round(time.monotonic() - start, 1)
        if status == FAILED:
            entry["log_tail"] = process.tail(log)
        return entry

    def document(self, complete: bool) -> dict[str, Any]:
        """Everything so far, as it is written."""
        settings = self._settings
        return {
            "benchmark": "gpu_suite",
            "format": 1,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "complete": complete,
            "mode": settings.mode,
            "note": "" if settings.gpu else pages.CPU_NOTE,
            "quick": settings.quick,
            "tune": self._tune,
            "probe": self.probe,
            "machine": report.machine(),
            "versions": report.versions(),
            "settings": {"implementation": settings.implementation, "seed": settings.seed},
            "parts": [self.results.get(part.name) or _entry(part, NOT_RUN, "not yet") for part in self._parts],
        }

    def write(self, *, final: bool) -> None:
        """suite.json and suite.md; at the end the plots too. A fault in one of them does not stop the others."""
        document = self.document(final)
        (self._output / "suite.json").write_text(dumps(document), encoding="utf-8")
        drawn: list[str] = []
        if final:
            drawn, trouble = plots.draw_in_a_process(self._output, max(5.0, self._deadline - time.monotonic() - 2))
            if trouble:
                say(f"no plots: {trouble}")
        try:
            page = pages.markdown(document, drawn)
        except Exception:  # the figures are in suite.json; the parts that follow must not suffer
            page = f"This page could not be made:\n\n{textwrap.indent(traceback.format_exc(), '    ')}"
            say(page)
        (self._output / "suite.md").write_text(page, encoding="utf-8")


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


def probe(output: pathlib.Path, cpu: bool) -> dict[str, Any]:
    """What jax says its default device is, asked in a process of its own; `platform` is "cpu" where that fails."""
    if cpu:
        return {"platform": "cpu", "reason": "asked for by --cpu"}
    answer, log = output / "probe.json", output / "logs" / "probe.log"
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
    options = _parser().parse_args(arguments)
    output = pathlib.Path(options.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    for stale in [*output.glob("parts/*.json"), *output.glob("logs/*.log"), output / "probe.json"]:
        stale.unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    device = probe(output, options.cpu)
    mode = "gpu" if device["platform"] == "gpu" else "cpu"
    say(f"device: {device.get('kind', device['platform'])}{_said(device)}")
    if mode == "cpu":
        say(pages.CPU_NOTE)
    settings = Settings(
        mode=mode,
        quick=options.quick,
        implementation=options.implementation,
        output=str(output),
        bundle=_bundle(options.bundle),
        seed=options.seed,
    )
    (output / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")
    parts = TUNING if options.tune else PARTS
    if options.only:
        parts = tuple(part for part in (*PARTS, *TUNING[1:]) if part.name in options.only)
    seconds = options.seconds or (QUICK_SECONDS if options.quick and settings.gpu else TOTAL_SECONDS)
    suite = Suite(settings, parts, start + seconds, options.tune)
    suite.probe = device
    interrupted = False
    try:
        suite.run()
    except KeyboardInterrupt:  # between two parts
        interrupted = True
    suite.write(final=True)
    states = [suite.results.get(part.name, {}).get("status") for part in parts]
    interrupted |= any(entry["reason"] == "interrupted" for entry in suite.results.values())
    for part, state in zip(parts, states, strict=True):
        say(f"{part.title}: {state} {suite.results.get(part.name, {}).get('reason', '')[:200]}")
    say(f"written: {output / 'suite.md'}, suite.json, in {time.monotonic() - start:.0f} s")
    if device.get("gpu_expected"):
        say(f"no GPU was measured: {device['reason']}")
    return 130 if interrupted else int(FAILED in states or device.get("gpu_expected", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, help="directory of the results; those of an earlier run are replaced"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, in four minutes")
    parser.add_argument("--cpu", action="store_true", help="try the suite itself on the CPU, though there is a GPU")
    parser.add_argument("--tune", action="store_true", help="search configurations and write the tuning table instead")
    parser.add_argument("--bundle", help="directory of compiled programs (default: benchmarks/bundles where it exists)")
    parser.add_argument("--implementation", default="auto", help="of the kernels under test (default: the platform's)")
    parser.add_argument("--only", type=_names, help="comma-separated parts to run, instead")
    parser.add_argument("--seconds", type=float, help="for everything (default: 540; with --quick 240)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    known = {part.name for part in (*PARTS, *TUNING)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown part {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return names


def _bundle(given: str | None) -> str | None:
    if given is not None:
        return str(pathlib.Path(given).resolve())
    shipped = report.ROOT / "benchmarks" / "bundles"
    return str(shipped) if shipped.is_dir() else None


def _said(device: dict[str, Any]) -> str:
    return f" ({device['reason']})" if device.get("reason") else ""


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
