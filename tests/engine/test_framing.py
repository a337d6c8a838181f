"""Frames over a socket pair: whole, in order, and never in the way of the sender."""

from __future__ import annotations

import socket
import threading

import pytest

from jaxserve.engine.framing import FrameReader, FrameSender, frames

PAYLOADS = [bytes([number % 251]) * (1 + number * 7919 % 20_000) for number in range(2_000)]


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def read_all(connection: socket.socket, count: int) -> list[bytes]:
    reader, payloads = FrameReader(connection), []
    while len(payloads) < count:
        more = reader.read()
        assert more is not None, f"the stream ended after {len(payloads)} payloads"
        payloads += more
    return payloads


def test_a_reader_that_does_not_read_holds_nobody_up(pair):
    """20 MB, a hundred times what a socket buffers, are sent before the first byte is read."""
    ours, theirs = pair
    sender = FrameSender(ours)
    for payload in PAYLOADS:
        sender.send([payload])
    assert read_all(theirs, len(PAYLOADS)) == PAYLOADS
    sender.close(60)


def test_frames_stay_in_order_while_the_reader_falls_behind_and_catches_up(pair):
    ours, theirs = pair
    sender = FrameSender(ours)
    received: list[bytes] = []
    for number in range(0, len(PAYLOADS), 200):
        part = PAYLOADS[number : number + 200]
        for payload in part[:100]:
            sender.send([payload])
        sender.send(part[100:])
        received += read_all(theirs, 200)
    assert received == PAYLOADS
    sender.close(60)


def test_close_gives_the_reader_time(pair):
    ours, theirs = pair
    sender = FrameSender(ours)
    sender.send(PAYLOADS)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.extend(read_all(theirs, len(PAYLOADS))))
    reader.start()
    sender.close(60)
    ours.close()
    reader.join(60)
    assert received == PAYLOADS


def test_a_reader_that_is_gone_is_an_error(pair):
    ours, theirs = pair
    sender = FrameSender(ours)
    sender.send(PAYLOADS)
    theirs.close()
    with pytest.raises(ConnectionError):
        while True:
            sender.send(PAYLOADS[:1])
    sender.close(60)


def test_polling_returns_what_is_complete_and_never_waits():
    near, far = socket.socketpair()
    with near, far:
        reader = FrameReader(near)
        assert reader.poll() == []
        data = frames([b"one", b"", b"three"])
        far.sendall(data[:5])
        assert reader.poll() == []
        far.sendall(data[5:-2])
        assert reader.poll() == [b"one", b""]
        far.sendall(data[-2:])
        far.shutdown(socket.SHUT_WR)
        assert reader.poll() == [b"three"]
        assert reader.poll() is None
        assert reader.poll() is None
