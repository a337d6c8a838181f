"""Fleets: routing, forecasts, scaling."""

import numpy as np
import pytest

from jaxserve.request import EngineRequest
from jaxserve.simulator.fleet import FleetConfig, simulate_fleet
from jaxserve.simulator.forecast import Ewma, Holt
from jaxserve.simulator.routing import ROUTINGS, PredictedWork
from jaxserve.simulator.setup import Setup
from jaxserve.simulator.simulation import simulate
from jaxserve.simulator.traces import make_trace
from tests.simulator.helpers import SimpleCosts, make_config, make_device


def make_setup(**options) -> Setup:
    return Setup(make_config(**options), make_device(), SimpleCosts(step=0.1))


def test_one_replica_is_the_engine_alone():
    setup = make_setup()
    trace = make_trace("t", np.arange(20) * 0.3, 20, np.arange(20) * 2 + 1)
    alone = simulate(setup.config, trace, setup.costs, setup.device)
    fleet = simulate_fleet(setup, trace).result
    for mine, other in zip(alone.token_times, fleet.token_times, strict=True):
        assert mine.tolist() == other.tolist()
    assert fleet.replica_seconds == pytest.approx(alone.replica_seconds, abs=0.2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_request_ends_on_the_replica_it_was_sent_to(routing):
    trace = make_trace("t", np.arange(60) * 0.05, 20, np.arange(60) % 17 + 1)
    result = simulate_fleet(make_setup(), trace, FleetConfig(replicas=3, routing=routing)).result
    assert result.completed.all()
    assert result.output_tokens.tolist() == trace.output_tokens.tolist()
    assert set(result.replica.tolist()) == {0, 1, 2}
    assert [len(times) for times in result.token_times] == trace.output_tokens.tolist()


def test_round_robin_ignores_what_least_loaded_avoids():
    # Every other request is long: round robin gives all of them to one replica.
    trace = make_trace("t", np.arange(40) * 0.2, 10, [60, 1] * 20)
    mean = {
        routing: simulate_fleet(make_setup(), trace, FleetConfig(replicas=2, routing=routing)).result.e2e.mean()
        for routing in ("round_robin", "least_loaded")
    }
    assert mean["least_loaded"] < 0.8 * mean["round_robin"]


def test_predicted_work_weighs_tokens_not_requests():
    router = PredictedWork(0.001, 0.01)

    def placed(request: EngineRequest) -> int:
        replica = router.choose(request, [0, 1])
        router.place(request, replica)
        return replica

    long = EngineRequest("0", (0,) * 200, max_tokens=50)
    short = [EngineRequest(str(number), (0,) * 2, max_tokens=2) for number in range(1, 4)]
    assert placed(long) == 0
    assert [placed(request) for request in short] == [1, 1, 1]
    router.ended(0, 50)
    assert router.load(0) == pytest.approx(0)
    assert placed(EngineRequest("9", (0,) * 2, max_tokens=2)) == 0


def test_holt_follows_a_trend_that_the_average_lags_behind():
    ewma, holt = Ewma(0.5), Holt(0.5, 0.5)
    for rate in range(1, 40):
        ewma.observe(rate)
        holt.observe(rate)
    assert holt.rate(3) == pytest.approx(42, abs=0.5)
    assert ewma.rate(3) == pytest.approx(38, abs=0.1)
    for _ in range(60):
        holt.observe(0.0)
    assert holt.rate(100) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("scaling", ["forecast", "cost_aware"])
def test_replicas_follow_the_load_and_no_request_is_lost(scaling):
    arrivals = np.concatenate([np.arange(20) * 2.0, 40 + np.arange(400) * 0.1, 80 + np.arange(30) * 4.0])
    trace = make_trace("t", arrivals, 10, 10)
    fleet = FleetConfig(scaling=scaling, interval_seconds=5, startup_seconds=5, replica_rate=4.0, max_replicas=6)
    found = simulate_fleet(make_setup(), trace, fleet)
    counts = [count for _, count in found.changes]
    assert found.result.completed.all()
    assert counts[0] == 1
    assert max(counts) >= 3
    assert counts[-1] < max(counts)
    most = max(counts) * found.result.seconds
    assert found.result.replica_seconds < 0.8 * most


def test_latency_that_is_worth_more_buys_more_replicas():
    trace = make_trace("t", np.arange(300) * 0.3, 10, 10)
    up = [
        simulate_fleet(
            make_setup(),
            trace,
            FleetConfig(
                scaling="cost_aware", interval_seconds=5, startup_seconds=0, replica_rate=5.0, latency_price=price
            ),
        ).result.replica_seconds
        for price in (0.01, 2.0)
    ]
    assert up[1] > 1.5 * up[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "random"}, "routing is 'random'"),
        ({"replicas": 0}, "replicas is 0"),
        ({"scaling": "forecast"}, "replica_rate is 0; scaling 'forecast' needs"),
        ({"scaling": "cost_aware", "replica_rate": 1.0, "replicas": 20}, "replicas is 20; it must be from"),
    ],
)
def test_faults_of_a_fleet(options, message):
    with pytest.raises(ValueError, match=message):
        FleetConfig(**options)
