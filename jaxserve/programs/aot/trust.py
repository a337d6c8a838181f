"""Checks that what the process trusts belongs to this user alone: compiled programs, API keys and certificates.

An executable is machine code, and any user that can write to its directory can have code run; whoever writes to a file
of keys lets himself in. One rule holds for the compilation cache, bundles and key files: a directory and the files in
it belong to this user and no other user may write to them, rename them or replace them by writing to a parent
directory. What is secret may not be read by others either.
"""

from __future__ import annotations

import os
import pathlib
import stat

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_MAX_SMALL_BYTES = 4 * 1024 * 1024


class UntrustedError(ValueError):
    """Another user could change or read what must be this user's; the text gives the reason and the remedy."""


def check_directory(path: pathlib.Path) -> None:
    """Checks a directory and all its parents, by its name and after resolving links.

    Raises:
        UntrustedError: another user may write there; its text begins with what follows the directory's name.
        OSError: a directory cannot be read.
    """
    _check_own(path.stat(), "700")
    lexical = pathlib.Path(os.path.abspath(path))
    for above in dict.fromkeys((*lexical.parents, *path.resolve().parents)):
        _check_above(above)


def read_own(path: pathlib.Path) -> bytes:
    """Reads a file whose directory was checked.

    Raises:
        UntrustedError: another user may write to it; its text begins with what follows the file's name.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        _check_own(os.fstat(file.fileno()), "go-w")
        return file.read()


def read_trusted(path: pathlib.Path, *, secret: bool) -> bytes:
    """Reads a file of keys or certificates.

    A file that belongs to root counts as this user's, which is how secrets are mounted into containers; it may then be
    readable by a group, since this user could not read it otherwise.

    Args:
        secret: others may not read it.

    Raises:
        UntrustedError: another user may change it, or read a secret one; its text begins with what follows the file's
            name.
        OSError: it cannot be read.
    """
    if not path.is_file():  # opening a pipe would wait for its writer
        path.stat()
        raise UntrustedError("is no regular file")
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if own or status.st_uid != 0:
            _check_own(status, "600" if secret else "go-w")
        elif status.st_mode & _OTHERS:
            raise UntrustedError(f"has the mode {stat.S_IMODE(status.st_mode):04o}: others may write to it")
        if secret and status.st_mode & (0o077 if own else 0o007):
            raise UntrustedError(
                f"has the mode {stat.S_IMODE(status.st_mode):04o}: others may read it; chmod {'600' if own else 'o-r'} "
                "it"
            )
        for above in dict.fromkeys((*pathlib.Path(os.path.abspath(path)).parents, *path.resolve().parents)):
            _check_above(above)
        data = file.read(_MAX_SMALL_BYTES + 1)
    if len(data) > _MAX_SMALL_BYTES:
        raise UntrustedError(f"has more than {_MAX_SMALL_BYTES} bytes")
    return data


def _check_own(status: os.stat_result, mode: str) -> None:
    """Raises UntrustedError where another user owns the file or directory, or may write to it."""
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise UntrustedError(f"belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & _OTHERS:
        raise UntrustedError(
            f"has the mode {stat.S_IMODE(status.st_mode):04o}: others may write to it; chmod {mode} it"
        )


def _check_above(path: pathlib.Path) -> None:
    """Raises UntrustedError where other users may replace the content of `path`."""
    status = path.stat()
    if not hasattr(os, "getuid"):
        return
    if status.st_uid not in (os.getuid(), 0):
        raise UntrustedError(f"lies in {path}, which belongs to user {status.st_uid}")
    # A sticky directory, such as /tmp, keeps users from changing files that they do not own.
    if status.st_mode & _OTHERS and not status.st_mode & stat.S_ISVTX and not _private_group(status):
        raise UntrustedError(
            f"lies in {path}, which has the mode {stat.S_IMODE(status.st_mode):04o}: others may replace it; chmod go-w "
            "that directory"
        )


def _private_group(status: os.stat_result) -> bool:
    """Returns whether the group contains only the owner: many systems give each user one, writable by default."""
    return not status.st_mode & stat.S_IWOTH and status.st_gid == status.st_uid
