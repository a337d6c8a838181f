"""Keeps pages of the KV cache in a directory, one file each, for the next start of the same model.

A file is a header and the page's bytes:

    magic, version, fingerprint of what computed the page, length of the content key, content key,
    number of bytes, checksum of all of this and of the bytes (BLAKE2b, keyed by the secret of the content keys)

A page is written under a temporary name and renamed when it is whole, so that a process may be killed at any moment.
`PageFiles` opens a directory by reading the headers alone; a page is checked when it is read. Whatever does not match
is deleted, and computed again: another version, model, dtype, shape or secret, a file that was cut or changed. Nothing
in a file is executed or interpreted but as numbers of this layout. Content keys are keyed hashes, so that files name
neither tenants nor salts nor tokens; the keys and values in them are as confidential as the prompts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import stat
import struct
from collections import Counter, OrderedDict

_log = logging.getLogger(__name__)

MAGIC, VERSION = b"jaxservK", 1
DIGEST_BYTES = 16
MAX_KEY_BYTES = 24

_HEAD = struct.Struct(f"<8sH16sH{MAX_KEY_BYTES}sQ")
HEADER_BYTES = _HEAD.size + DIGEST_BYTES
SUFFIX, PARTIAL = ".page", ".partial"


def fingerprint(*parts: object) -> bytes:
    """Returns 16 bytes that stand for what decides a page's bytes. parts: values with a lasting `repr`."""
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=16).digest()


class PageFiles:
    """Keeps at most `max_bytes` of pages of `page_bytes` each. Not to be used by two threads at once.

    Raises ValueError where the directory cannot be used, or another process uses it.
    """

    def __init__(self, directory: str, identity: bytes, secret: bytes, page_bytes: int, max_bytes: int):
        self._directory = pathlib.Path(directory).expanduser()
        self._identity, self._secret = identity, secret
        self.page_bytes, self._max_bytes = page_bytes, max_bytes
        self._file_bytes = HEADER_BYTES + page_bytes
        self._pages: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self.num_refused = 0
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ValueError(
                f"disk_cache_dir is {directory!r}, which cannot be used: {error.strerror}; give a directory of this "
                "user's, or unset it"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ValueError(
                f"disk_cache_dir is {directory!r}, which another process uses; give each one a directory of its own"
            ) from error
        self._open()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pages

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Returns the content keys of all pages, least recently used first."""
        return tuple(self._pages)

    @property
    def num_bytes(self) -> int:
        return len(self._pages) * self._file_bytes

    def read(self, key: bytes) -> bytes | None:
        """Returns the bytes of a page, or None where it is not there; deletes a file that is not what it should be."""
        if key not in self._pages:
            return None
        path = self._path(key)
        try:
            with open(path, "rb", opener=_no_links) as file:
                content = file.read(self._file_bytes + 1)
        except OSError as error:
            self._refuse(key, f"it cannot be read: {error.strerror}")
            return None
        trouble = self._trouble(content[:HEADER_BYTES], len(content), path.name)
        data = content[HEADER_BYTES:]
        if not trouble and self._digest(content[: _HEAD.size], data) != content[_HEAD.size : HEADER_BYTES]:
            trouble = "its checksum is another"
        if trouble:
            self._refuse(key, trouble)
            return None
        self._pages.move_to_end(key)
        with contextlib.suppress(OSError):
            os.utime(path)  # the order of use, for the next start
        return data

    def write(self, key: bytes, data: bytes) -> list[bytes]:
        """Stores a page; returns the keys of those deleted for it.

        Raises:
            OSError: it could not be written.
        """
        if key in self._pages:
            self._pages.move_to_end(key)
            return []
        if len(data) != self.page_bytes or not 0 < len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"a page has {self.page_bytes} bytes and a key of 1 to {MAX_KEY_BYTES}, not {len(data)}")
        if self._file_bytes > self._max_bytes:
            return []
        deleted = []
        while self.num_bytes + self._file_bytes > self._max_bytes:
            oldest = next(iter(self._pages))
            self._delete(oldest)
            deleted.append(oldest)
        head = _HEAD.pack(MAGIC, VERSION, self._identity, len(key), key, len(data))
        path = self._path(key)
        partial = path.with_suffix(PARTIAL)
        try:
            with open(partial, "wb", opener=_private) as file:
                file.write(head + self._digest(head, data))
                file.write(data)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        self._pages[key] = None
        return deleted

    def clear(self) -> None:
        """Deletes all pages."""
        for key in list(self._pages):
            self._delete(key)

    def close(self) -> None:
        """Lets other processes use the directory."""
        os.close(self._lock)

    def _open(self) -> None:
        """Lists the files, by their headers; deletes those that are not whole, or another configuration's."""
        found: list[tuple[int, bytes]] = []
        refused: Counter[str] = Counter()
        for entry in os.scandir(self._directory):
            if not entry.name.endswith((SUFFIX, PARTIAL)):
                continue
            trouble, used, key = "it is not whole", 0, b""
            if entry.name.endswith(SUFFIX):
                trouble, used, key = self._look(entry)
            if trouble:
                refused[trouble] += 1
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
            else:
                found.append((used, key))
        self._pages.update((key, None) for _, key in sorted(found))
        self.num_refused = refused.total()
        while self._pages and self.num_bytes > self._max_bytes:
            self._delete(next(iter(self._pages)))
        if self.num_refused:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in refused.most_common())
            many = f"{self.num_refused} files of disk_cache_dir {self._directory}"
            _log.warning("%s are refused and deleted: %s", many, reasons)

    def _look(self, entry: os.DirEntry[str]) -> tuple[str, int, bytes]:
        """Returns what is wrong with a file, when it was used, and its content key."""
        try:
            with open(entry.path, "rb", opener=_no_links) as file:
                status = os.fstat(file.fileno())
                header = file.read(HEADER_BYTES) if stat.S_ISREG(status.st_mode) else b""
        except OSError as error:
            return f"it cannot be read: {error.strerror}", 0, b""
        trouble = self._trouble(header, status.st_size, entry.name)
        if trouble:
            return trouble, 0, b""
        *_, length, key, _ = _HEAD.unpack(header[: _HEAD.size])
        return "", status.st_mtime_ns, key[:length]

    def _trouble(self, header: bytes, size: int, name: str) -> str:
        """Returns what is wrong with a header, or ""."""
        if len(header) < HEADER_BYTES:
            return "it is not whole"
        magic, version, identity, length, key, count = _HEAD.unpack(header[: _HEAD.size])
        if magic != MAGIC or version != VERSION:
            return "it has another format or version"
        if identity != self._identity:
            return "it is of another model, dtype, page shape or secret"
        if length > MAX_KEY_BYTES or name != f"{key[:length].hex()}{SUFFIX}":
            return "its name is that of another page"
        return "" if (count, size) == (self.page_bytes, self._file_bytes) else "it is not whole"

    def _digest(self, head: bytes, data: bytes) -> bytes:
        digest = hashlib.blake2b(head, digest_size=DIGEST_BYTES, key=self._secret, person=b"page file")
        digest.update(data)
        return digest.digest()

    def _path(self, key: bytes) -> pathlib.Path:
        return self._directory / f"{key.hex()}{SUFFIX}"

    def _refuse(self, key: bytes, trouble: str) -> None:
        self.num_refused += 1
        _log.warning("%s is refused and deleted: %s", self._path(key), trouble)
        self._delete(key)

    def _delete(self, key: bytes) -> None:
        del self._pages[key]
        with contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
