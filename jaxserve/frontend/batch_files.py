"""Reads and writes the two files of an offline batch: the input, a file or a pipe, and the results.

The output holds each key once, with a digest of its request, so that a run that was stopped can be resumed. A file that
is not a batch's output is never changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import select
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.frontend.batch_errors import BatchFileError, reason
from jaxserve.frontend.batch_lines import MAX_LINE_BYTES
from jaxserve.frontend.batch_resume import Digest, Results

MAX_RESULT_BYTES = 256 * 1024 * 1024
"""Maximum length of an output line; a file with a longer line is not an output."""

_BLOCK = 1024 * 1024
_STANDARD = {"input": ("-", "/dev/stdin"), "output": ("-", "/dev/stdout")}
_KINDS = (
    (stat.S_ISDIR, "a directory; name a file in it"),
    (stat.S_ISSOCK, "a socket; give a file or a pipe"),
    (stat.S_ISBLK, "a block device; give a file or a pipe"),
    (stat.S_ISCHR, "a character device; give a file or a pipe"),
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_RESULT_FIELDS = {"id", "custom_id", "response", "error"}
_DIGEST_FIELD = "request_digest"


# ---- input -----------------------------------------------------------------------------------------------------------


class InputFile:
    """Reads lines of an open input: a file, which can be read again, or a pipe, whose lines are read as they arrive.

    Raises BatchFileError, from the constructor and from reading.
    """

    def __init__(self, path: str):
        self._path = path
        with _naming("input", "read", path):
            status = _status("input", path)
            if status is not None:
                _refuse_kind("input", path, status)
            self._fd = os.dup(0) if _is_standard("input", path) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._start = os.lseek(self._fd, 0, os.SEEK_CUR) if self.is_regular else 0
        self._reader = io.BufferedReader(io.FileIO(self._fd, "rb"), _BLOCK)
        self._buffer = bytearray()  # of a pipe
        self._searched = 0  # bytes of the buffer that are known to hold no newline
        self._ended = False

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def rewind(self) -> None:
        """Seeks back to the position at which a file was opened."""
        with _naming("input", "read", self._path):
            self._reader.seek(self._start)

    def readline(self, size: int) -> bytes:
        """Returns the next line, or `size` bytes of it where it is longer; blocks until available. Empty at the end."""
        with _naming("input", "read", self._path):
            if self.is_regular:
                return self._reader.readline(size)
            while not self._has_line(size):
                self._fill()
            end = self._buffer.find(b"\n", 0, size) + 1 or size
            line = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._searched = 0
            return line

    def line_is_there(self) -> bool:
        """Returns whether `readline` would not block."""
        if self.is_regular:
            return True
        with _naming("input", "read", self._path):
            while not self._has_line(MAX_LINE_BYTES):
                if not _poll(self._fd, select.POLLIN, 0):
                    return False
                self._fill()
        return True

    def _has_line(self, size: int) -> bool:
        found = self._buffer.find(b"\n", self._searched) >= 0
        if not found:
            self._searched = len(self._buffer)
        return found or self._ended or len(self._buffer) >= size

    def _fill(self) -> None:
        try:
            block = os.read(self._fd, _BLOCK)
        except BlockingIOError:  # a process that shares the pipe may have set it non-blocking
            _poll(self._fd, select.POLLIN)
            return
        self._buffer += block
        self._ended = not block


def open_input(path: str) -> InputFile:
    """Opens a file, or a pipe: `-` is standard input. Raises BatchFileError when it cannot be read."""
    return InputFile(path)


# ---- output ----------------------------------------------------------------------------------------------------------


class OutputFile:
    """Appends results to those of an earlier run (`done`); also writes to a pipe or a terminal.

    Raises BatchFileError when it cannot be written, is no batch output, or another run is writing it; it is not changed
    then, nor before the first `write` or `repair`. notes: lines for the user. is_standard: the results go where
    standard output goes.
    """

    def __init__(self, path: str, input_path: str):
        self.path = path
        self.done = Results()
        self.notes: list[str] = []
        self._closed = self._locked = False
        self._end = 0  # of the last whole line
        self._torn = 0  # bytes behind it, of a line that an earlier run has not finished
        self._lacks_newline = False
        self.is_standard = False
        with _naming("output", "written", path):
            self._fd = self._open(input_path)
        try:
            status = os.fstat(self._fd)
            self.is_regular, self._has_name = stat.S_ISREG(status.st_mode), bool(status.st_nlink)
            if self.is_regular:
                with _naming("output", "locked", path):
                    self._lock()
                with _naming("output", "read", path):
                    self._read()
            with contextlib.suppress(OSError):  # standard output is closed
                self.is_standard = os.path.samestat(os.fstat(self._fd), os.fstat(1))
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self, input_path: str) -> int:
        status, standard = _status("output", self.path), _is_standard("output", self.path)
        if status is not None and (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
            source = _status("input", input_path)
            if source is not None and os.path.samestat(status, source):
                raise BatchFileError(f"output {self.path!r} is the input; give another name")
        if status is None or stat.S_ISREG(status.st_mode):
            path = "/dev/stdout" if standard else self.path  # opened anew: to be resumed it must be read as well
            return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _refuse_kind("output", self.path, status)
        return os.dup(1) if standard else os.open(self.path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)

    def _lock(self) -> None:
        """Locks the output against a second run, with whichever kind of lock the file system supports."""
        refusal = ""
        for lock in (fcntl.flock, fcntl.lockf):
            try:
                lock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) or (
                    error.errno == errno.EACCES and lock is fcntl.lockf
                ):
                    raise BatchFileError(f"output {self.path!r} is being written by another run") from error
                if error.errno not in _NO_LOCKS:
                    raise
                refusal = error.strerror
            else:
                self._locked = True
                return
        self.notes.append(
            f"output {self.path!r} is on a file system without locks ({refusal}): nothing keeps a second run from "
            "writing it at the same time"
        )

    # ---- what is there already ---------------------------------------------------------------------------------------

    def _read(self) -> None:
        size, number = os.fstat(self._fd).st_size, 0
        # Not a descriptor of its own: closing that would end a lock of `lockf`.
        reader = io.BufferedReader(io.FileIO(self._fd, "rb", closefd=False), _BLOCK)
        while self._end < size:
            number += 1
            line = reader.read(1)
            if line == b"{":  # else it is not ours, and may have no end
                line += reader.readline(min(MAX_RESULT_BYTES, size - self._end) - 1)
            try:
                key, digest = _parse_result(line)
            except ValueError as error:
                if self._end + len(line) < size or not _is_torn(line):
                    raise BatchFileError(
                        f"output {self.path!r} holds something else in line {number}; give another name or remove it"
                    ) from error
                self._torn = len(line)
                self.notes.append(f"the last line of the output, {len(line)} bytes, is not whole and is written anew")
                return
            earlier = self.done.find(key)
            if earlier is not None:
                raise BatchFileError(
                    f"output {self.path!r} holds custom_id {key!r} twice, in lines {earlier.line} and {number}; "
                    "remove one of them or give another name"
                )
            self.done.add(key, digest)
            self._end += len(line)
            self._lacks_newline = not line.endswith(b"\n")
        if os.fstat(self._fd).st_size != size:
            raise BatchFileError(f"output {self.path!r} is being written by another program; give another name")

    def repair(self) -> None:
        """Removes an incomplete last line of an earlier run."""
        if self._torn:
            with _naming("output", "written", self.path):
                if os.fstat(self._fd).st_size != self._end + self._torn:
                    raise BatchFileError(f"output {self.path!r} was changed by another program; give another name")
                os.ftruncate(self._fd, self._end)
            self._torn = 0
        if self._lacks_newline:
            self._lacks_newline = False
            self._append(b"\n")

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, result: Mapping[str, Any], digest: Digest) -> None:
        """Appends one complete line and hands it to the operating system: a later kill does not lose it."""
        self.repair()
        self._append(json.dumps({**result, _DIGEST_FIELD: str(digest)}).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        try:
            with _naming("output", "written", self.path):
                rest = memoryview(data)
                while rest:
                    try:
                        rest = rest[os.write(self._fd, rest) :]
                    except BlockingIOError:  # a process that shares the pipe may have set it non-blocking
                        _poll(self._fd, select.POLLOUT)
        except BaseException:  # a signal too
            if self._locked:  # else the end may be another's; what stays behind is removed by the next run
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
            raise
        self._end += len(data)

    def close(self) -> None:
        """Flushes the results to disk; idempotent. Raises BatchFileError where the system reports a loss."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.is_regular:
                status = os.fstat(self._fd)
                if self._has_name and not status.st_nlink:
                    raise BatchFileError(
                        f"output {self.path!r} was removed while it was written; the same command computes it again"
                    )
                if status.st_size < self._end:
                    raise BatchFileError(
                        f"output {self.path!r} was cut by another program; the same command computes what is missing"
                    )
                os.fsync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # the file system has no fsync
                raise self._lost(error) from error
        finally:
            try:
                os.close(self._fd)
            except OSError as error:
                raise self._lost(error) from error

    def _lost(self, error: OSError) -> BatchFileError:
        return BatchFileError(
            f"output {self.path!r} may lack results that were written last: {reason(error)}; then the same "
            "command computes what is missing"
        )


def _parse_result(data: bytes) -> tuple[str, Digest | None]:
    """Parses the key and digest of an output line. Raises ValueError when it is anything else."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict) or set(value) - {_DIGEST_FIELD} != _RESULT_FIELDS:
        raise ValueError("other fields")
    name, key = value["id"], value["custom_id"]
    outcome = [part for part in (value["response"], value["error"]) if part is not None]
    if not isinstance(name, str) or not name.startswith("batch_req_") or not isinstance(key, str) or not key:
        raise ValueError("other names")
    if len(outcome) != 1 or not isinstance(outcome[0], dict):
        raise ValueError("neither a response nor an error")
    return key, Digest.parse(value[_DIGEST_FIELD]) if _DIGEST_FIELD in value else None


_PARTS_OF_A_LINE = (
    ('{"id": "batch_req_', r"\d*"),
    ('", "custom_id": "', r'(?:[^"\\]|\\.)*(?:\\\Z)?'),
    ('", "response": ', ""),
)
_REST_OF_A_LINE = ('{"status_code": 200, "request_id": "line-', 'null, "error": {"code": "')


def _is_torn(data: bytes) -> bool:
    """Returns whether bytes may be the beginning of a line that `OutputFile.write` has written."""
    if not data or re.search(rb"[^ -~]", data):
        return False
    rest = data.decode("ascii")
    for literal, pattern in _PARTS_OF_A_LINE:
        if not rest.startswith(literal):
            return literal.startswith(rest)
        rest = re.sub(rf"\A{pattern}", "", rest[len(literal) :], count=1)
    return any(rest.startswith(literal) or literal.startswith(rest) for literal in _REST_OF_A_LINE)


# ---- the operating system --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(role: str, verb: str, path: str) -> Iterator[None]:
    """Turns an error of the operating system into a BatchFileError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise BatchFileError(f"{role} {path!r} cannot be {verb}: {reason(error)}") from error


def _is_standard(role: str, path: str) -> bool:
    return path in _STANDARD[role]


def _status(role: str, path: str) -> os.stat_result | None:
    """Returns the status of a path, or of standard input or output; None when nothing is there. Raises OSError."""
    if _is_standard(role, path):
        if (sys.stdin if role == "input" else sys.stdout) is None:
            raise BatchFileError(f"{role} {path!r} is closed; give a file")
        return os.fstat(0 if role == "input" else 1)
    if "\0" in path:
        raise BatchFileError(f"{role} {path!r} holds a NUL character; no name of a file does")
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _refuse_kind(role: str, path: str, status: os.stat_result) -> None:
    """Refuses anything but a file or a pipe. A terminal and the null device are harmless."""
    standard = _is_standard(role, path)
    if stat.S_ISCHR(status.st_mode):
        for harmless in (os.devnull, "/dev/tty"):
            with contextlib.suppress(OSError):
                if os.stat(harmless).st_rdev == status.st_rdev:
                    return
        if standard and os.isatty(0 if role == "input" else 1):
            return
    for is_kind, words in _KINDS:
        if is_kind(status.st_mode) and not (standard and stat.S_ISSOCK(status.st_mode)):
            raise BatchFileError(f"{role} {path!r} is {words}")


def _poll(fd: int, events: int, timeout: int | None = None) -> bool:
    """Waits until a descriptor is ready, for `timeout` milliseconds at most."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(timeout))
