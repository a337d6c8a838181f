"""Simulates serving on a virtual clock: the real scheduler and page pool, with costs in place of a device. No jax.

    setup = set_up(config, target=find_target("h200"))          or model_cost=FILE with measured step times
    trace = read_trace("trace.csv")                             or synthetic_trace(SyntheticConfig(rate=4, count=1000))
    result = simulate(setup.config, trace, setup.costs, setup.device)
    print(table({"fcfs": report(result, Slo(ttft=0.5, tpot=0.05))}))

`with_options(config, {"policy": "sjf"})` changes a configuration, `simulate_fleet` serves with several replicas,
`conversation_trace` generates sessions of agents and chats, `replay_cache` replays a prefix cache alone,
`search_capacity` finds the highest rate that keeps the targets, plots.draw_all draws.
"""

from jaxserve.planning.roofline import Efficiency, RooflineCosts
from jaxserve.planning.step_cost_models import (
    CostModel,
    FittedCosts,
    HostCosts,
    StepTime,
    read_costs,
    write_costs,
)
from jaxserve.scheduler.step_shape import StepShape
from jaxserve.simulator.cache_replay import BlockBound, CacheFigures, block_bound, infinite_cache, replay_cache
from jaxserve.simulator.capacity import Capacity, parts_of, search_capacity
from jaxserve.simulator.conversations import AGENT, CHAT, ConversationConfig, conversation_trace
from jaxserve.simulator.fleet import FleetConfig, FleetResult, simulate_fleet
from jaxserve.simulator.prompt_content import Content
from jaxserve.simulator.setup import Setup, find_target, set_up, with_options
from jaxserve.simulator.simulated_engine import SimulatedDevice, SimulatedEngine
from jaxserve.simulator.simulation import ClientRule, SimulationResult, simulate
from jaxserve.simulator.simulation_report import Report, Slo, report, table
from jaxserve.simulator.synthetic import SyntheticConfig, synthetic_trace
from jaxserve.simulator.trace_files import read_trace
from jaxserve.simulator.traces import Trace, make_trace

__all__ = [
    "AGENT",
    "CHAT",
    "BlockBound",
    "CacheFigures",
    "Capacity",
    "ClientRule",
    "Content",
    "ConversationConfig",
    "CostModel",
    "Efficiency",
    "FittedCosts",
    "FleetConfig",
    "FleetResult",
    "HostCosts",
    "Report",
    "RooflineCosts",
    "Setup",
    "SimulatedDevice",
    "SimulatedEngine",
    "SimulationResult",
    "Slo",
    "StepShape",
    "StepTime",
    "SyntheticConfig",
    "Trace",
    "block_bound",
    "conversation_trace",
    "find_target",
    "infinite_cache",
    "make_trace",
    "parts_of",
    "read_costs",
    "read_trace",
    "replay_cache",
    "report",
    "search_capacity",
    "set_up",
    "simulate",
    "simulate_fleet",
    "synthetic_trace",
    "table",
    "with_options",
    "write_costs",
]
