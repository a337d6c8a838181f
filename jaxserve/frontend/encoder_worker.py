"""Encodes texts in a process: `python -m jaxserve.frontend.encoder_worker FD`, see `EncoderProcess`.

When the front end dies, it reads the end of the stream and ends too.
"""

from __future__ import annotations

import array
import contextlib
import os
import pathlib
import socket
import sys

import tokenizers

from jaxserve.engine.framing import FrameReader, frames
from jaxserve.frontend.large_blocks import return_freed_memory

_NICENESS = 19
"""Of the process: whoever streams goes first, and a long text takes what is left."""

_LARGE = 1024 * 1024
"""Bytes of a text after which memory is given back to the system."""


def serve(connection: socket.socket) -> None:
    """Encodes the texts of the front end at the other end of the socket, until it closes."""
    _yield_to_others()
    reader = FrameReader(connection)
    first = reader.read()
    if first is None:
        return
    backend = tokenizers.Tokenizer.from_str(first[0].decode())
    connection.sendall(frames([b""]))
    while (payloads := reader.read()) is not None:
        for payload in payloads:
            text = payload[1:].decode()
            ids = backend.encode_batch_fast([text], add_special_tokens=bool(payload[0]))[0].ids
            connection.sendall(frames([array.array("i", ids).tobytes()]))
            if len(payload) > _LARGE:
                del text, ids, payload
                return_freed_memory()


def _yield_to_others() -> None:
    """Lowers the priority of this process, and on Linux that of its session: where sessions share the processors, the
    niceness of a process counts within its own alone.
    """
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):  # a kernel without it, or one that lets nobody
        pathlib.Path("/proc/self/autogroup").write_text(str(_NICENESS), encoding="ascii")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with socket.socket(fileno=int(sys.argv[1])) as served:
        serve(served)
