"""How often an engine's messages reach the loop."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from jaxserve.engine.channel import END_SECONDS
from jaxserve.engine.framing import FrameReader, frames
from jaxserve.engine.messages import EngineFailed, EngineStats, decode, encode
from jaxserve.frontend.reader import LONGEST_WAIT, EngineReader
from tests.frontend.fakes import HandPlayedEngine


class HandCrankedLoop:
    """An event loop whose time and CPU time the test sets."""

    def __init__(self):
        self.now = self.cpu = 100.0
        self.timers = []  # (when, callback)

    def time(self):
        return self.now

    def call_soon_threadsafe(self, callback):
        callback()

    def call_later(self, delay, callback):
        self.timers.append((self.now + delay, callback))

    def turn(self, seconds, cpu=0.0):
        """Lets time pass, `cpu` of it busy, and runs what is due."""
        self.now += seconds
        self.cpu += cpu
        due = [callback for when, callback in self.timers if when <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for callback in due:
            callback()


@pytest.fixture
def loop():
    return HandCrankedLoop()


def reader_on(loop, share):
    reader, delivered = EngineReader(HandPlayedEngine(), loop, share, cpu_time=lambda: loop.cpu), []
    reader._deliver = lambda messages: delivered.append([message.num_steps for message in messages])
    return (lambda number: reader._hand_over([EngineStats(num_steps=number)])), delivered


def test_a_loop_that_may_take_all_its_time_gets_everything_at_once(loop):
    hand_over, delivered = reader_on(loop, share=1.0)
    for number in range(3):
        hand_over(number)
        loop.turn(0.001, cpu=0.001)
    assert delivered == [[0], [1], [2]]


def test_messages_wait_together_until_the_loop_has_rested(loop):
    hand_over, delivered = reader_on(loop, share=0.25)
    hand_over(0)
    assert delivered == [[0]]
    loop.turn(0.003, cpu=0.002)  # 2 ms of work in 8 ms are a quarter
    hand_over(1)
    loop.turn(0.003)
    hand_over(2)
    assert delivered == [[0]]
    loop.turn(0.003)
    assert delivered == [[0], [1, 2]]


def test_a_loop_that_has_rested_delivers_at_once(loop):
    hand_over, delivered = reader_on(loop, share=0.25)
    hand_over(0)
    loop.turn(0.01, cpu=0.002)
    hand_over(1)
    assert delivered == [[0], [1]]


def test_no_message_waits_long(loop):
    hand_over, delivered = reader_on(loop, share=0.25)
    hand_over(0)
    loop.turn(10.0, cpu=9.0)
    hand_over(1)
    loop.turn(LONGEST_WAIT / 2)
    assert delivered == [[0]]
    loop.turn(LONGEST_WAIT)
    assert delivered == [[0], [1]]


def test_tokens_do_not_wait_for_what_else_the_loop_has_done(loop):
    hand_over, delivered = reader_on(loop, share=0.25)
    for number in range(20):
        hand_over(number)
        loop.turn(0.01, cpu=0.001)
    loop.turn(0.04, cpu=0.04)  # a message of megabytes
    hand_over(20)
    assert delivered[-1] == [20]
    for number in range(21, 100):  # deliveries that become dearer for good are soon counted in full
        hand_over(number)
        loop.turn(0.012, cpu=0.012)
    assert max(map(len, delivered)) >= 3


class SocketEngine(HandPlayedEngine):
    """An engine whose messages arrive at a descriptor. `receive` says how it ended, when the test lets it."""

    def __init__(self):
        super().__init__()
        self.ours, self.theirs = socket.socketpair()
        self.frames = FrameReader(self.ours)
        self.may_end = threading.Event()

    def say(self, *messages):
        self.theirs.sendall(frames(map(encode, messages)))

    def fileno(self):
        return self.ours.fileno()

    def poll(self):
        payloads = self.frames.poll()
        return None if payloads is None else [decode(payload) for payload in payloads]

    def receive(self):
        self.may_end.wait(10.0)
        return [EngineFailed("it has ended")]

    def close(self, seconds=END_SECONDS):
        self.may_end.set()
        self.ours.close()
        self.theirs.close()
        return ""


class Delivered:
    """Keeps what is delivered, and lets a test wait for it."""

    def __init__(self):
        self._queue = asyncio.Queue()

    def __call__(self, messages):
        for message in messages:
            self._queue.put_nowait(message)

    async def next(self, count=1):
        return [await asyncio.wait_for(self._queue.get(), 10.0) for _ in range(count)]

    @property
    def empty(self):
        return self._queue.empty()


def test_the_loop_itself_reads_what_arrives_at_a_descriptor():
    async def read():
        engine, delivered = SocketEngine(), Delivered()
        engine.say(EngineStats(num_steps=0))
        reader = EngineReader(engine, asyncio.get_running_loop(), share=0.5)
        threads = threading.active_count()
        reader.start(delivered, busy=lambda: False)
        for number in range(1, 50):
            engine.say(EngineStats(num_steps=number))
            if number % 7 == 0:
                await asyncio.sleep(0)
        assert [message.num_steps for message in await delivered.next(50)] == list(range(50))
        assert threading.active_count() == threads
        reader.stop()
        engine.say(EngineStats(num_steps=50))
        await asyncio.sleep(0.01)
        assert delivered.empty
        reader.close()

    asyncio.run(read())


def test_the_loop_does_not_wait_to_learn_how_an_engine_has_ended():
    async def read():
        engine, delivered = SocketEngine(), Delivered()
        reader = EngineReader(engine, asyncio.get_running_loop())
        reader.start(delivered, busy=lambda: False)
        engine.say(EngineStats(num_steps=1))
        engine.theirs.close()
        assert await delivered.next() == [EngineStats(num_steps=1)]
        await asyncio.sleep(0.01)  # the loop runs, although `receive` waits
        assert delivered.empty
        engine.may_end.set()
        assert await delivered.next() == [EngineFailed("it has ended")]
        reader.stop()
        assert reader.close() == ""

    asyncio.run(read())


def test_messages_that_cannot_be_read_end_the_engine():
    async def read():
        engine, delivered = SocketEngine(), Delivered()
        reader = EngineReader(engine, asyncio.get_running_loop())
        reader.start(delivered, busy=lambda: False)
        engine.theirs.sendall(frames([b"\xc1"]))
        (failed,) = await delivered.next()
        assert isinstance(failed, EngineFailed)
        assert "cannot be received" in failed.error
        reader.stop()
        reader.close()

    asyncio.run(read())
