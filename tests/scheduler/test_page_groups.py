"""The scheduler over models whose layers have windows: several page tables a sequence, over one pool."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from jaxserve.config.scheduling import MODES, AdmissionConfig, PreemptionConfig, SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PageState
from jaxserve.models.layer_groups import pages_held
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler.policies.named import POLICIES
from tests.budgets import budget
from tests.scheduler.drive import alone, drive, make_scheduler, request
from tests.scheduler.history import run_history
from tests.scheduler.test_samples import NoOrder, SampledHistory

WINDOWS = ((None, 5), (7,), (None, 6, 6), (9, 4), (2,), (None, None, 3))
"""Windows of groups, in pages of 4: whole and broken numbers of pages, with and without a group that needs all."""


@pytest.mark.parametrize(("mode", "examples"), [(mode, 24 if mode == "continuous" else 6) for mode in MODES])
def test_histories(mode: str, examples: int):
    """Every request ends once with the tokens that it has alone, and the accounts of every group hold after each
    step: no page is released that a later token attends to."""
    events: Counter[str] = Counter()

    @budget(examples, phases=[Phase.generate])
    @given(st.integers(0, 2**32), st.sampled_from(list(POLICIES)), st.sampled_from(WINDOWS))
    def histories(seed: int, policy: str, windows: tuple[int | None, ...]) -> None:
        events.update(run_history(seed, mode, "greedy", policy, 60, windows))

    histories()
    more = ("recomputed", "swapped out", "swapped in", "hit") if mode == "continuous" else ()
    for kind in ("ended length", "chunked", *more):
        assert events[kind] >= 3, f"{kind}: {events}"


def test_histories_of_samples():
    """The same of requests with several samples, on a device that loses its pages now and then."""
    events: Counter[str] = Counter()

    @budget(24, phases=[Phase.generate])
    @given(st.integers(0, 2**32), st.sampled_from(list(POLICIES)), st.sampled_from(WINDOWS))
    def histories(seed: int, policy: str, windows: tuple[int | None, ...]) -> None:
        history = SampledHistory(random.Random(seed), "continuous", "greedy", policy, windows)
        history.order = NoOrder()  # pyright: ignore[reportAttributeAccessIssue]
        history.run(60)
        events.update(history.events)

    histories()
    for kind in ("forked", "joined later", "kept", "withheld", "copied", "swapped in", "lost", "cached"):
        assert events[kind] >= 3, f"{kind}: {events}"


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_sequence_holds_what_its_windows_reach(windows: tuple[int | None, ...]):
    """While it decodes, whatever its length; while its prompt is computed, the tokens of a chunk more."""
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8)
    scheduler = make_scheduler(config, num_pages=200, group_windows=windows)
    one = request("r", 41, 90)
    seen: list[tuple[int, list[int]]] = []

    def look(step: int) -> None:
        running = scheduler._queues.running
        seen.extend((running.position(sequence), scheduler.num_pages_by_group) for sequence in running.sequences)

    run = drive(scheduler, [one], before_step=look)
    assert run.tokens["r"] == alone(one, windows=windows)[0]
    assert max(position for position, _ in seen) > 120
    for position, held in seen:
        tokens = 8 if position <= 48 else 1
        for window, pages in zip(windows, held, strict=True):
            most = pages_held(window, position, 4, tokens)
            assert pages <= most + (window is None and position % 4 == 0)
    assert scheduler.pool.num_used == 0


def test_more_requests_run_at_once_than_without_groups():
    """As many pages of layers, divided otherwise: two layers of window 8 and two that need all, of 80 tokens each."""
    config = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=64)
    requests = [request(f"r{number}", 60, 20) for number in range(14)]
    most = {}
    for windows, num_pages in (((None,), 81), ((None, 8), 161)):
        scheduler, running = make_scheduler(config, num_pages, group_windows=windows), []
        drive(scheduler, requests, before_step=lambda _, s=scheduler, r=running: r.append(s.num_running))
        most[windows] = max(running)
    assert most[None, 8] > 1.5 * most[None,]


@pytest.mark.parametrize("windows", [(None, 6), (6,)])
@pytest.mark.parametrize("cut", [17, 24, 31])
def test_a_prefix_is_found_where_its_windows_are(windows: tuple[int | None, ...], cut: int):
    """Of a prompt that another began with, all full pages, although its windows have left those in the middle: they are
    kept until their memory is needed."""
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64)
    scheduler = make_scheduler(config, 200, group_windows=windows, content_keys=ContentKeys(b"secret"))
    runner = FakeRunner(num_pages=200, page_size=4, group_windows=windows)
    first = request("first", 50, 20)
    drive(scheduler, [first], runner)
    second = request("second", 60, 5)
    second = type(second)("second", (*first.prompt_token_ids[:cut], *second.prompt_token_ids[cut:60]), max_tokens=5)
    run = drive(scheduler, [second], runner)
    assert run.tokens["second"] == alone(second, windows=windows)[0]
    assert scheduler.prefix_counts.hit_tokens == cut // 4 * 4


def test_a_prefix_is_not_found_where_a_window_lacks_a_page():
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64)
    scheduler = make_scheduler(config, 200, group_windows=(None, 6), content_keys=ContentKeys(b"secret"))
    runner = FakeRunner(num_pages=200, page_size=4, group_windows=(None, 6))
    drive(scheduler, [request("a", 40, 1)], runner)
    pool, cache = scheduler.pool, scheduler._queues.prefix_cache
    found = scheduler._sequence(request("b", 40, 1), 0)  # pyright: ignore[reportArgumentType]
    whole = cache.find(found)
    assert (len(whole), whole.left) == (9, [0, 7])  # the token at 36 attends to those from 31 on
    missing = whole.tables[1][8]
    pool.share([missing])
    pool.uncommit(missing)
    shorter = cache.find(found)
    assert (len(shorter), shorter.left) == (8, [0, 6])
    pool.share([gone := shorter.tables[0][3]])
    pool.uncommit(gone)
    assert len(cache.find(found)) == 3  # the group without a window needs all


@pytest.mark.parametrize("reservation", ["max_tokens", "max_model_len"])
def test_reserved_pages_suffice_for_any_window(reservation: str):
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=8, admission=AdmissionConfig(page_reservation=reservation)
    )
    for windows in WINDOWS[:3]:
        groups = PageGroups(4, windows, 8)
        num_pages = 3 * sum(groups.most(90)) + 1
        scheduler = make_scheduler(config, num_pages, group_windows=windows, max_model_len=90)
        requests = [request(f"r{number}", 20 + 9 * number, 30) for number in range(5)]
        run = drive(scheduler, requests)
        assert all(run.tokens[one.request_id] == alone(one, windows=windows)[0] for one in requests)
        assert scheduler.num_preemptions == 0


def test_swapped_pages_are_those_of_windows():
    config = SchedulerConfig(max_num_seqs=4, preemption=PreemptionConfig(preemption_mode="swap"))
    scheduler = make_scheduler(config, 34, num_host_pages=40, group_windows=(None, 5))
    runner = FakeRunner(num_pages=34, page_size=4, num_host_pages=40, group_windows=(None, 5))
    requests = [request("a", 30, 30), request("bb", 35, 30), request("ccc", 33, 30)]
    run = drive(scheduler, requests, runner)
    assert all(run.tokens[one.request_id] == alone(one)[0] for one in requests)
    moved = Counter(copy.group for plan in run.plans for copy in plan.copies if copy.destination_tier is PageState.HOST)
    assert scheduler.num_preemptions_by_kind["swap"] > 0
    assert 0 < moved[1] <= 3 * scheduler.num_preemptions_by_kind["swap"] < moved[0]


def test_the_longest_request_that_a_pool_holds():
    for windows in WINDOWS:
        groups = PageGroups(4, windows, 8)
        for usable in range(1, 60):
            longest = groups.pool_tokens(usable, 100)
            assert longest == max((n for n in range(1, 101) if sum(groups.most(n)) <= usable), default=0)
    assert PageGroups(4).pool_tokens(30, 50) == 120


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ValueError, match=r"^window of a group is 1; it must be at least 2, or None$"):
        PageGroups(16, (None, 1))
