"""Several samples of one prompt: computed and stored once, equal to requests of their own, whatever happens to some."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from jaxserve.config.failpoints import InjectedFaultError
from jaxserve.config.scheduling import FORMATIONS, MODES, PreemptionConfig, SchedulerConfig
from jaxserve.kv_cache.page_pool import PageState
from jaxserve.request import EngineRequest, FinishReason, RequestOptions, RequestStatus
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import PageAllocationError, Scheduler, SequenceUpdate, StepPlan
from jaxserve.scheduler.plan import Wants
from jaxserve.scheduler.policies.named import POLICIES
from tests.budgets import budget
from tests.scheduler.drive import Run, alone, dispatch, make_scheduler, take
from tests.scheduler.history import History

NOTHING = (Wants.NONE,)


def samples(name: str, n: int, prompt: int, output: int, **fields) -> list[EngineRequest]:
    """The samples of one request, as the engine makes them."""
    ids = tuple((7 * place + len(name)) % 101 for place in range(prompt))
    first = EngineRequest(name, ids, **{"max_tokens": output, "temperature": 1.0, "seed": 5, **fields})
    return [first, *[first.sample(index, f"{name}/{index}") for index in range(1, n)]]


@dataclasses.dataclass
class Counts:
    """What a drive took: prompt tokens computed, the most pages in use at a time, copies within the device."""

    prefill: int = 0
    pages: int = 0
    copies: int = 0


def run(scheduler: Scheduler, *groups: list[EngineRequest], abort: dict[int, str] | None = None) -> tuple[Run, Counts]:
    """Drives the groups to their end, checks the accounts after every step. abort: by step, the id of a sample."""
    pool = scheduler.pool
    runner = FakeRunner(num_pages=pool.num_pages, page_size=pool.page_size, num_host_pages=pool.num_host_pages)
    found, counts = Run({one.request_id: [] for group in groups for one in group}, {}, {}, [], scheduler), Counts()
    for group in groups:
        scheduler.add_samples(group, NOTHING * len(group))
    in_flight = None
    for step in range(5_000):
        if abort and step in abort and (update := scheduler.abort(abort[step])) is not None:
            found.reasons[update.sequence.request_id] = FinishReason.ABORT
        plan = scheduler.schedule()
        scheduler.check_integrity()
        dispatched = None if plan is None else (plan, dispatch(runner, plan))
        if plan is not None:
            found.plans.append(plan)
            counts.prefill += plan.num_prefill_tokens
            counts.copies += sum(copy.source_tier is copy.destination_tier for copy in plan.copies)
            counts.pages = max(counts.pages, pool.num_used)
        if in_flight is not None:
            take(found, in_flight[0], scheduler.update(in_flight[0], runner.collect(in_flight[1])))
            scheduler.check_integrity()
        elif plan is None:
            break
        in_flight = dispatched
    assert not scheduler.unfinished, "no progress"
    return found, counts


def check(found: Run, *groups: list[EngineRequest]) -> None:
    """Every sample has the tokens of a request of its own; one that was cut off the first of them."""
    for request in (one for group in groups for one in group):
        tokens, reason = alone(request)
        if found.reasons[request.request_id] is FinishReason.ABORT:
            assert found.tokens[request.request_id] == tokens[: len(found.tokens[request.request_id])]
        else:
            assert (found.tokens[request.request_id], found.reasons[request.request_id]) == (tokens, reason)


def config(seqs: int = 16, batched: int = 16, **more) -> SchedulerConfig:
    return SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=batched, **more)


@pytest.mark.parametrize(("prompt", "copies"), [(33, 15), (32, 0), (1, 15)])
def test_samples_with_slots_share_the_prompt_and_copy_its_last_page(prompt: int, copies: int):
    group = samples("r", 16, prompt, 9)
    found, counts = run(make_scheduler(config(), num_pages=100), group)
    check(found, group)
    assert len({tuple(tokens) for tokens in found.tokens.values()}) > 8, "samples are the same"
    own = -(-(prompt + 8) // 4) - prompt // 4
    assert counts == Counts(prompt, prompt // 4 + 16 * own, copies)
    first = next(plan for plan in found.plans if plan.forks)
    assert len(first.forks) == 15, "they join the step that computes the prompt's last token"
    assert set(first.samples.hidden_rows.tolist()) == {first.num_tokens - 1}


def test_separate_requests_take_what_samples_spare():
    group = samples("r", 16, 33, 9)
    found, counts = run(make_scheduler(config(batched=600), num_pages=300), *[[one] for one in group])
    check(found, group)
    assert (counts.prefill, counts.pages) == (16 * 33, 16 * 11)


@pytest.mark.parametrize("prompt", [29, 32, 33])
def test_samples_that_wait_for_slots_compute_one_token_of_the_prompt(prompt: int):
    group = samples("r", 16, prompt, 9)
    found, counts = run(make_scheduler(config(seqs=4), num_pages=100), group)
    check(found, group)
    assert counts.prefill == prompt + 12
    assert counts.pages <= prompt // 4 + 4 * (-(-(prompt + 8) // 4) - prompt // 4) + 4, "a wave stores the prompt again"


def test_the_prompt_waits_for_those_that_have_no_slot_when_all_others_end_at_once():
    group = samples("r", 5, 30, 3)
    found, counts = run(make_scheduler(config(seqs=4), num_pages=40), group)
    check(found, group)
    assert counts.prefill == 31
    assert counts.copies == 3, "the fifth takes over the pages that nobody has"


def test_other_requests_get_the_pages_that_a_prompt_keeps():
    """Two samples take turns on one slot; a longer request between them needs every page of the pool."""
    group = samples("r", 2, 30, 3, options=RequestOptions(priority=5))
    long = samples("long", 1, 60, 17, options=RequestOptions(priority=0))
    scheduler = make_scheduler(config(seqs=2, batched=64, policy="priority"), num_pages=20)
    scheduler.add(long[0])
    plan = scheduler.schedule()
    assert plan is not None
    runner = FakeRunner(num_pages=20, page_size=4)
    scheduler.update(plan, runner.collect(dispatch(runner, plan)))
    scheduler.abort("long")
    found, _ = run(scheduler, samples("long", 1, 60, 17), group)
    check(found, group, samples("long", 1, 60, 17))


@pytest.mark.parametrize(("mode", "host"), [("recompute", 0), ("swap", 100), ("swap", 9)])
@pytest.mark.parametrize("seqs", [4, 16])
def test_samples_that_are_preempted_go_on_as_if_nothing_had_been(mode: str, host: int, seqs: int):
    group, other = samples("r", 16, 37, 30), samples("s", 3, 22, 25, seed=2**63 - 2)
    settings = config(seqs=seqs, preemption=PreemptionConfig(preemption_mode=mode))
    scheduler = make_scheduler(settings, num_pages=30, num_host_pages=host)
    found, _ = run(scheduler, group, other)
    check(found, group, other)
    assert scheduler.num_preemptions_by_kind[mode] > 3
    assert [one.seed for one in other] == [2**63 - 2, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("victims", [("r",), ("r/3",), ("r", "r/1"), ("r/1", "r/2", "r/3")])
def test_some_are_aborted_and_the_others_go_on(step: int, victims: tuple[str, ...]):
    group = samples("r", 4, 41, 6)
    found, counts = run(
        make_scheduler(config(seqs=3), num_pages=60), group, abort={step + n: name for n, name in enumerate(victims)}
    )
    check(found, group)
    assert sum(reason is FinishReason.ABORT for reason in found.reasons.values()) == len(victims)
    leaders = next(index for index, name in enumerate(["r", "r/1", "r/2"]) if name not in victims or "r" not in victims)
    assert counts.prefill <= 41 * (1 + leaders) + 4, "more than what leaders had computed is computed again"


def test_who_leads_is_replaced_before_the_prompt_is_computed():
    scheduler = make_scheduler(config(seqs=8, batched=8), num_pages=60)
    group = samples("r", 3, 40, 4)
    found, counts = run(scheduler, group, abort={2: "r"})
    check(found, group)
    assert counts.prefill == 16 + 40
    assert found.tokens["r"] == []


def test_one_that_cannot_be_allocated_fails_alone():
    """As a fault of memory would have it, at the fork and at a later admission."""
    for name in ("r/1", "r/5"):

        def hit(request_ids, name=name) -> None:
            if name in request_ids:
                raise InjectedFaultError("no page")

        scheduler = make_scheduler(config(seqs=4), num_pages=60, allocation_hit=hit)
        group = samples("r", 6, 30, 5)
        scheduler.add_samples(group, NOTHING * 6)
        runner = FakeRunner(num_pages=60, page_size=4)
        tokens: dict[str, list[int]] = {one.request_id: [] for one in group}
        for _ in range(200):
            try:
                plan = scheduler.schedule()
            except PageAllocationError:
                update = scheduler.fail(name, "no page")
                assert update is not None
                scheduler.restart(scheduler.lost_copies)
                scheduler.check_integrity()
                continue
            scheduler.check_integrity()
            if plan is None:
                break
            found = Run(tokens, {}, {}, [], scheduler)
            take(found, plan, scheduler.update(plan, runner.collect(dispatch(runner, plan))))
        assert not scheduler.unfinished
        assert {key for key, value in tokens.items() if value != alone(group[[*tokens].index(key)])[0]} == {name}


def test_no_sample_is_added_where_not_all_have_room():
    scheduler = make_scheduler(config(seqs=2, max_num_waiting=3))
    with pytest.raises(ValueError, match=r"0 requests are unfinished; .* max_num_waiting 3 allow no 6 more"):
        scheduler.add_samples(samples("r", 6, 5, 5), NOTHING * 6)
    scheduler.add_samples(samples("r", 4, 5, 5), NOTHING * 4)
    assert scheduler.num_waiting == 4
    with pytest.raises(ValueError, match="request_id 'r/2' is in use"):
        scheduler.add(samples("r", 3, 5, 5)[2])


def test_the_prompt_of_samples_is_charged_to_a_tenant_once():
    scheduler = make_scheduler(config(seqs=3, policy="fair"), num_pages=60)
    run(scheduler, samples("r", 5, 20, 2, options=RequestOptions(tenant="a")))
    # One prompt, a token of it for each of the two that came later, and two tokens of output, twice as dear, of each.
    assert scheduler.policy.service("a") == 20 + 2 + 2 * 2 * 5  # pyright: ignore[reportAttributeAccessIssue]


class SampledHistory(History):
    """A random history in which requests have several samples, and the device loses its pages now and then. Some take
    penalty rows, of which there are few, and some want their prompt scored."""

    def __init__(
        self, rng: random.Random, mode: str, formation: str, policy: str, windows: tuple[int | None, ...] = (None,)
    ):
        super().__init__(rng, mode, formation, policy, windows)
        self.scored: Counter[str] = Counter()

    def take(self, update: SequenceUpdate) -> None:
        if update.prompt_logprobs is not None:
            self.scored[update.sequence.request_id] += len(update.prompt_logprobs)
        super().take(update)

    def check_answers(self) -> None:
        super().check_answers()
        counts = self.scheduler.prefix_counts
        self.events["cached"] += counts.hit_tokens + counts.returned_tokens
        for name, request in self.requests.items():
            wanted = len(request.prompt_token_ids) - 1
            if request.prompt_logprobs is None or not self.tokens[name]:
                wanted = 0
            assert self.scored[name] == wanted, f"{name} has scores of {self.scored[name]} prompt tokens, not {wanted}"

    def arrive(self) -> None:
        rng, number = self.rng, len(self.requests)
        longest = self.capacity if self.config.enable_chunked_prefill else self.config.max_num_batched_tokens
        prompt = rng.randint(1, min(longest, self.capacity, rng.choice((6, 24, 60))))
        output = rng.randint(1, min(rng.choice((4, 24)), self.capacity - prompt + 1))
        first = EngineRequest(
            f"r{number}",
            self.prompt(prompt),
            max_tokens=output,
            temperature=1.0,
            seed=rng.choice((number, 2**63 - 2)),
            frequency_penalty=rng.choice((0.0, 0.5)),
            prompt_logprobs=rng.choice((None, None, 0)),
            min_tokens=rng.randint(0, min(3, output)),
            stop_token_ids=tuple(sorted(rng.sample(range(101), rng.choice((0, 3, 12))))),
            options=RequestOptions(
                priority=rng.choice((0, 0, 3, 12)),
                tenant=rng.choice("ab"),
                deadline=self.now + rng.uniform(0.1, 4.0) if rng.random() < 0.1 else None,
            ),
            arrival_time=self.now,
        )
        names = [f"r{number}/{index}" for index in range(1, rng.choice((1, 2, 3, 5, 9)))]
        requests = [first, *[first.sample(index, name) for index, name in enumerate(names, start=1)]]
        try:
            sequences = self.scheduler.add_samples(requests, [Wants.NONE] * len(requests))
        except ValueError:
            self.events["refused"] += 1
            return
        for request, sequence in zip(requests, sequences, strict=True):
            self.requests[request.request_id], self.sequences[request.request_id] = request, sequence
            self.tokens[request.request_id] = []
            self.order.add(sequence)

    def step(self) -> None:
        if self.rng.random() < 0.01:
            self.lose()
        super().step()

    def lose(self) -> None:
        """The step in flight failed, and with it the content of every page of the device."""
        lost = () if self.in_flight is None else self.in_flight[0].copies
        self.in_flight = None
        self.runner.reset()
        self.events["lost"] += len(self.scheduler.restart(lost))
        self.scheduler.check_integrity()

    def check_plan(self, plan: StepPlan | None) -> None:
        events = self.events
        for sequence in self.scheduler.preempted:
            events["swapped out" if sequence.status is RequestStatus.SWAPPED else "recomputed"] += 1
        if plan is None:
            return
        events["steps"] += 1
        events["forked"] += len(plan.forks)
        events["forked with a penalty row"] += sum(fork.penalty_row is not None for fork in plan.forks)
        rows = [row.penalty_row for row in (*plan.rows, *plan.forks) if row.penalty_row is not None]
        assert sorted(rows) == sorted(write.row for write in plan.penalty_writes)
        events["scored"] += len(plan.scores)
        events["copied"] += sum(copy.source_tier is copy.destination_tier for copy in plan.copies)
        events["swapped in"] += sum(copy.source_tier is PageState.HOST for copy in plan.copies)
        events["joined later"] += sum(row.admit is not None and row.start > 0 for row in plan.chunks)
        events["kept"] += len(self.scheduler._queues.sharing.tables)
        events["withheld"] += self.scheduler._queues.waiting.num_withheld
        assert plan.num_tokens <= plan.token_bucket
        assert len(plan.chunks) + len(plan.forks) <= plan.token_bucket
        assert plan.num_sampled <= plan.row_bucket
        assert len({row.slot for row in (*plan.rows, *plan.forks)}) == plan.num_rows + len(plan.forks)
        assert len(self.scheduler._queues.running) <= self.config.max_num_seqs


class NoOrder:
    """Samples are the same in what decides their order, so any of them may go first."""

    passed = 0

    def add(self, sequence) -> None:
        pass

    def remove(self, sequence) -> None:
        pass


@pytest.mark.parametrize("mode", MODES)
def test_histories_of_samples(mode: str):
    """Whatever mode, policy, formation and limits are in force, every sample ends once with the tokens that a request
    of its seed has alone, and the accounts of pages hold after every step."""
    formations = FORMATIONS if mode != "dynamic" else ("greedy",)
    events: Counter[str] = Counter()

    @budget(25, phases=[Phase.generate])
    @given(st.integers(0, 2**32), st.sampled_from(list(POLICIES)), st.sampled_from(formations))
    def histories(seed: int, policy: str, formation: str) -> None:
        history = SampledHistory(random.Random(f"{mode} {seed}"), mode, formation, policy)
        history.order = NoOrder()  # pyright: ignore[reportAttributeAccessIssue]
        history.run(60)
        events.update(history.events)

    histories()
    kinds = (
        "joined later",
        "kept",
        "withheld",
        "ended stop",
        "ended length",
        "lost",
        "refused",
        "scored",
        "cached",
    )
    more = () if mode == "none" else ("copied", "recomputed", "swapped in", "aborted running")
    forks = () if mode in ("none", "static", "dynamic") else ("forked", "forked with a penalty row")
    for kind in (*kinds, *more, *forks):
        assert events[kind] >= (1 if "row" in kind else 3), f"{kind}: {events}"
