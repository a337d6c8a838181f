"""What a step costs the scheduler: counted in lines of Python, not timed."""

from __future__ import annotations

import numpy as np

from jaxserve.config.settings import SchedulerConfig
from jaxserve.request import EngineRequest
from jaxserve.scheduler import StepPlan, StepResult
from tests.scheduler.drive import make_scheduler
from tests.scheduler.test_page_pool_cost import executed_lines


def cost_of_a_step(running: int, waiting: int) -> tuple[int, int]:
    """Lines that `schedule` and `update` execute in a step in which every running sequence decodes and none begins,
    ends or takes a page."""
    config = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=max(8, running), max_num_waiting=waiting + 1)
    scheduler = make_scheduler(config, num_pages=running + 1, page_size=64)
    for number in range(running + waiting):
        scheduler.add(EngineRequest(str(number), (1,), max_tokens=50, stop_token_ids=(2, 3)))
    plans: list[StepPlan] = []

    def schedule() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        plans.append(plan)

    def update() -> None:
        plan = plans.pop(0)
        scheduler.update(plan, StepResult(np.ones(plan.num_sampled, np.int32)))

    for _ in range(3):
        schedule()
        update()
    costs = executed_lines(schedule), executed_lines(update)
    assert (scheduler.num_running, scheduler.num_waiting) == (running, waiting)
    scheduler.check_integrity()
    return costs


def test_the_cost_does_not_grow_with_the_queue():
    assert cost_of_a_step(16, waiting=1) == cost_of_a_step(16, waiting=3_000)


def test_a_decoding_row_costs_no_more_than_one_pass_of_a_loop():
    few, many = cost_of_a_step(16, waiting=0), cost_of_a_step(256, waiting=0)
    assert many[0] == few[0]  # schedule: array operations alone
    assert many[1] - few[1] == 2 * (256 - 16)  # update: each row's id goes to its sequence
