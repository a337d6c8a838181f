"""Requests that begin alike: they wait for each other where that pays, and go first where their pages are."""

from __future__ import annotations

import pytest

from jaxserve.config.scheduling import AdmissionConfig, PolicyConfig, SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import Scheduler, StepPlan
from tests.scheduler.drive import alone, dispatch, make_scheduler

PREFIX = tuple(range(40))
"""Ten pages."""


def request(name: str, *ids: int, begins: tuple[int, ...] = PREFIX, output: int = 3, **fields) -> EngineRequest:
    return EngineRequest(name, (*begins, *ids), output, **fields)


class Drive:
    """A scheduler over the fake runner, a step at a time."""

    def __init__(self, num_pages: int = 100, step_seconds=None, **settings):
        config = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 16, **settings})
        self.scheduler: Scheduler = make_scheduler(
            config, num_pages=num_pages, content_keys=ContentKeys(), step_seconds=step_seconds
        )
        self.runner = FakeRunner(num_pages=num_pages)
        self.plans: list[StepPlan] = []
        self.tokens: dict[str, list[int]] = {}

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            plan = self.scheduler.schedule()
            self.scheduler.check_integrity()
            if plan is None:
                return
            self.plans.append(plan)
            update = self.scheduler.update(plan, self.runner.collect(dispatch(self.runner, plan)))
            for request_id, token_id in zip(update.request_ids, update.token_ids, strict=True):
                self.tokens.setdefault(request_id, []).append(token_id)
            for other in update.others:
                self.tokens.setdefault(other.sequence.request_id, []).extend(other.token_ids)

    def finish(self, *requests: EngineRequest) -> None:
        """Serves to the end; every request must have the tokens that it has alone."""
        self.step(200)
        assert not self.scheduler.unfinished
        for one in requests:
            assert self.tokens[one.request_id] == alone(one)[0]

    @property
    def computed(self) -> int:
        return sum(plan.num_prefill_tokens for plan in self.plans)

    def first_step(self, name: str) -> int:
        """The index of the first step that computes something of a request."""
        return next(index for index, plan in enumerate(self.plans) if name in plan.request_ids)


def test_a_prefix_that_is_being_computed_is_waited_for_and_computed_once():
    drive, requests = Drive(), [request(f"r{index}", 50 + index, 60) for index in range(4)]
    for one in requests:
        drive.scheduler.add(one)
    drive.step()
    assert drive.scheduler.wait_counts.waited == 3
    assert drive.scheduler.num_waiting == 3
    drive.finish(*requests)
    assert drive.computed == 40 + 4 * 2
    assert drive.scheduler.wait_counts.waited_in_vain == 0


def test_it_is_computed_by_each_where_nobody_waits():
    drive = Drive(admission=AdmissionConfig(wait_for_prefix=False), max_num_batched_tokens=64)
    requests = [request(f"r{index}", 50 + index, 60) for index in range(2)]
    for one in requests:
        drive.scheduler.add(one)
    drive.finish(*requests)
    assert drive.computed == 2 * 42


def test_nobody_waits_where_a_step_takes_as_long_whatever_is_in_it():
    drive = Drive(max_num_batched_tokens=128, step_seconds=lambda shape: 1.0)
    one, other = request("one", 1), request("other", 2)
    drive.scheduler.add(one)
    drive.scheduler.add(other)
    drive.finish(one, other)
    assert (drive.scheduler.wait_counts.waited, drive.scheduler.wait_counts.computed) == (0, 1)
    assert drive.first_step("other") == 0


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_when_the_leader_ends_the_next_one_computes_the_prefix(end):
    drive, others = Drive(), [request(f"r{index}", 50 + index) for index in range(3)]
    for one in (request("leader", 99), *others):
        drive.scheduler.add(one)
    drive.step()
    if end == "abort":
        drive.scheduler.abort("leader")
    else:
        drive.scheduler.fail("leader", "broken")
    drive.finish(*others)
    assert drive.scheduler.wait_counts.waited_in_vain == 3
    assert drive.scheduler.wait_counts.waited == 3 + 2
    assert drive.computed == 16 + (40 - 16) + 3, "what the leader had committed is found"


def test_one_that_waits_can_be_aborted_and_expires_by_its_deadline():
    drive = Drive()
    late = RequestOptions(deadline=5.0)
    for one in (request("leader", 99), request("a", 50), request("b", 51, options=late), request("c", 52)):
        drive.scheduler.add(one)
    drive.step()
    assert drive.scheduler.wait_counts.waited == 3
    assert drive.scheduler.abort("a") is not None
    assert [update.sequence.request_id for update in drive.scheduler.expire(6.0)] == ["b"]
    drive.finish(request("leader", 99), request("c", 52))
    assert drive.computed == 41 + 1


def test_other_tenants_salts_and_requests_without_caching_wait_for_nobody():
    drive = Drive(max_num_batched_tokens=64)
    for index, options in enumerate(
        (
            RequestOptions(tenant="a"),
            RequestOptions(tenant="b"),
            RequestOptions(tenant="a", cache_salt="s"),
            RequestOptions(tenant="a", prefix_caching=False),
        )
    ):
        drive.scheduler.add(request(f"r{index}", 50, options=options))
    drive.step(200)
    assert drive.computed == 4 * 41
    assert drive.scheduler.wait_counts.waited == 0
    assert drive.scheduler.prefix_counts.queries == 3


def test_a_chat_finds_its_own_answer():
    drive = Drive()
    first = request("turn 0", output=13)
    drive.scheduler.add(first)
    drive.finish(first)
    second = request("turn 1", *drive.tokens["turn 0"], 7, 7, 7)
    drive.scheduler.add(second)
    before = drive.computed
    drive.finish(second)
    assert drive.computed - before == 56 - 52, "all full pages whose tokens were computed are found"
    assert drive.scheduler.prefix_counts.hit_tokens == 52


def test_the_last_token_is_computed_again_where_all_of_a_prompt_is_cached():
    drive = Drive()
    for name in ("a", "b"):
        one = request(name, output=1)
        drive.scheduler.add(one)
        drive.finish(one)
    assert [plan.num_prefill_tokens for plan in drive.plans] == [16, 16, 8, 4]


def test_after_a_flush_nothing_is_found_and_running_requests_share_again():
    drive = Drive(num_pages=40)
    running = request("running", output=20)
    drive.scheduler.add(running)
    drive.step(8)
    assert drive.scheduler.flush_prefix_cache() == 0, "it holds all of its pages"
    other, before = request("other", 7, output=1), drive.computed
    drive.scheduler.add(other)
    drive.step(3)
    assert drive.computed - before == 41
    drive.finish(running, other)
    again = request("again", *drive.tokens["running"][:16], 9)
    drive.scheduler.add(again)
    before = drive.computed
    drive.finish(again)
    assert drive.computed - before == 1, "what ran during the flush is found from the first page on"


def test_requests_whose_prefix_is_cached_go_first_under_longest_prefix_match():
    drive = Drive(policy="longest-prefix-match", max_num_seqs=1, ordering=PolicyConfig(prefix_match_seconds=10.0))
    warm = request("warm", 1)
    drive.scheduler.add(warm)
    drive.finish(warm)
    cold = [request(f"cold {at}", 70, 71, begins=(90 + at,) * 40, arrival_time=float(at)) for at in range(3)]
    found = [request(f"found {at}", 80 + at, arrival_time=3.0 + at) for at in range(3)]
    for one in (*cold, *found):
        drive.scheduler.add(one)
    drive.finish(*cold, *found)
    order = sorted((one.request_id for one in (*cold, *found)), key=drive.first_step)
    assert order == ["found 0", "found 1", "found 2", "cold 0", "cold 1", "cold 2"]


def test_nobody_is_overtaken_by_what_came_prefix_match_seconds_later():
    drive = Drive(policy="longest-prefix-match", max_num_seqs=1, ordering=PolicyConfig(prefix_match_seconds=2.0))
    warm = request("warm", 1)
    drive.scheduler.add(warm)
    drive.finish(warm)
    cold = request("cold", 70, begins=(90,) * 40, arrival_time=10.0)
    sooner, later = (request(f"at {at}", 80, arrival_time=at) for at in (11.9, 12.1))
    for one in (cold, sooner, later):
        drive.scheduler.add(one)
    drive.finish(cold, sooner, later)
    assert drive.first_step("at 11.9") < drive.first_step("cold") < drive.first_step("at 12.1")


def test_what_is_committed_meanwhile_moves_a_waiting_request_up():
    drive = Drive(policy="longest-prefix-match", max_num_seqs=1)
    running = request("running", output=20)
    drive.scheduler.add(running)
    drive.step()
    first, second = request("first", begins=(90,) * 40), request("second", 5)
    for at, one in enumerate((first, second)):
        drive.scheduler.add(EngineRequest(one.request_id, one.prompt_token_ids, 3, arrival_time=float(at)))
    drive.finish(running)
    assert drive.first_step("second") < drive.first_step("first")


def test_tenants_take_turns_whatever_their_prefixes():
    drive = Drive(policy="longest-prefix-match", max_num_seqs=1, max_num_batched_tokens=64)
    for tenant in "ab":
        one = request(f"warm {tenant}", options=RequestOptions(tenant=tenant))
        drive.scheduler.add(one)
        drive.finish(one)
    requests = [
        request(f"{tenant}{index}", 50 + index, begins=begins, options=RequestOptions(tenant=tenant))
        for tenant, begins in (("a", PREFIX), ("b", (9,) * 40))
        for index in range(4)
    ]
    for one in requests:
        drive.scheduler.add(one)
    drive.finish(*requests)
    order = sorted((one.request_id for one in requests), key=drive.first_step)
    assert order.index("b0") < 2, "a tenant without hits is not starved"
    policy = drive.scheduler.policy
    assert policy.service("a") < policy.service("b"), "cached tokens are not charged"  # pyright: ignore[reportAttributeAccessIssue]


def test_deadlines_are_predicted_without_what_is_cached():
    """Twenty steps of a second do not fit ten seconds; the one that is left when the prefix is cached does."""
    drive = Drive(max_num_batched_tokens=8, max_num_seqs=8)
    long = tuple(range(100)) + tuple(range(60))
    one = request("a", begins=long, output=1)
    drive.scheduler.add(one)
    now = 0.0
    while drive.scheduler.unfinished:
        now += 1.0
        plan = drive.scheduler.schedule(now)
        if plan is not None:
            drive.scheduler.update(plan, drive.runner.collect(dispatch(drive.runner, plan)), now)
    options = RequestOptions(deadline=now + 10.0)
    drive.scheduler.add(request("cold", begins=(7, *long), output=1, options=options, arrival_time=now))
    drive.scheduler.add(request("warm", begins=long, output=1, options=options, arrival_time=now))
    assert [update.sequence.request_id for update in drive.scheduler.expire(now)] == ["cold"]
