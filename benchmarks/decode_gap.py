"""Gaps between tokens while long prompts arrive: `python -m benchmarks.decode_gap [--model 153m | --simulate]`.

16 streams decode, then prompts arrive. For each setting: the longest and the p99 gap of the streams until the last
prompt has its first token, and the prompt tokens computed a second. Settings: whole prompts, chunks of fixed size, and
max_decode_gap at several bounds, which are multiples of the median gap of the streams alone unless --bounds says else.

On the engine all settings share one runner with its measured step times and take turns, so that a machine that changes
its speed changes it for all; figures are medians of --rounds. With --simulate the same on a simulated device, exactly.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from benchmarks import report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.work import FIRST_ORDINARY_ID, SHAPES
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler.buckets import Buckets, close
from jaxserve.scheduler.decode_gap import mixed_step
from jaxserve.scheduler.gap_limit import PROMISED_SHARE
from jaxserve.scheduler.gap_monitor import CAUSES
from jaxserve.simulator import ClientRule, find_target, make_trace, set_up, simulate, with_options
from jaxserve.simulator.setup import Setup
from jaxserve.telemetry.recorder import DecodeGapsExceeded, FirstToken, Recorder, TokensProduced

RANDOM_MODEL_LEN = 8704
WARM_STEPS = 50
WARM_SECONDS = 0.5
"""Steps on the engine, and seconds in simulation, that the streams decode before the first prompt arrives."""

MOST_OUTPUT = 8_000
"""Tokens of a stream at most; a stream that ends is followed by another."""

_LARGEST_BOUND = 3600.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Names a setting; options are flat names of `EngineConfig`.

    bound: max_decode_gap in seconds, if it is one. alone: the prompts are short and few, so that the gaps are those
    that the streams have by themselves.
    """

    name: str
    options: dict[str, Any]
    bound: float | None = None
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Load:
    """Describes the work. prompts: tokens of each. interval: seconds between two of them; 0 is all at once. output:
    tokens of a stream at most."""

    streams: int
    stream_prompt: int
    prompts: tuple[int, ...]
    interval: float
    output: int

    @classmethod
    def of(cls, options: argparse.Namespace, max_model_len: int) -> Load:
        low, high = options.prompt_len
        lengths = np.random.default_rng(options.seed).integers(low, high + 1, options.prompts)
        if high + 2 > max_model_len:
            raise ValueError(f"--prompt-len ends at {high}; the context of {max_model_len} tokens takes less: lower it")
        stream_prompt = 64
        output = min(MOST_OUTPUT, max_model_len - stream_prompt)
        return cls(options.streams, stream_prompt, tuple(lengths.tolist()), options.interval, output)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Holds what came of one setting: gaps of the streams, in seconds, while there were prompts; when each prompt had
    its first token, from the first arrival on; gaps above the bound by cause."""

    gaps: np.ndarray
    first_tokens: np.ndarray
    arrivals: np.ndarray
    exceeded: dict[str, int]

    def figures(self, load: Load, bound: float | None) -> dict[str, Any]:
        """Returns the row of the table; times in ms."""
        gaps = self.gaps if len(self.gaps) else np.zeros(1)
        return {
            "p50_gap_ms": 1e3 * float(np.quantile(gaps, 0.5)),
            "p99_gap_ms": 1e3 * float(np.quantile(gaps, 0.99)),
            "max_gap_ms": 1e3 * float(gaps.max()),
            "above_bound": float((gaps > bound).mean()) if bound is not None else None,
            "prefill_tokens_per_second": sum(load.prompts) / float(self.first_tokens.max()),
            "mean_ttft_ms": 1e3 * float((self.first_tokens - self.arrivals).mean()),
            "num_gaps": len(self.gaps),
            "exceeded": {cause: count for cause, count in self.exceeded.items() if count},
        }


class Side(Protocol):
    """Serves the load on an engine or in simulation."""

    @property
    def name(self) -> str: ...

    def measure(self, setting: Setting, load: Load) -> Measured: ...


class EngineSide:
    """Runs every setting on one runner, whose programs and measured step times they share."""

    def __init__(self, config: EngineConfig, seqs: int, largest: int):
        buckets = config.token_buckets or close(largest)
        limits = {
            "max_num_seqs": seqs,
            "max_num_batched_tokens": largest,
            "max_decode_gap": _LARGEST_BOUND,
            "token_buckets": buckets,
            "row_buckets": None,
        }
        self._config = with_options(config, limits)
        self._runner = ModelRunner(self._config, progress=True)
        self.name = f"engine, {self._runner.info.architecture} {self._runner.info.num_parameters / 1e6:.1f}M"
        self.max_model_len = self._runner.info.max_model_len
        self._runs = 0

    def measure(self, setting: Setting, load: Load) -> Measured:
        """Serves the load with `setting` from an empty engine."""
        config = with_options(self._config, {"max_decode_gap": None} | setting.options)
        recorder = Recorder(capacity=2_000_000)
        core = EngineCore(config, self._runner, recorder=recorder)
        rng = np.random.default_rng(self._runs)
        self._runs += 1
        names = iter(range(1_000_000))

        def add(kind: str, tokens: int, output: int) -> None:
            ids = tuple(rng.integers(FIRST_ORDINARY_ID, self._runner.info.vocab_size, tokens).tolist())
            core.handle(AddRequest(EngineRequest(f"{kind}{next(names)}", ids, output, arrival_time=time.time())))

        for _ in range(load.streams):
            add("s", load.stream_prompt, load.output)
        for _ in range(WARM_STEPS):
            core.step()
        begin, waiting, arrivals = time.perf_counter(), list(load.prompts), []
        under_way = 0
        while waiting or under_way:
            while waiting and time.perf_counter() >= begin + len(arrivals) * load.interval:
                arrivals.append(time.perf_counter() - begin)
                add("p", waiting.pop(0), 1)
            core.step()
            ids = core.scheduler.request_ids
            under_way = sum(name.startswith("p") for name in ids)
            for _ in range(load.streams + under_way - len(ids)):
                add("s", load.stream_prompt, load.output)  # one has reached its end
        for name in core.scheduler.request_ids:
            core.handle(AbortRequest(name))
        while core.busy:
            core.step()
        return _measured(recorder, begin, np.array(arrivals))

    def bounds(self, load: Load, factors: Sequence[float]) -> list[float]:
        """Returns bounds that are multiples of the median gap of the streams alone, or of the least bound that the
        engine accepts, where it promises less than the streams alone would need."""
        alone = self.measure(Setting("alone", {}), dataclasses.replace(load, prompts=(16,)))
        least = 0.0
        if self._runner.step_costs is not None:
            buckets = Buckets.from_config(self._config, self._runner.info.platform)
            smallest = mixed_step(load.streams, load.streams * load.stream_prompt, buckets.tokens[0], 0, buckets)
            least = self._runner.step_costs.seconds(smallest) / PROMISED_SHARE
        return [factor * max(float(np.median(alone.gaps)), least) for factor in factors]


def _measured(recorder: Recorder, begin: float, arrivals: np.ndarray) -> Measured:
    """Reads the events of one run. begin: the time of the first arrival."""
    firsts = [event for event in recorder if isinstance(event, FirstToken) and event.request_id.startswith("p")]
    firsts.sort(key=lambda event: int(event.request_id[1:]))
    end = max(event.time for event in firsts)
    last: dict[str, float] = {}
    gaps: list[float] = []
    exceeded = dict.fromkeys(CAUSES, 0)
    for event in recorder:
        if isinstance(event, TokensProduced):
            for name in event.request_ids:
                if name in last and begin <= event.time <= end:
                    gaps.append(event.time - last[name])
                last[name] = event.time
        elif isinstance(event, DecodeGapsExceeded) and begin <= event.time <= end:
            exceeded[event.cause] += event.count
    return Measured(np.array(gaps), np.array([event.time - begin for event in firsts]), arrivals, exceeded)


class SimulatedSide:
    """Simulates every setting on a target device."""

    def __init__(self, config: EngineConfig, target: str, seqs: int, largest: int):
        self._config = with_options(config, {"max_num_seqs": seqs, "max_num_batched_tokens": largest})
        self._target = find_target(target)
        self.name = f"simulation, {self._setup({}).costs.name}"
        self.max_model_len = self._setup({}).device.max_model_len

    def _setup(self, options: dict[str, Any]) -> Setup:
        return set_up(with_options(self._config, options), target=self._target)

    def measure(self, setting: Setting, load: Load) -> Measured:
        """Simulates the load with `setting`."""
        setup = self._setup({"max_decode_gap": None} | setting.options)
        arrivals = WARM_SECONDS + load.interval * np.arange(len(load.prompts))
        count = load.streams
        trace = make_trace(
            "decode gap",
            np.concatenate([np.zeros(count), arrivals]),
            [load.stream_prompt] * count + list(load.prompts),
            [load.output] * count + [1] * len(load.prompts),
        )
        recorder = Recorder(capacity=10_000_000)
        result = simulate(setup.config, trace, setup.costs, setup.device, client=ClientRule("exact"), recorder=recorder)
        firsts = result.first_token[count:]
        gaps = []
        for times in result.token_times[:count]:
            inside = (times[1:] >= arrivals[0]) & (times[1:] <= firsts.max())
            gaps.append(np.diff(times)[inside])
        exceeded = dict.fromkeys(CAUSES, 0)
        for event in recorder:
            if isinstance(event, DecodeGapsExceeded) and arrivals[0] <= event.time <= firsts.max():
                exceeded[event.cause] += event.count
        begin = arrivals[0]
        return Measured(np.concatenate(gaps), firsts - begin, arrivals - begin, exceeded)

    def bounds(self, load: Load, factors: Sequence[float]) -> list[float]:
        """Returns bounds that are multiples of the median gap of the streams alone."""
        alone = self.measure(Setting("alone", {}), dataclasses.replace(load, prompts=(16,) * 8, interval=0.01))
        return [factor * float(np.median(alone.gaps)) for factor in factors]


def settings_of(bounds: Sequence[float], chunks: Sequence[int], largest: int) -> list[Setting]:
    """Returns the streams alone, whole prompts, fixed chunks and bounds, in this order."""
    found = [Setting("streams alone", {}, alone=True)]
    found += [Setting("whole prompts", {"enable_chunked_prefill": False, "max_num_batched_tokens": largest})]
    found += [Setting(f"chunks of {size}", {"max_num_batched_tokens": size}) for size in chunks if size < largest]
    for bound in bounds:
        options = {"max_decode_gap": bound, "max_num_batched_tokens": largest}
        found.append(Setting(f"max_decode_gap {1e3 * bound:.3g} ms", options, bound))
    return found


def run(side: Side, load: Load, settings: Sequence[Setting], rounds: int) -> list[dict[str, Any]]:
    """Measures the settings in turn; returns for each the medians of its rounds, and the rounds.

    Prefill throughput is compared with that of the best setting without a bound.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in settings]
    for number in range(rounds):
        for place, setting in enumerate(settings):
            its = dataclasses.replace(load, prompts=(16,) * 8, interval=0.25) if setting.alone else load
            row = side.measure(setting, its).figures(its, setting.bound)
            found[place].append(row)
            print(f"round {number + 1}: {setting.name}: p99 {row['p99_gap_ms']:.1f} ms", file=sys.stderr, flush=True)
    rows = []
    for setting, of_rounds in zip(settings, found, strict=True):
        middle = {
            name: statistics.median(row[name] for row in of_rounds)
            for name, value in of_rounds[0].items()
            if isinstance(value, int | float)
        }
        bound_ms = None if setting.bound is None else 1e3 * setting.bound
        rows.append({"name": setting.name, "bound_ms": bound_ms, **middle, "rounds": of_rounds})
    unbounded = [setting.bound is None and not setting.alone for setting in settings]
    best = max(row["prefill_tokens_per_second"] for row, counts in zip(rows, unbounded, strict=True) if counts)
    for row in rows:
        row["prefill_throughput_lost"] = 1 - row["prefill_tokens_per_second"] / best
        row["p99_over_bound"] = None if row["bound_ms"] is None else row["p99_gap_ms"] / row["bound_ms"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats one line for each setting."""
    head = ("", "median gap ms", "p99", "longest", "p99 / bound", "prefill tokens/s", "lost %", "mean TTFT ms")
    lines = [
        (
            row["name"],
            row["p50_gap_ms"],
            row["p99_gap_ms"],
            row["max_gap_ms"],
            "" if row["p99_over_bound"] is None else row["p99_over_bound"],
            row["prefill_tokens_per_second"],
            100 * row["prefill_throughput_lost"],
            row["mean_ttft_ms"],
        )
        for row in rows
    ]
    return report.table(head, lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=None, help="default: tiny.gin; llama.gin with --simulate")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE", help="may be repeated")
    parser.add_argument("--model", choices=list(SHAPES), help="random weights of this shape, context 8,704, bfloat16")
    parser.add_argument("--simulate", action="store_true", help="on a simulated device")
    parser.add_argument("--target", default="h200", help="the simulated device")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="number of prompts that arrive")
    parser.add_argument("--prompt-len", type=int, nargs=2, default=None, metavar=("LOW", "HIGH"))
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between two; 0: all at once")
    parser.add_argument("--chunks", type=int, nargs="*", default=[512, 128], help="fixed sizes to compare with")
    parser.add_argument("--factors", type=float, nargs="*", default=[2.0, 4.0, 8.0], help="bounds over the gap alone")
    parser.add_argument("--bounds", type=float, nargs="*", default=None, metavar="MS", help="bounds instead")
    parser.add_argument("--rounds", type=int, default=3, help="on the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="name of the result file; default: decode_gap_MODEL_jax<version>")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def configured(options: argparse.Namespace) -> Iterator[EngineConfig]:
    """Yields the configuration; a random checkpoint exists while it is in use."""
    with tempfile.TemporaryDirectory() as folder:
        name = options.config or ("llama.gin" if options.simulate else "tiny.gin")
        bindings = list(options.gin)
        if options.model is not None:
            path = pathlib.Path(folder) / f"llama-{options.model}"
            write_checkpoint(path, SHAPES[options.model] | {"max_position_embeddings": RANDOM_MODEL_LEN})
            pages = (options.streams + options.prompts) * RANDOM_MODEL_LEN // 16 // 2
            bindings = [
                f"EngineConfig.model={str(path)!r}",
                "EngineConfig.dtype='bfloat16'",
                "EngineConfig.skip_tokenizer_init=True",
                f"EngineConfig.max_model_len={RANDOM_MODEL_LEN}",
                f"CacheConfig.num_pages={pages}",
                *bindings,
            ]
        yield gin_config.load(name, bindings)[0].engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result."""
    options = parse(arguments)
    with configured(options) as config:
        small = options.model is None and not options.simulate
        options.prompt_len = options.prompt_len or ([500, 1900] if small else [2000, 8000])
        largest = -(-(options.prompt_len[1] + options.streams) // 512) * 512
        if options.simulate:
            side: EngineSide | SimulatedSide = SimulatedSide(config, options.target, 2 * options.streams, largest)
        else:
            side = EngineSide(config, 2 * options.streams, largest)
        load = Load.of(options, side.max_model_len)
        if options.bounds is None:
            bounds = side.bounds(load, options.factors)
        else:
            bounds = [bound / 1e3 for bound in options.bounds]
        rows = run(side, load, settings_of(bounds, options.chunks, largest), 1 if options.simulate else options.rounds)
    print(report.describe())
    print(side.name)
    print(table(rows))
    default = f"{options.target}" if options.simulate else f"{options.model or 'tiny'}_jax{report.versions()['jax']}"
    print(f"written: {report.write(options.name or f'decode_gap_{default}', vars(options), rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
