"""Faults before, in and after the programs of the real runner: the survivors have the tokens of an undisturbed run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config.failpoints import Failpoint, Failpoints
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import FAULT_SECONDS, EngineCore
from jaxserve.engine.messages import AddRequest, EngineOutput, outputs
from jaxserve.engine.step_executor import EngineBrokenError
from jaxserve.programs.step_programs import ProgramKey
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.protocol import StepNotStartedError

CONFIG = EngineConfig.from_options(
    model="models/tiny/checkpoint",
    max_num_seqs=8,
    max_num_batched_tokens=48,
    token_buckets=(8, 32, 48),
    row_buckets=(8,),
    attention="xla",
    max_model_len=128,
    num_pages=13,
    swap_space=0.001,
    preemption_mode="swap",
)
REQUESTS = [
    EngineRequest(f"r{index}", tuple(range(3, 20 + 2 * index)), max_tokens=24 + index, temperature=1.0, seed=index)
    for index in range(6)
]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


@pytest.fixture(scope="module")
def undisturbed(runner) -> dict[str, EngineOutput]:
    answers, core = serve(runner)
    assert core.stats().num_preemptions_swap > 1, "nothing was in host memory"
    return answers


def serve(
    runner: ModelRunner, *failpoints: str, seconds: float = FAULT_SECONDS
) -> tuple[dict[str, EngineOutput], EngineCore]:
    """The whole answer to each request, through a small pool. seconds: between two looks at the clock."""
    runner._failpoints = Failpoints(())
    runner.reset()
    runner._failpoints = Failpoints(failpoints)
    times = itertools.count(0.0, seconds)
    core = EngineCore(CONFIG, runner, clock=lambda: next(times))
    tokens: dict[str, tuple[int, ...]] = {}
    ends: dict[str, EngineOutput] = {}
    for one in REQUESTS:
        core.handle(AddRequest(one))
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                name = output.request_id
                assert name not in ends, "an output after the end"
                tokens[name] = tokens.get(name, ()) + output.token_ids
                if output.finish_reason is not None:
                    ends[name] = EngineOutput(name, tokens[name], output.finish_reason, output.error)
        core.check_integrity()
    return ends, core


@pytest.mark.parametrize("after", [0, 5, 17])
@pytest.mark.parametrize("point", ["pack", "enqueue", "execute", "collect"])
def test_one_fault_changes_nobodys_tokens(runner, undisturbed, point, after):
    answers, _ = serve(runner, f"{point}=raise,times=1,after={after}")
    assert answers == undisturbed


def test_faults_that_are_far_apart_are_each_survived(runner, undisturbed):
    answers, _ = serve(runner, *(f"{point}=raise,times=1,after={after}" for point, after in (
        ("execute", 3), ("collect", 9), ("pack", 14), ("execute", 20), ("enqueue", 25), ("collect", 30)
    )))  # fmt: skip
    assert answers == undisturbed


@pytest.mark.parametrize("point", ["pack", "enqueue"])
def test_a_request_that_no_step_can_hold_ends_and_the_rest_go_on(runner, undisturbed, point):
    answers, _ = serve(runner, f"{point}=raise,request=r2,after=6")
    failed = answers.pop("r2")
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error.startswith("the request cannot be computed: InjectedFaultError: ")
    assert failed.token_ids == undisturbed["r2"].token_ids[: len(failed.token_ids)]
    assert answers == {name: answer for name, answer in undisturbed.items() if name != "r2"}


@pytest.mark.parametrize(
    ("failpoint", "words"),
    [
        ("pack=raise,after=4", "s after another: StepNotStartedError: InjectedFaultError: failpoint pack"),
        ("enqueue=raise,after=4", "s after another: StepNotStartedError: InjectedFaultError: failpoint enqueue"),
        ("execute=raise,after=4", "s after another: InjectedFaultError: failpoint execute"),
        ("collect=raise,after=4", "s after another: InjectedFaultError: failpoint collect"),
    ],
)
def test_a_fault_that_stays_ends_the_engine(runner, failpoint, words):
    with pytest.raises(EngineBrokenError, match=words):
        serve(runner, failpoint, seconds=1e-3)


def test_a_missing_program_is_retried_with_smaller_ones(runner, undisturbed):
    executables = runner.programs.executables
    large = [key for key in executables if key.kind == "decode" or (key.kind == "forward" and key.size > 32)]
    missing = {key: executables.pop(key) for key in large}
    assert missing
    misses = runner.compile_misses
    try:
        answers, _ = serve(runner)
    finally:
        executables.update(missing)
    assert answers == undisturbed
    assert runner.compile_misses > misses


@pytest.fixture
def raising(runner) -> Iterator[list[int]]:
    """Makes the forward program that the test names in the list raise while it runs, as one with a fault of its own."""
    countdown = [10**9]

    def callback() -> np.int32:
        countdown[0] -= 1
        if not countdown[0]:
            raise RuntimeError("a fault in a program")
        return np.int32(0)

    @jax.jit
    def add_nothing(vector):
        return vector + jax.pure_callback(callback, jax.ShapeDtypeStruct((), jnp.int32))

    kept = dict(runner.programs.executables)

    def wrapped(key: ProgramKey):
        def call(weights, pools, slots, hidden, vector):
            taken = jax.jit(lambda *arrays: (arrays[:3], add_nothing(arrays[3])), donate_argnums=(0, 1, 2))
            (pools, slots, hidden), vector = taken(pools, slots, hidden, jnp.asarray(vector))
            return kept[key](weights, list(pools), slots, hidden, vector)

        return call

    runner.programs.executables.update({key: wrapped(key) for key in kept if key.kind in ("forward", "decode")})
    yield countdown
    runner.programs.executables.update(kept)


def test_a_program_that_raises_while_it_runs(runner, undisturbed, raising, caplog):
    raising[0] = 7
    answers, core = serve(runner)
    assert answers == undisturbed
    assert core.stats().num_preemptions_recompute > 0
    assert "a fault in a program" in caplog.text


def test_a_reset_leaves_no_two_pools(runner):
    """On a device there is no room for both."""
    serve(runner)
    before = list(runner._arrays.pools)
    runner.reset()
    assert all(pool.is_deleted() for pool in before)
    assert runner._arrays.intact


def test_dispatch_tells_what_may_be_tried_again(runner):
    serve(runner)
    core = EngineCore(CONFIG, runner)
    core.handle(AddRequest(REQUESTS[0]))
    plan = core.scheduler.schedule()
    for point, kind in (("pack", StepNotStartedError), ("enqueue", StepNotStartedError), ("execute", RuntimeError)):
        runner._failpoints = Failpoints([f"{point}=raise,times=1"])
        with pytest.raises(kind) as error:
            runner.dispatch_forward(plan)
        assert runner._arrays.intact == isinstance(error.value, StepNotStartedError)
    runner.reset()


def test_forms_of_failpoints():
    assert Failpoint.parse("pack=raise") == Failpoint("pack")
    assert Failpoint.parse("collect=sleep(0.5),after=3,times=1") == Failpoint("collect", 0.5, times=1, after=3)
    assert Failpoint.parse("execute=raise,request=a#2") == Failpoint("execute", request="a#2")
    assert Failpoint.parse("send=raise,every=7,apart=90") == Failpoint("send", every=7, apart=90)
    for text in (
        "pack=raise,every=0",
        "",
        "pack",
        "pack=fall",
        "here=raise",
        "pack=raise,times=-1",
        "pack=raise,time=1",
        "pack=sleep(x)",
    ):
        with pytest.raises(ValueError, match="failpoint"):
            Failpoint.parse(text)
    slept: list[float] = []
    failpoints = Failpoints(["collect=sleep(2),after=1,times=2"], slept.append)
    for _ in range(5):
        failpoints.hit("collect", ())
    assert slept == [2.0, 2.0]


def test_when_failpoints_act():
    assert Failpoints(["pack=raise"]).at("send") is None
    times, acted = [0.0], []
    failpoints = Failpoints(["send=sleep(1),after=2,every=3,apart=10,times=2"], acted.append, lambda: times[0])
    hit = failpoints.at("send")
    assert hit is not None
    passes = []
    for number in range(1, 40):
        times[0] += 2.0
        hit(())
        if len(acted) > len(passes):
            passes.append(number)
    assert passes == [5, 11]  # of every third pass, the first that is 10 s after the one before
