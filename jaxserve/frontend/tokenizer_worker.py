"""Encodes and decodes texts in a process: `python -m jaxserve.frontend.tokenizer_worker FD`, see `TokenizerProcess`.

When the front end dies, it reads the end of the stream and ends too.
"""

from __future__ import annotations

import array
import os
import socket
import sys

import tokenizers

from jaxserve.config.id_checks import IDS_PER_PART
from jaxserve.engine.framing import FrameReader
from jaxserve.frontend.large_blocks import return_freed_memory
from jaxserve.frontend.low_priority import yield_to_others
from jaxserve.frontend.tokenizer_process import CHARACTERS_PER_PART, DECODE
from jaxserve.frontend.worker_process import frames_of_parts

_LARGE = 1024 * 1024
"""Bytes of a request after which memory is given back to the system."""


def serve(connection: socket.socket) -> None:
    """Answers the front end at the other end of the socket, until it closes."""
    yield_to_others()  # whoever streams goes first, and a long text takes what is left
    reader = FrameReader(connection)
    first = reader.read()
    if first is None:
        return
    backend = tokenizers.Tokenizer.from_str(first[0].decode())
    connection.sendall(frames_of_parts([]))
    while (payloads := reader.read()) is not None:
        for payload in payloads:
            connection.sendall(frames_of_parts(_answer(backend, payload)))
            if len(payload) > _LARGE:
                del payload
                return_freed_memory()


def _answer(backend: tokenizers.Tokenizer, payload: bytes) -> list[bytes]:
    """Returns the answer to a request, in parts."""
    kind, special, data = payload[:1], bool(payload[1]), payload[2:]
    if kind == DECODE:
        text = backend.decode_batch([array.array("I", data).tolist()], skip_special_tokens=special)[0]
        size = CHARACTERS_PER_PART
        return [text[start : start + size].encode() for start in range(0, len(text), size)]
    ids = array.array("I", backend.encode_batch_fast([data.decode()], add_special_tokens=special)[0].ids)
    size = IDS_PER_PART
    return [ids[start : start + size].tobytes() for start in range(0, len(ids), size)]


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with socket.socket(fileno=int(sys.argv[1])) as served:
        serve(served)
