"""Who is let in: against counts made anew from a list of all requests, and in simulations of an overload."""

from __future__ import annotations

import collections
import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.queue_limits import QueueConfig, TenantConfig
from jaxserve.frontend.admission import Admission, Engine, Ticket
from jaxserve.frontend.delta import DeadlineError, QueueFullError
from jaxserve.request import FinishReason

ENGINE = Engine(max_num_seqs=2, max_open=6)
LIMITED = TenantConfig(max_requests=3, max_waiting_requests=2, max_waiting_tokens=50)


def refusal(admission: Admission, name: str, prompt=5, output=5, now=0.0, **options) -> QueueFullError:
    with pytest.raises(QueueFullError) as caught:
        admission.check(name, prompt, output, now, **options)
    return caught.value


def retry_seconds(admission: Admission, name: str, prompt: int, now: float) -> float | None:
    """When a refused request may come again; None for one that is let in."""
    try:
        admission.check(name, prompt, 1, now)
    except QueueFullError as error:
        return error.retry_seconds
    return None


def admit(admission: Admission, name: str, prompt=5, output=5, now=0.0) -> Ticket:
    admission.check(name, prompt, output, now)
    return admission.accept(name, prompt, output, now)


# ---- bounds against a model ------------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "start", "end"]),
        st.sampled_from("abc"),
        st.integers(1, 40),
        st.floats(0.0, 2.0),
    ),
    max_size=80,
)


@given(OPERATIONS)
def test_bounds_hold_and_counts_are_those_of_a_list(operations):
    config = QueueConfig(max_waiting_tokens=100, tenants={"a": LIMITED, "b": TenantConfig(weight=2.0)})
    admission, now = Admission(config, ENGINE), 0.0
    live: list[Ticket] = []
    for kind, name, tokens, pause in operations:
        now += pause
        waiting = [one for one in live if one.started is None]
        if kind == "ask":
            mine = [one for one in live if one.tenant.name == name]
            if (seconds := retry_seconds(admission, name, tokens, now)) is not None:
                assert config.min_retry_seconds <= seconds <= config.max_retry_seconds
                assert live, "an empty server refuses nobody"
            else:
                limited = [one for one in mine if one.started is None] if name == "a" else []
                assert len(live) < ENGINE.max_open
                assert name != "a" or len(mine) < 3
                assert len(limited) < 2
                for some, most in ((waiting, 100), (limited, 50)):
                    assert not some or sum(one.tokens for one in some) + tokens + 1 <= most
                live.append(admission.accept(name, tokens, 1, now))
        elif kind == "start" and waiting:
            admission.started(waiting[tokens % len(waiting)], now)
        elif kind == "end" and live:
            admission.ended(live.pop(tokens % len(live)), 1, now)
        waiting = [one for one in live if one.started is None]
        counts = (admission.num_open, admission.num_waiting, admission.waiting_tokens)
        assert counts == (len(live), len(waiting), sum(one.tokens for one in waiting))


def test_each_refusal_names_limit_value_and_remedy():
    tenants = {"a": LIMITED, "slow": TenantConfig(requests_per_minute=2), "small": TenantConfig(tokens_per_minute=60)}
    admission = Admission(QueueConfig(max_waiting_tokens=100, tenants=tenants), Engine(4, 20))
    admit(admission, "a", 30, 5)
    error = refusal(admission, "a", 10, 6)
    assert str(error).startswith("tenant 'a' has 35 waiting tokens of prompts and max_tokens; with 16 of this request")
    assert "max_waiting_tokens 50" in str(error)
    first = admit(admission, "a")
    assert "has 2 waiting requests; at most 2 (max_waiting_requests)" in str(refusal(admission, "a"))
    admission.started(first, 0.0)
    admission.started(admit(admission, "a", 1, 1), 0.0)
    assert "has 3 unfinished requests; at most 3 (max_requests)" in str(refusal(admission, "a"))
    for _ in range(2):
        admission.ended(admit(admission, "slow"), 5, 0.0)
    error = refusal(admission, "slow", now=3.0)
    assert str(error) == "tenant 'slow' is over its requests_per_minute of 2: its next request may come in 27.0 s"
    assert error.retry_seconds == pytest.approx(27.0)
    admit(admission, "small", 30, 20)
    error = refusal(admission, "small", 10, 10, now=0.0)
    assert "tokens_per_minute of 60: the 20 tokens of this request may come in 10.0 s" in str(error)
    error = refusal(admission, "b", 90, 10)
    assert "with 100 of this request they would exceed max_waiting_tokens 100" in str(error)
    assert dict(admission.rejections) == {
        "tenant_waiting_tokens": 1,
        "tenant_waiting_requests": 1,
        "tenant_requests": 1,
        "tenant_requests_per_minute": 1,
        "tenant_tokens_per_minute": 1,
        "queue_tokens": 1,
    }


def test_unused_output_is_given_back_to_the_tokens_of_a_minute():
    admission = Admission(QueueConfig(default_tenant=TenantConfig(tokens_per_minute=100)), ENGINE)
    ticket = admit(admission, "", 10, 90)
    refusal(admission, "", 1, 1)
    admission.started(ticket, 0.0)
    admission.ended(ticket, 20, 0.0)
    admit(admission, "", 10, 60)
    refusal(admission, "", 1, 1)


def test_a_request_without_a_limit_counts_with_what_others_had():
    admission = Admission(QueueConfig(), ENGINE)
    first = admission.accept("", 5, None, 0.0)
    assert admission.waiting_tokens == 5 + 1024
    admission.started(first, 0.0)
    admission.ended(first, 7, 1.0)
    admission.accept("", 5, None, 1.0)
    assert admission.waiting_tokens == 5 + 7


def test_what_is_larger_than_the_queue_is_let_in_alone():
    admission = Admission(QueueConfig(max_waiting_tokens=10), ENGINE)
    ticket = admit(admission, "", 50, 50)
    refusal(admission, "", 1, 1)
    admission.started(ticket, 0.0)
    admit(admission, "", 50, 50)


def test_requests_that_the_engine_has_yet_to_release_hold_their_places():
    admission = Admission(QueueConfig(), ENGINE)
    for _ in range(4):
        admit(admission, "")
    admission.check("", 5, 5, 0.0, ending=1)
    assert "6 requests are unfinished; at most 6 (max_num_seqs + max_num_waiting)" in str(
        refusal(admission, "", ending=2)
    )


def test_when_to_try_again_follows_from_the_rate_of_service():
    seconds = []
    for rate in (4.0, 40.0):
        admission, now = Admission(QueueConfig(min_retry_seconds=0.001), Engine(8, 40)), 0.0
        live = collections.deque(admit(admission, "") for _ in range(40))
        for _ in range(400):
            now += 1 / rate
            admission.started(live[0], now)
            admission.ended(live.popleft(), 5, now)
            live.append(admit(admission, "", now=now))
        seconds.append(refusal(admission, "", now=now).retry_seconds)
    assert seconds[0] == pytest.approx(32 / 4 / 4.0, rel=0.1)  # a quarter of what waits
    assert seconds[0] == pytest.approx(10 * seconds[1], rel=0.1)
    assert refusal(Admission(QueueConfig(), Engine(1, 0)), "").retry_seconds == 1.0


def test_refused_clients_come_back_as_places_become_free_and_one_tenants_do_not_delay_anothers():
    config = QueueConfig(tenants={"loud": TenantConfig(), "quiet": TenantConfig()})
    rate, admission, now = 20.0, Admission(config, Engine(8, 40)), 0.0
    live = collections.deque(admit(admission, "loud") for _ in range(40))

    for _ in range(400):
        now += 1 / rate
        admission.started(live[0], now)
        admission.ended(live.popleft(), 5, now)
        live.append(admit(admission, "loud", now=now))
    alone = refusal(admission, "quiet", now=now).retry_seconds
    told = [refusal(admission, "loud", now=now).retry_seconds for _ in range(2000)]
    assert told == sorted(told)
    assert told[-1] == config.max_retry_seconds
    waves = [sum(begin <= seconds < begin + 1 for seconds in told) for begin in range(2, 29)]
    assert 0.5 * rate <= min(waves) <= max(waves) <= rate  # its half of one and a half for each place
    assert refusal(admission, "quiet", now=now).retry_seconds < alone + 1.0


def test_refusals_are_answered_late_only_while_they_are_many():
    admission = Admission(QueueConfig(refusal_seconds=0.02), Engine(1, 1))
    admit(admission, "")
    found = []
    for pause in [1.0] * 5 + [0.005] * 200 + [5.0]:
        refusal(admission, "", now=(admission._seen or 0.0) + pause)
        found.append(admission.seconds_to_refuse)
    assert found[:5] == [0.0] * 5
    assert found[-2] == 0.02
    assert found[-1] == 0.0


def test_tenants_are_bounded_in_number_and_come_back():
    admission = Admission(QueueConfig(max_tenants=3, tenants={"named": LIMITED}), Engine(4, 100))
    live = [admit(admission, f"t{number}") for number in range(10)]
    assert len({ticket.tenant for ticket in live}) == 4  # three, and all others as one
    assert admit(admission, "named").tenant.config is LIMITED
    for ticket in live:
        admission.ended(ticket, 1, 1.0)
    admit(admission, "fresh", now=10.0)
    assert len(admission._tenants) <= 3


# ---- deadlines and waits ---------------------------------------------------------------------------------------------


def steady(
    config: QueueConfig, rate: float = 10.0, waiting: int = 20, in_order: bool = True
) -> tuple[Admission, float]:
    """An admission with a queue of `waiting` requests beside 4 that run, which has started `rate` a second for long,
    each with 10 output tokens in a second."""
    admission, now = Admission(config, Engine(4, 100, in_order)), 100.0
    queue = collections.deque(admission.accept("", 5, 10, now) for _ in range(waiting + 4))
    for _ in range(4):
        admission.started(queue[0], now)
        queue.popleft()
    running: collections.deque[tuple[float, Ticket]] = collections.deque()
    for _ in range(200):
        now += 1 / rate
        queue.append(admission.accept("", 5, 10, now))
        admission.started(queue[0], now)
        running.append((now + 0.9, queue.popleft()))
        while running[0][0] <= now:
            admission.ended(running.popleft()[1], 10, now)
    return admission, now


def test_fault_16_a_deadline_behind_the_queue_is_out_of_reach():
    admission, now = steady(QueueConfig())
    with pytest.raises(
        DeadlineError, match=r"^deadline is in 2\.500 s and cannot be met: 20 requests wait, which takes"
    ):
        admission.check("", 5, 10, now, deadline=now + 2.5)  # 2 s of waiting, and 10 tokens of 0.1 s
    admission.check("", 5, 10, now, deadline=now + 4.0)
    assert admission.rejections == {"deadline": 1}


@pytest.mark.parametrize("case", ["off", "no queue", "out of order"])
def test_no_deadline_is_out_of_reach_where_nothing_is_predicted(case):
    config = QueueConfig(drop_unreachable=case != "off")
    admission, now = steady(config, waiting=20, in_order=case != "out of order")
    if case == "no queue":
        admission = Admission(config, Engine(4, 100))
    admission.check("", 5, 10, now, deadline=now + 0.1)


def test_a_wait_that_would_be_too_long_is_refused():
    admission, now = steady(QueueConfig(max_waiting_seconds=1.5))
    error = refusal(admission, "", now=now)
    assert str(error).startswith("a request would wait 1.9")
    assert "at most 1.5 s (max_waiting_seconds)" in str(error)
    admission, now = steady(QueueConfig(max_waiting_seconds=3.0))
    admission.check("", 5, 5, now)


# ---- overload, simulated ---------------------------------------------------------------------------------------------


class Overload:
    """A server of `slots` that serves in order of arrival, a token a second each, and clients on a clock of its own."""

    def __init__(self, config: QueueConfig, slots: int, places: int, seed: int):
        self.admission = Admission(config, Engine(slots, places, prompt_weight=0.0))
        self.now = 0.0
        self.served: collections.Counter[str] = collections.Counter()  # tokens
        self.asked: collections.Counter[str] = collections.Counter()  # requests
        self.answered: collections.Counter[str] = collections.Counter()
        self.good = self.completed = 0
        self._free = slots
        self._queue: collections.deque = collections.deque()
        self._events: list = []
        self._number = itertools.count()
        self.random = random.Random(seed)

    def at(self, when: float, action, *arguments) -> None:
        heapq.heappush(self._events, (when, next(self._number), action, arguments))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        self.now = until

    def ask(self, tenant: str, output: int, pause=None, patience=None, until=None) -> None:
        """One attempt; a refused one comes back after `pause` or, with None, when it was told to.

        patience: seconds in which the answer must be whole; it is then good, and nothing is done any more otherwise.
        until: when it gives up being refused.
        """
        deadline = None if patience is None else self.now + patience
        if until is None:
            self.asked[tenant] += 1
            until = self.now + 60.0
        try:
            self.admission.check(tenant, 1, output, self.now, deadline=deadline)
        except QueueFullError as error:
            told = error.retry_seconds or 0.0
            seconds = told * self.random.uniform(1.0, 1.2) if pause is None else pause
            if self.now + seconds < until:
                self.at(self.now + seconds, self.ask, tenant, output, pause, patience, until)
        except DeadlineError:
            pass
        else:
            self._queue.append(
                (self.admission.accept(tenant, 1, output, self.now, deadline=deadline), output, deadline)
            )
            self._serve()

    def _serve(self) -> None:
        while self._free and self._queue:
            ticket, output, deadline = self._queue.popleft()
            if deadline is not None and self.now >= deadline:
                self.admission.ended(ticket, 0, self.now, FinishReason.DEADLINE)
                continue
            self._free -= 1
            self.admission.started(ticket, self.now)
            end = self.now + output if deadline is None else min(self.now + output, deadline)
            self.at(end, self._end, ticket, output, deadline)

    def _end(self, ticket: Ticket, output: int, deadline) -> None:
        late = deadline is not None and self.now >= deadline
        assert ticket.started is not None
        output = round(self.now - ticket.started)
        self.admission.ended(ticket, output, self.now, FinishReason.DEADLINE if late else FinishReason.LENGTH)
        self.served[ticket.tenant.name] += output
        self.completed += 1
        self.answered[ticket.tenant.name] += 1
        self.good += not late
        self._free += 1
        self._serve()


def arrive(overload: Overload, tenant: str, rate: float, until: float, outputs=(5, 15), **how) -> None:
    when = 0.0
    while (when := when + overload.random.expovariate(rate)) < until:
        overload.at(
            when, overload.ask, tenant, overload.random.randint(*outputs), how.get("pause"), how.get("patience")
        )


@pytest.mark.parametrize("lengths", ["alike", "different"])
def test_fault_38_shares_follow_weights_at_three_times_the_capacity_in_order_of_arrival(lengths):
    """Three tenants of 1 : 2 : 4 ask alike for three times what there is; clients of the least one never pause."""
    weights = {"bronze": 1.0, "silver": 2.0, "gold": 4.0}
    config = QueueConfig(tenants={name: TenantConfig(weight=weight) for name, weight in weights.items()})
    overload = Overload(config, slots=16, places=80, seed=1)
    for name in weights:
        outputs = {"bronze": (20, 40), "silver": (5, 15), "gold": (2, 8)}[name] if lengths == "different" else (5, 15)
        arrive(overload, name, 16 * 2 / sum(outputs), 1000.0, outputs)
    arrive(overload, "bronze", 0.1, 1000.0, pause=0.2)
    overload.run(150.0)
    before = overload.served.copy()
    overload.run(1000.0)
    served = {name: overload.served[name] - before[name] for name in weights}
    for name, weight in weights.items():
        assert served[name] / sum(served.values()) == pytest.approx(weight / 7, rel=0.1)


def test_a_tenant_that_asks_for_little_is_served_and_leaves_the_rest_to_others():
    overload = Overload(QueueConfig(), slots=16, places=40, seed=2)
    arrive(overload, "greedy", 3.0, 400.0, pause=1.0)
    arrive(overload, "modest", 0.2, 400.0)
    overload.run(400.0)
    assert sum(overload.served.values()) == pytest.approx(16 * 400, rel=0.05)
    assert overload.answered["modest"] > 0.9 * overload.asked["modest"] > 50


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_fault_38_goodput_is_kept_when_every_request_has_a_deadline(factor):
    """A place for many more than can be in time: without the prediction almost none would be, at three times."""
    overload = Overload(QueueConfig(), slots=16, places=400, seed=3)
    arrive(overload, "", factor * 1.6, 800.0, patience=60.0)
    overload.run(800.0)
    assert overload.good > 0.9 * 1.6 * 800
    assert overload.good > 0.9 * overload.completed
