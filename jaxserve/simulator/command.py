"""Shared options of the command lines of jaxserve.simulate and jaxserve.tune: the trace, the device, the costs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import pathlib
import sys
from typing import Any

from jaxserve.config.checks import at_least
from jaxserve.config.settings import EngineConfig
from jaxserve.planning.roofline import Efficiency
from jaxserve.simulator.conversations import CONVERSATIONS, conversation_trace, parse_conversation
from jaxserve.simulator.setup import Setup, find_target, set_up
from jaxserve.simulator.synthetic import SyntheticConfig, count_cut, synthetic_trace
from jaxserve.simulator.trace_files import read_trace
from jaxserve.simulator.traces import Trace

_TARGETS = "a name or a file of configs/targets/ (default h200, none where costs are measured)"


def add_simulation_options(parser: argparse.ArgumentParser, limit: int | None = None) -> None:
    """Adds the options for trace, device and costs. limit: the default of --limit, None for the whole trace."""
    add = parser.add_argument
    add(
        "--trace",
        default="synthetic",
        metavar="FILE",
        help="a .csv or .jsonl file, or synthetic, agent or chat[:NAME=VALUE,...]",
    )
    whole = f"default {limit:,}" if limit else "default: all"
    add("--limit", type=int, default=limit, metavar="N", help=f"the first N requests of the trace alone ({whole})")
    add("--rate-factor", type=float, default=1.0, metavar="X", help="requests arrive X times as fast (default 1)")
    add("--target", default=None, metavar="NAME", help=f"device of the roofline: {_TARGETS}")
    add(
        "--model-cost",
        type=pathlib.Path,
        default=None,
        metavar="FILE",
        help="measured step times instead of a roofline",
    )
    add("--report", type=pathlib.Path, default=None, metavar="FILE", help="report.json of jaxserve.compile")
    add("--efficiency", default="", metavar="NAME=X,...", help="shares of the peak rates: memory, compute, ...")
    add("--slo", default="", metavar="NAME=S,...", help="targets in seconds: ttft=0.5,tpot=0.05,e2e=30")
    add(
        "--client-max-tokens",
        default="context",
        metavar="N",
        help="max_tokens where the trace has none: a number, 'context' (the rest of it) or 'exact' (the true length)",
    )


def load_trace(parsed: argparse.Namespace) -> Trace:
    """Loads the trace of the command line."""
    if parsed.limit is not None:
        at_least("--limit", parsed.limit, 1)
    kind, _, text = parsed.trace.partition(":")
    if kind in CONVERSATIONS:
        trace = conversation_trace(parse_conversation(kind, text), kind)
        trace = trace.part(0, parsed.limit) if parsed.limit else trace
    elif kind == "synthetic":
        config = SyntheticConfig.parse(text)
        trace = synthetic_trace(config)
        _tell_cuts(config)
        trace = trace.part(0, parsed.limit) if parsed.limit else trace
    else:
        trace = read_trace(parsed.trace, parsed.limit)
    return trace if parsed.rate_factor == 1.0 else trace.faster(parsed.rate_factor)


def _tell_cuts(config: SyntheticConfig) -> None:
    """Reports on stderr how many lengths were drawn longer than max_length."""
    cuts = [f"{count:,} {name}s" for name, count in count_cut(config).items() if count]
    if cuts:
        print(
            f"synthetic: {' and '.join(cuts)} of {config.count:,} are cut to max_length {config.max_length:,} tokens",
            file=sys.stderr,
        )


def load_setup(parsed: argparse.Namespace, config: EngineConfig) -> Setup:
    """Sets up the simulation of the command line: on the target, or the H200 where no costs were measured."""
    efficiency = assignments("efficiency", parsed.efficiency)
    known = [field.name for field in dataclasses.fields(Efficiency)]
    if unknown := set(efficiency) - set(known):
        raise ValueError(f"--efficiency has {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    name = parsed.target or (None if parsed.model_cost else "h200")
    return set_up(
        config,
        target=None if name is None else find_target(name),
        model_cost=parsed.model_cost,
        report=parsed.report,
        efficiency=Efficiency(**efficiency),
    )


def assignments(what: str, text: str) -> dict[str, Any]:
    """Parses "NAME=VALUE,NAME=VALUE"; what: the option's name, for its errors."""
    found = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--{what} {item!r}: it must be NAME=VALUE")
        found[name] = literal(value)
    return found


def parts(text: str) -> list[str]:
    """Splits at commas, except inside brackets and braces."""
    found, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    return found


def literal(text: str) -> Any:
    """Parses a Python literal, or returns the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
