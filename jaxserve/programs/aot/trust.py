"""Whose compiled programs are run: this user's alone.

An executable is machine code, and whoever can put one where it is loaded from has it run. One rule holds for the
compilation cache and for bundles: a directory and the files in it belong to this user and nobody else may write to
them, and nobody else may rename or replace them by writing to a directory above.
"""

from __future__ import annotations

import os
import pathlib
import stat

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(ValueError):
    """A place where somebody else could put programs; the text says why, and the remedy."""


def check_directory(path: pathlib.Path) -> None:
    """Checks a directory and all that lead to it, by its name and after links.

    Raises:
        UntrustedError: somebody else may write there; its text begins with what follows the directory's name.
        OSError: a directory cannot be looked at.
    """
    _check_own(path.stat(), "700")
    lexical = pathlib.Path(os.path.abspath(path))
    for above in dict.fromkeys((*lexical.parents, *path.resolve().parents)):
        _check_above(above)


def read_own(path: pathlib.Path) -> bytes:
    """Reads a file whose directory was checked.

    Raises:
        UntrustedError: somebody else may write to it; its text begins with what follows the file's name.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        _check_own(os.fstat(file.fileno()), "go-w")
        return file.read()


def _check_own(status: os.stat_result, mode: str) -> None:
    """Raises UntrustedError where another user owns the thing or may write to it."""
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise UntrustedError(f"belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & _OTHERS:
        raise UntrustedError(
            f"has the mode {stat.S_IMODE(status.st_mode):04o}: others may write to it; chmod {mode} it"
        )


def _check_above(path: pathlib.Path) -> None:
    """Raises UntrustedError where others may replace what lies in `path`."""
    status = path.stat()
    if not hasattr(os, "getuid"):
        return
    if status.st_uid not in (os.getuid(), 0):
        raise UntrustedError(f"lies in {path}, which belongs to user {status.st_uid}")
    # A sticky directory, such as /tmp, keeps everybody from touching what is not theirs.
    if status.st_mode & _OTHERS and not status.st_mode & stat.S_ISVTX and not _private_group(status):
        raise UntrustedError(
            f"lies in {path}, which has the mode {stat.S_IMODE(status.st_mode):04o}: others may replace it; chmod go-w "
            "that directory"
        )


def _private_group(status: os.stat_result) -> bool:
    """Whether only the owner's own group may write: many systems give each user one, and let it write by default."""
    return not status.st_mode & stat.S_IWOTH and status.st_gid == status.st_uid
