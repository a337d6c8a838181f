"""Latencies calculated by hand from short histories; all times are sums of powers of two, so equality is exact."""

from jaxserve.telemetry.recorder import (
    FirstToken,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RequestScheduled,
    TokensProduced,
)
from jaxserve.telemetry.timings import request_timings


def arrived(time, name, prompt_tokens=4):
    return RequestArrived(time, name, prompt_tokens, max_tokens=8, tenant="t", priority=2)


def finished(time, name, output_tokens, reason="length", preemptions=0):
    return RequestFinished(time, name, reason, 4, output_tokens, preemptions)


def test_one_request():
    # arrives 10, scheduled 10.5, tokens at 12, 12.25, 13, 13.75, finished 14
    (timings,) = request_timings(
        [
            arrived(10.0, "a"),
            RequestScheduled(10.5, "a"),
            FirstToken(12.0, "a"),
            *(TokensProduced(time, ("a",)) for time in (12.0, 12.25, 13.0, 13.75)),
            finished(14.0, "a", 4),
        ]
    )
    assert timings.queue_time == 0.5
    assert timings.prefill_time == 1.5
    assert timings.ttft == 2.0
    assert timings.decode_time == 1.75
    assert timings.tpot == 1.75 / 3
    assert timings.itls == (0.25, 0.75, 0.75)
    assert timings.e2e == 4.0
    assert (timings.prompt_tokens, timings.output_tokens, timings.reason) == (4, 4, "length")
    assert (timings.tenant, timings.priority) == ("t", 2)


def test_tokens_produced_together_are_zero_apart():
    (timings,) = request_timings(
        [arrived(0.0, "a"), FirstToken(1.0, "a"), TokensProduced(1.0, ("a", "a")), TokensProduced(4.0, ("a", "a", "a"))]
    )
    assert timings.itls == (0.0, 3.0, 0.0, 0.0)
    assert timings.tpot == 0.75 == sum(timings.itls) / len(timings.itls)


def test_one_token_has_no_time_per_further_token():
    (timings,) = request_timings(
        [
            arrived(0.0, "a"),
            RequestScheduled(1.0, "a"),
            FirstToken(2.0, "a"),
            TokensProduced(2.0, ("a",)),
            finished(2.0, "a", 1, reason="stop"),
        ]
    )
    assert (timings.ttft, timings.decode_time, timings.e2e) == (2.0, 0.0, 2.0)
    assert timings.tpot is None
    assert timings.itls == ()


def test_what_has_not_happened_is_none():
    waiting, aborted = request_timings([arrived(0.0, "a"), arrived(1.0, "b"), finished(3.0, "b", 0, reason="abort")])
    for timings in (waiting, aborted):
        assert timings.queue_time is timings.prefill_time is timings.ttft is timings.decode_time is timings.tpot is None
        assert timings.output_tokens == 0
    assert (waiting.e2e, waiting.reason) == (None, "")
    assert (aborted.e2e, aborted.reason) == (2.0, "abort")


def test_preemption_lengthens_a_gap_and_is_counted():
    (timings,) = request_timings(
        [
            arrived(0.0, "a"),
            RequestScheduled(0.0, "a"),
            FirstToken(1.0, "a"),
            TokensProduced(1.0, ("a",)),
            RequestPreempted(1.5, "a", "recompute"),
            TokensProduced(5.0, ("a",)),
            finished(5.0, "a", 2, preemptions=1),
        ]
    )
    assert timings.itls == (4.0,)
    assert timings.preemptions == 1


def test_interleaved_requests_come_in_order_of_arrival():
    first, second = request_timings(
        [
            arrived(0.0, "b"),
            arrived(1.0, "a"),
            RequestScheduled(2.0, "a"),
            FirstToken(3.0, "a"),
            TokensProduced(3.0, ("a",)),
            RequestScheduled(4.0, "b"),
            FirstToken(8.0, "b"),
            TokensProduced(8.0, ("b",)),
        ]
    )
    assert (first.request_id, first.queue_time, first.ttft) == ("b", 4.0, 8.0)
    assert (second.request_id, second.queue_time, second.ttft) == ("a", 1.0, 2.0)


def test_an_id_used_again_is_another_request():
    first, second = request_timings(
        [arrived(0.0, "a"), finished(1.0, "a", 0), arrived(4.0, "a"), RequestScheduled(6.0, "a"), finished(8.0, "a", 0)]
    )
    assert (first.e2e, first.queue_time) == (1.0, None)
    assert (second.e2e, second.queue_time) == (4.0, 2.0)


def test_a_request_whose_arrival_was_dropped_is_left_out():
    events = [
        TokensProduced(1.0, ("lost",)),
        finished(2.0, "lost", 9),
        arrived(3.0, "a"),
        TokensProduced(4.0, ("lost",)),
    ]
    assert [timings.request_id for timings in request_timings(events)] == ["a"]


def test_no_events():
    assert request_timings([]) == ()
