"""What a step costs the scheduler while others wait: `python -m benchmarks.schedule_cost`.

Microseconds of `expire`, `schedule` and `update` with 256 running and 10, 1,000 and 100,000 waiting, for each policy
and each formation, in two cases:

    steady   every running request decodes; nobody ends, nobody joins
    turn     one request ends and one joins in every step, and one more arrives (its `add` is timed too)

The queue lengths of a setting are measured in turns within one run, so that what else the machine does meets all of
them; the medians count. The cost is flat if the largest median over the smallest is below 1.5.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from typing import Any

import numpy as np

from benchmarks import report
from jaxserve.config.scheduling import FORMATIONS
from jaxserve.config.settings import SchedulerConfig
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.scheduler import Scheduler, StepResult
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.policies.named import POLICIES

RUNNING = 256
WAITING = (10, 1_000, 100_000)
CASES = ("steady", "turn")
BOUND = 1.5
PAGE_SIZE = 16
PROMPTS = (16, 512)
FOREVER = 1_000_000
"""Output tokens of a request that does not end while it is measured."""
STOP = 2
TENANTS = 50
PRIORITIES = 6  # from 0: never so far apart that one takes another's place


class Load:
    """A scheduler with RUNNING requests that decode and `waiting` behind them, and pages for `steps` steps."""

    def __init__(self, policy: str, formation: str, waiting: int, steps: int):
        self._rng = random.Random(1)
        self._number = 0
        self._prompts = [tuple(range(3, 3 + length)) for length in range(*PROMPTS)]
        config = SchedulerConfig(
            max_num_seqs=RUNNING,
            max_num_batched_tokens=1_024,
            policy=policy,
            formation=formation,
            max_num_waiting=waiting + RUNNING + 10,
        )
        pages = RUNNING * (PROMPTS[1] + 100 + steps) // PAGE_SIZE
        buckets = Buckets(powers(config.max_num_batched_tokens), powers(config.max_num_seqs))
        self.scheduler = Scheduler(config, PagePool(pages, PAGE_SIZE), buckets)
        for _ in range(RUNNING):
            self.scheduler.add(self._request())
        while self.scheduler.num_running < RUNNING or self.scheduler._places.running.prefilling:
            self._step()
        for _ in range(waiting):
            self.scheduler.add(self._request())
        self.waiting = waiting

    def measure(self, case: str, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        scheduler, seconds = self.scheduler, []
        for _ in range(steps):
            ending = scheduler._places.running.decoding.sequences[0].request_id if case == "turn" else None
            arriving = self._request() if case == "turn" else None
            begin = time.perf_counter()
            if arriving is not None:
                scheduler.add(arriving)
            scheduler.expire(self._now)
            plan = scheduler.schedule(self._now)
            scheduled = time.perf_counter()
            assert plan is not None
            ids = np.zeros(plan.num_sampled, np.int32)
            if ending is not None:
                ids[plan.decodes.request_ids.index(ending)] = STOP
            resumed = time.perf_counter()
            scheduler.update(plan, StepResult(ids))
            seconds.append(time.perf_counter() - resumed + scheduled - begin)
        assert scheduler.num_waiting >= self.waiting, "the queue is shorter than it should be"
        return seconds

    @property
    def _now(self) -> float:
        return self._number / 1_000

    def _step(self) -> None:
        plan = self.scheduler.schedule(self._now)
        assert plan is not None
        self.scheduler.update(plan, StepResult(np.zeros(plan.num_sampled, np.int32)))

    def _request(self) -> EngineRequest:
        self._number += 1
        return EngineRequest(
            f"{self._number:032x}",
            self._rng.choice(self._prompts),
            max_tokens=FOREVER,
            stop_token_ids=(STOP,),
            options=RequestOptions(f"tenant {self._rng.randrange(TENANTS)}", self._rng.randrange(PRIORITIES)),
            arrival_time=self._now,
        )


def measure(policy: str, formation: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """For each case median, mean and p99 in microseconds by queue length, and the largest median over the smallest."""
    loads = [Load(policy, formation, waiting, len(CASES) * steps * (rounds + 1)) for waiting in WAITING]
    gc.collect()
    gc.freeze()  # what waits is the clients'; the collector looks at it no more in the measured steps
    results = []
    for case in CASES:
        seconds: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
        for load in loads:
            load.measure(case, steps)
        for _ in range(rounds):
            for load in loads:
                seconds[load.waiting] += load.measure(case, steps)
        medians = [float(np.median(values)) for values in seconds.values()]
        microseconds = {
            str(waiting): {
                "p50": float(np.median(values)) * 1e6,
                "mean": float(np.mean(values)) * 1e6,
                "p99": float(np.percentile(values, 99)) * 1e6,
            }
            for waiting, values in seconds.items()
        }
        results.append(
            {
                "policy": policy,
                "formation": formation,
                "case": case,
                "microseconds": microseconds,
                "largest_over_smallest": max(medians) / min(medians),
            }
        )
    gc.unfreeze()
    return results


def main() -> int:
    """Prints and writes the table; the exit status is 1 where a cost is not flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--all", action="store_true", help="every policy with every formation, not with greedy alone")
    options = parser.parse_args()
    pairs = [(policy, "greedy") for policy in POLICIES] + [("fcfs", formation) for formation in FORMATIONS[1:]]
    if options.all:
        pairs = [(policy, formation) for policy in POLICIES for formation in FORMATIONS]
    results = [
        result for policy, formation in pairs for result in measure(policy, formation, options.steps, options.rounds)
    ]
    settings = {"running": RUNNING, "steps": options.steps, "rounds": options.rounds, "prompts": PROMPTS}
    path = report.write("schedule_cost", settings, results)
    rows = [
        (f"{result['policy']}, {result['formation']}, {result['case']}",)
        + tuple(f"{result['microseconds'][str(waiting)]['p50']:.0f}" for waiting in WAITING)
        + (result["largest_over_smallest"],)
        for result in results
    ]
    header = ("policy, formation, case", *(f"{waiting:,} waiting" for waiting in WAITING), "ratio")
    text = f"{report.describe()}\nmicroseconds of schedule + update, {RUNNING} running, median\n\n"
    text += report.table(header, rows)
    (report.ROOT / path).with_suffix(".md").write_text(f"```\n{text}\n```\n", encoding="utf-8")
    print(text)
    print(f"written: {path}")
    steep = [row[0] for row, result in zip(rows, results, strict=True) if result["largest_over_smallest"] >= BOUND]
    return report.fail(f"not flat: {'; '.join(steep)}") if steep else 0


if __name__ == "__main__":
    raise SystemExit(main())
