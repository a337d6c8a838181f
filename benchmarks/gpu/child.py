"""Runs one part in this process: `python -m benchmarks.gpu.child PART SETTINGS.json BUDGET SECONDS`."""

from __future__ import annotations

import faulthandler
import importlib
import json
import pathlib
import sys
import time
import traceback

from benchmarks.gpu.record import ABSENT, FAILED, NOT_RUN, OK, AbsentError, Record, Settings


def main(arguments: list[str]) -> int:
    """Writes the part's results; the exit status is 0 unless the part as a whole broke."""
    name, settings_path = arguments[0], pathlib.Path(arguments[1])
    budget, seconds = map(float, arguments[2:])
    faulthandler.enable()
    # What every thread is doing when the time is nearly up: the parent ends a part that hangs a little later.
    faulthandler.dump_traceback_later(seconds + 5, exit=False)
    settings = Settings(**json.loads(settings_path.read_text(encoding="utf-8")))
    record = Record(settings.result(name), time.time() + seconds, budget)
    record.summary.pop("error", None)
    try:
        module = importlib.import_module(f"benchmarks.gpu.{name}_part")
        module.run(settings, record)
        record.summary["status"], record.summary["reason"] = verdict(record)
    except AbsentError as error:
        record.summary |= {"status": ABSENT, "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        record.summary |= {
            "status": FAILED,
            "reason": f"{type(error).__name__}: {error}"[:600],
            "error": traceback.format_exc()[-6000:],
        }
    record.write()
    faulthandler.cancel_dump_traceback_later()
    return 0


def verdict(record: Record) -> tuple[str, str]:
    """The status of a part whose process came to its end, and why."""
    count = {status: sum(case["status"] == status for case in record.cases) for status in (OK, FAILED, ABSENT, NOT_RUN)}
    if count[FAILED]:
        first = next(case for case in record.cases if case["status"] == FAILED)
        return FAILED, f"{count[FAILED]} of {len(record.cases)} cases failed, first {first['case']}: {first['reason']}"
    if count[OK]:
        notes = [f"{count[status]} {status}" for status in (ABSENT, NOT_RUN) if count[status]]
        return OK, f"{count[OK]} cases" + "".join(f", {note}" for note in notes)
    if count[NOT_RUN]:
        return NOT_RUN, "time"
    return ABSENT, record.cases[0]["reason"] if record.cases else "there was nothing to run"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
