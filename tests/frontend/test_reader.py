"""How often an engine's messages reach the loop."""

from __future__ import annotations

import pytest

from jaxserve.engine.messages import EngineStats
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
