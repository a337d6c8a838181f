"""Work in steps: what bounds it, who waits for whom, and what happens when nobody waits for it any more."""

import asyncio
import threading

import pytest

from jaxserve.frontend.delta import QueueFullError
from jaxserve.frontend.encoding import PIECE_CHARACTERS
from jaxserve.frontend.workers import (
    MAX_BYTES,
    MAX_WAITING,
    MAX_WAITING_BYTES,
    ByteBudget,
    Workers,
    WorkersClosedError,
)

LONG = 4 * 1024 * 1024
SHORT = 100_000


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60), debug=True)


async def until(condition):
    while not condition():  # noqa: ASYNC110  threads change it
        await asyncio.sleep(0.001)


class Gate:
    """Steps that a test lets go on. size: of the step that waits."""

    def __init__(self, size=1, error=None):
        self.size = size
        self.error = error
        self.entered = threading.Event()
        self.open = threading.Event()
        self.ended = False

    def steps(self):
        yield self.size
        self.entered.set()
        assert self.open.wait(60)
        self.ended = True
        if self.error is not None:
            raise self.error
        yield 0
        return "done"


def test_results_and_errors_come_back():
    async def scenario():
        workers = Workers()
        good, bad = Gate(), Gate(error=ValueError("no"))
        good.open.set()
        bad.open.set()
        assert await workers.run(good.steps(), SHORT) == "done"
        assert await workers.run(good.steps(), LONG) == "done"
        with pytest.raises(ValueError, match=r"^no$"):
            await workers.run(bad.steps(), SHORT)
        workers.close()

    run(scenario())


def test_the_first_step_is_taken_on_the_loop():
    async def scenario():
        workers, threads = Workers(), []

        def steps():
            threads.append(threading.current_thread())
            yield 0
            threads.append(threading.current_thread())

        await workers.run(steps(), LONG)
        assert threads[0] is threading.main_thread()
        assert threads[1] is not threading.main_thread()

        def refuse():
            raise ValueError("too long")
            yield 0

        with pytest.raises(ValueError, match=r"^too long$"):
            await workers.run(refuse(), LONG)
        workers.close()

    run(scenario())


def test_a_short_text_never_waits_behind_long_ones():
    async def scenario():
        workers = Workers()
        gates = [Gate() for _ in range(8)]
        uncut = Gate(size=PIECE_CHARACTERS + 1)
        tasks = [asyncio.ensure_future(workers.run(gate.steps(), LONG)) for gate in [uncut, *gates]]
        await until(lambda: any(gate.entered.is_set() for gate in gates))
        short = Gate()
        short.open.set()
        assert await workers.run(short.steps(), SHORT) == "done"
        assert not any(task.done() for task in tasks)
        for gate in [uncut, *gates]:
            gate.open.set()
        assert await asyncio.gather(*tasks) == ["done"] * 9
        workers.close()

    run(scenario())


def test_one_that_cannot_be_cut_does_not_hold_up_those_that_can():
    async def scenario():
        workers = Workers()
        uncut, other, second = Gate(size=PIECE_CHARACTERS + 1), Gate(), Gate(size=PIECE_CHARACTERS + 1)
        first = asyncio.ensure_future(workers.run(uncut.steps(), LONG))
        await until(uncut.entered.is_set)
        other.open.set()
        assert await workers.run(other.steps(), LONG) == "done"
        # But one at a time: each takes much memory.
        waiting = asyncio.ensure_future(workers.run(second.steps(), LONG))
        second.open.set()
        await asyncio.sleep(0.05)
        assert not second.entered.is_set()
        uncut.open.set()
        assert await asyncio.gather(first, waiting) == ["done"] * 2
        workers.close()

    run(scenario())


def test_long_texts_take_turns():
    async def scenario():
        workers, order = Workers(), []

        def steps(name):
            for _ in range(5):
                yield 1
                order.append(name)

        await asyncio.gather(*(workers.run(steps(name), MAX_BYTES // 8) for name in "ab"))
        assert sorted(order) == ["a"] * 5 + ["b"] * 5
        assert "".join(order) not in ("aaaaabbbbb", "bbbbbaaaaa")
        workers.close()

    run(scenario())


def test_the_budget_bounds_what_is_worked_on():
    async def scenario():
        budget = ByteBudget(10)
        await budget.acquire(6)
        waiting = [asyncio.ensure_future(budget.acquire(size)) for size in (5, 1, 40)]
        await asyncio.sleep(0)
        assert budget.held == 6
        assert not any(one.done() for one in waiting)  # 1 would fit, but 5 came first
        budget.release(6)
        await asyncio.gather(*waiting[:2])
        assert budget.held == 6
        assert not waiting[2].done()
        budget.release(5)
        budget.release(1)
        await waiting[2]  # more than the whole budget, alone
        assert budget.held == 40
        budget.release(40)
        assert budget.held == 0

    run(scenario())


def test_who_waits_may_leave():
    async def scenario():
        budget = ByteBudget(10)
        await budget.acquire(8)
        large, small = (asyncio.ensure_future(budget.acquire(size)) for size in (5, 2))
        await asyncio.sleep(0)
        large.cancel()
        await small  # moved up at once
        assert budget.held == 10
        # Granted and canceled in the same moment.
        last = asyncio.ensure_future(budget.acquire(3))
        await asyncio.sleep(0)
        budget.release(8)
        last.cancel()
        with pytest.raises(asyncio.CancelledError):
            await last
        budget.release(2)
        assert budget.held == 0

    run(scenario())


def test_what_waits_is_bounded():
    async def scenario():
        budget = ByteBudget(10, max_waiting_bytes=20, max_waiting=3)
        await budget.acquire(10)
        waiting = [asyncio.ensure_future(budget.acquire(size)) for size in (15, 5)]
        await asyncio.sleep(0)
        assert budget.waiting == 20
        with pytest.raises(QueueFullError, match=r"^20 bytes of text wait to be tokenized; at most 20 bytes may"):
            await budget.acquire(1)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert budget.waiting == 5
        waiting += [asyncio.ensure_future(budget.acquire(1)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match=r"^3 texts wait to be tokenized; at most 3 may wait: try again later"):
            await budget.acquire(1)
        budget.release(10)
        await asyncio.gather(*waiting[1:])
        assert (budget.held, budget.waiting) == (7, 0)
        last = asyncio.ensure_future(budget.acquire(1000))  # however large, one may wait
        await asyncio.sleep(0)
        assert budget.waiting == 1000
        budget.release(7)
        await last

    run(scenario())


@pytest.mark.parametrize(
    ("number", "size", "other", "most"),
    [(100, LONG, SHORT, MAX_WAITING_BYTES // LONG), (2000, 5000, LONG, MAX_WAITING)],
)
def test_many_texts_are_refused_and_those_of_the_other_size_are_not(number, size, other, most):
    async def scenario():
        workers, gate, free = Workers(), Gate(), Gate()
        free.open.set()
        tasks = [asyncio.ensure_future(workers.run(gate.steps(), size)) for _ in range(number)]
        await until(lambda: any(task.done() for task in tasks))
        refused = [task for task in tasks if task.done()]
        assert all(isinstance(task.exception(), QueueFullError) for task in refused)
        waits = most + (MAX_BYTES * 3 // 4 // LONG if size == LONG else MAX_BYTES // 4 // size)
        assert len(tasks) - len(refused) == waits
        assert await workers.run(free.steps(), other) == "done"
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers.count("done") == waits
        workers.close()

    run(scenario())


def test_a_step_that_runs_keeps_its_share_when_its_call_is_canceled():
    async def scenario():
        workers = Workers()
        gate, other = Gate(), Gate()
        task = asyncio.ensure_future(workers.run(gate.steps(), 2 * MAX_BYTES))
        await until(gate.entered.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        other.open.set()
        waiting = asyncio.ensure_future(workers.run(other.steps(), LONG))
        await asyncio.sleep(0.05)
        assert not other.entered.is_set()
        gate.open.set()
        assert await waiting == "done"
        workers.close()

    run(scenario())


def test_closing_ends_who_waits():
    async def scenario():
        workers = Workers()
        gate = Gate()
        tasks = [asyncio.ensure_future(workers.run(gate.steps(), size)) for size in (2 * MAX_BYTES, LONG)]
        await until(gate.entered.is_set)
        workers.close()
        with pytest.raises(WorkersClosedError):
            await tasks[1]
        gate.open.set()
        with pytest.raises(WorkersClosedError):
            await tasks[0]
        with pytest.raises(WorkersClosedError):
            await workers.run(Gate().steps(), SHORT)

    run(scenario())
