"""What a part of the suite is told, and the file in which it keeps its results. Standard library only.

The file is written again after every case, so that whatever ends the process leaves what was measured before. A part
that is started again over its own file goes on after the case that ended it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

OK, FAILED, ABSENT, NOT_RUN = "ok", "failed", "absent", "not run"
STATUSES = (OK, FAILED, ABSENT, NOT_RUN)
RUNNING = "running"  # of a case in progress: what a process that died leaves behind

RESTART_STATUS = 75
"""Exit status of a part that asks to be started again: an error of one case has made its process useless."""

# Left out of texts: tracebacks name files below the checkout and the environment.
_PREFIXES = tuple(f"{path}{os.sep}" for path in (pathlib.Path(__file__).resolve().parents[2], sys.prefix))
_UNSUPPORTED = "compute capability"  # what a refusal names that this device cannot do
_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY", "Out of memory")


class AbsentError(Exception):
    """What a case or a part needs is not on this machine; the message says what."""


class NoTimeError(Exception):
    """A case found that less time is left than it takes; it is run again when there is more."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says, and where the parts find each other's results.

    mode: "gpu", or "cpu" for a trial of the suite itself with tiny sizes, whose times say nothing about a GPU.
    implementation: of the kernels under test; "auto" takes the platform's.
    output: directory of the results; scratch: of what the parts tell each other, which does not outlive the command.
    bundle: directory of compiled programs, or None. seed: of every random input.
    """

    mode: str
    implementation: str
    output: str
    scratch: str
    bundle: str | None
    seed: int

    @property
    def gpu(self) -> bool:
        return self.mode == "gpu"

    @property
    def file(self) -> pathlib.Path:
        """Where these settings are written for the parts."""
        return pathlib.Path(self.scratch) / "settings.json"

    def result(self, part: str) -> pathlib.Path:
        """The file that holds a part's results."""
        return pathlib.Path(self.scratch) / "parts" / f"{part}.json"

    def load(self, part: str) -> dict[str, Any]:
        """The results of a part that ran before; {} where there are none."""
        try:
            return json.loads(self.result(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


class Record:
    """The results of one part: cases in the order they ran, and a summary.

    Args:
        path: of the file; what it holds already is kept, and its cases are not run again.
        deadline: Unix time after which no further case is started.
        budget: Seconds from the first case on after which none is started either.
    """

    def __init__(self, path: pathlib.Path, deadline: float, budget: float = math.inf):
        self._path = path
        self._deadline = deadline
        self._budget = budget
        self._recover: Callable[[], bool] = lambda: True
        self.cases: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.cases, self.summary = kept["cases"], kept["summary"]
        for case in self.cases:
            if case["status"] == RUNNING:
                case |= {"status": FAILED, "reason": "the process died in this case"}
        self._done = {case["case"] for case in self.cases if case["status"] != NOT_RUN}
        self.cases = [case for case in self.cases if case["status"] != NOT_RUN]

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.time()

    def after_failure(self, recover: Callable[[], bool]) -> None:
        """`recover` is called after a case that failed: it frees memory and says whether the device still works."""
        self._recover = recover

    def case(self, label: str, run: Callable[[], Mapping[str, Any]], **fields: Any) -> dict[str, Any] | None:
        """Runs one case and keeps what it returns beside `fields`; a failure is kept with its traceback.

        A returned `reason` says why the case failed although it ran: a wrong value, say.
        Returns the case when it is ok, else None. An error that leaves the device unusable ends the process with
        RESTART_STATUS, to be started again without this case.
        """
        if label in self._done:
            return next((case for case in self.cases if case["case"] == label and case["status"] == OK), None)
        # What a process takes to start says nothing of its cases.
        self._deadline, self._budget = min(self._deadline, time.time() + self._budget), math.inf
        row: dict[str, Any] = {"case": label, **fields, "status": RUNNING}
        self.cases.append(row)
        self._done.add(label)
        if self.seconds_left <= 0:
            return self._not_run(row)
        self.write()
        start = time.perf_counter()
        try:
            row |= run()
            row["status"] = FAILED if row.get("reason") else OK
        except NoTimeError:
            return self._not_run(row)
        except AbsentError as error:
            row |= {"status": ABSENT, "reason": str(error)}
        except Exception as error:
            if isinstance(error, ValueError) and _UNSUPPORTED in str(error):
                row |= {"status": ABSENT, "reason": str(error)}
            else:
                self._failed(row, error)
        row["case_seconds"] = round(time.perf_counter() - start, 3)
        self.write()
        print(f"case {label}: {row['status']} ({row['case_seconds']:.1f} s) {_brief(row)}", flush=True)
        return row if row["status"] == OK else None

    def _not_run(self, row: dict[str, Any]) -> None:
        row |= {"status": NOT_RUN, "reason": "time"}
        self._done.discard(row["case"])
        self.write()

    def _failed(self, row: dict[str, Any], error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        row |= {"status": FAILED, "reason": text[:600], "traceback": traceback.format_exc()[-4000:]}
        if any(word in text for word in _MEMORY):
            row["reason"] = f"out of memory: {text[:300]}"
        traceback.clear_frames(error.__traceback__)  # they hold the arrays of the case
        self.write()
        if not self._recover():
            print(f"case {row['case']}: the device is unusable after {text[:600]}", flush=True)
            os._exit(RESTART_STATUS)

    def write(self) -> None:
        """Writes the file as it stands; a reader sees the old one or the new one, never a part."""
        document = {"cases": self.cases, "summary": self.summary}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(dumps(document), encoding="utf-8")
        temporary.replace(self._path)


def dumps(document: Any) -> str:
    """JSON that any reader takes: numpy scalars become numbers, NaN and infinities become their names."""
    return json.dumps(plain(document), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """`value` in the types that JSON has; texts without the paths of this machine's checkout and packages."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        for prefix in _PREFIXES:
            value = value.replace(prefix, "")
        return value
    if isinstance(value, bool | int) or value is None:
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _brief(row: Mapping[str, Any]) -> str:
    wanted = ("reason", "relative_error", "microseconds", "gb_per_s", "share", "tflop_per_s")
    found = [(name, row[name]) for name in wanted if row.get(name) is not None]
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found)
