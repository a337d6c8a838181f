"""Defines errors of a batch's files and lines, and describes errors of the operating system."""

from __future__ import annotations

import errno

_REMEDIES = {
    errno.ENOENT: "check its name and that its directory exists",
    errno.ENOTDIR: "a part of its path is no directory: check the path",
    errno.EISDIR: "name a file in it",
    errno.EACCES: "check the permissions of the file and of its directory",
    errno.EPERM: "check the owner and the attributes of the file",
    errno.EROFS: "name a file on a file system that can be written",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle: name the file itself",
    errno.ENOSPC: "free space on its file system",
    errno.EDQUOT: "free space or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or use another file system",
    errno.EIO: "check its disk or the connection to it",
    errno.ESTALE: "the file server has replaced it: mount the file system again",
    errno.ENOTCONN: "its file system is not connected: mount it again",
    errno.ETIMEDOUT: "its file server does not answer: check the connection",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close some",
    errno.EPIPE: "its reader has gone",
}


class BatchFileError(ValueError):
    """A file cannot be used as it is; the text is one line."""


class LineError(ValueError):
    """One line is faulty. code: machine-readable. key: the line's custom_id, None when it has none."""

    def __init__(self, code: str, message: str, key: str | None = None):
        super().__init__(message)
        self.code = code
        self.key = key


def reason(error: OSError) -> str:
    """Returns the system's description of an error, followed by the remedy where there is one."""
    words = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{words}; {remedy}" if remedy else words
