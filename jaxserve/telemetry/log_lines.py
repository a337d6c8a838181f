"""Writes log lines in which nothing that a client sent passes for a line of its own or commands a terminal."""

from __future__ import annotations

import logging
import sys

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Log format of the server and of its engine's process, which write to the same standard error."""

_MARGIN = "  "
"""Begins each further line of a record, such as those of a traceback."""


class EscapingFormatter(logging.Formatter):
    """Formats a record with its message on one line and its traceback indented; control characters are escaped.

    Escaped is whatever is not printable: line breaks of all kinds, escape sequences of terminals, and characters that
    turn the direction of writing.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: logging._SysExcInfoType) -> str:  # noqa: N802  logging's name
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802  logging's name
        return _indented(super().formatStack(stack_info))


def log_to_stderr() -> None:
    """Sends the process's log to standard error, in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EscapingFormatter(LOG_FORMAT))
    logging.basicConfig(handlers=[handler], force=True)


def escaped(text: str) -> str:
    """Returns the text with whatever is not printable written as an escape, as `repr` does."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _indented(text: str) -> str:
    return "\n".join(_MARGIN + escaped(line) for line in text.split("\n"))
