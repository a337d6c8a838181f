"""Reads and writes the file of API keys: one JSON object a line, with a hash in place of the key.

A key is made of 32 random bytes, so that one fast hash protects it: nobody can try them all, and a slow one would only
help whoever floods the server with wrong keys. The salt keeps keys of different files from being compared.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import pathlib
import secrets
from collections.abc import Sequence

import msgspec

from jaxserve.config.shown import shown
from jaxserve.programs.aot.trust import UntrustedError, read_trusted
from jaxserve.request import MAX_ID_LENGTH, check_identity
from jaxserve.serving.access.callers import Caller, CallerLimits

PREFIX = "jaxserve-"
"""Beginning of every key, by which scanners of source code and people recognize one."""

MAX_KEYS = 1024
"""Maximum number of keys in a file: every call is compared with all of them, which must not hold up others."""

_KEY_BYTES = 32
_SALT_BYTES = 16
_HASH_BYTES = 32


class KeyFileError(ValueError):
    """The file of API keys cannot be used; the text is one line that names the file and the remedy."""


class KeyLine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Defines a line of the file.

    Attributes:
        name: of the key's owner. Lines may share a name, and then all but expires: a key that is being replaced.
        salt, hash: hexadecimal.
        tenant: of all requests; left out it is the name, null leaves it to each request.
        priority: of all requests (higher is more urgent); left out it is 0, null leaves it to each request.
        admin: may make calls that concern the whole server.
        kv_events: may subscribe to KV events: of its tenant, or with admin of all.
        expires: date or time (ISO 8601, UTC without an offset) from which the key is refused.
        max_concurrent_requests, requests_per_minute, tokens_per_minute: see CallerLimits.
    """

    name: str
    salt: str
    hash: str
    tenant: str | msgspec.UnsetType | None = msgspec.UNSET
    priority: int | None = 0
    admin: bool = False
    kv_events: bool = False
    expires: str | None = None
    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def caller(self) -> Caller:
        """Returns who calls with this key. Raises ValueError naming the field."""
        _check_name(self.name)
        tenant = self.name if self.tenant is msgspec.UNSET else self.tenant
        limits = CallerLimits(self.max_concurrent_requests, self.requests_per_minute, self.tokens_per_minute)
        for field in dataclasses.fields(limits):
            value = getattr(limits, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1, or left out for no limit")
        caller = Caller(self.name, tenant, self.priority, self.admin, limits, self.kv_events)
        caller.options()  # checks tenant and priority
        return caller

    def expiry(self) -> float | None:
        """Returns `expires` in seconds of `time.time`. Raises ValueError."""
        if self.expires is None:
            return None
        try:
            when = datetime.datetime.fromisoformat(self.expires)
        except ValueError:
            raise ValueError(f"expires is {shown(self.expires)}; write a date or time such as 2030-01-31") from None
        return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()


@dataclasses.dataclass(frozen=True)
class Key:
    """Holds what a key is recognized by, and whose it is. expires: seconds of `time.time`, or None."""

    salt: bytes
    digest: bytes
    caller: Caller
    expires: float | None


def key_digest(key: bytes, salt: bytes) -> bytes:
    """Returns the hash of a key."""
    return hashlib.blake2b(key, digest_size=_HASH_BYTES, salt=salt).digest()


def find_key(keys: Sequence[Key], given: bytes) -> Key | None:
    """Returns the key that was given, or None.

    Takes the same time whichever of the keys it is, if any, and wherever a wrong one differs.
    """
    digests = {salt: key_digest(given, salt) for salt in {key.salt: None for key in keys}}
    found = None
    for key in keys:
        if hmac.compare_digest(digests[key.salt], key.digest):
            found = key
    return found


def new_key(name: str, keys: Sequence[Key] = (), **fields: object) -> tuple[str, str]:
    """Makes a key; returns it and its line for the file.

    Args:
        name: of its owner.
        keys: those that the file has already; they lend their salt, so that a call is hashed once for all of them.
        fields: further ones of KeyLine.

    Raises ValueError naming the field.
    """
    key = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    salt = keys[-1].salt if keys else secrets.token_bytes(_SALT_BYTES)
    line = KeyLine(name=name, salt=salt.hex(), hash=key_digest(key.encode(), salt).hex(), **fields)  # pyright: ignore[reportArgumentType]
    line.caller()
    line.expiry()
    return key, msgspec.json.encode(line).decode()


def read_keys(path: str) -> tuple[Key, ...]:
    """Reads the file, all of it or nothing.

    Raises:
        KeyFileError: it cannot be read, is not this user's alone, or a line of it is wrong.
    """
    try:
        data = read_trusted(pathlib.Path(path), secret=True)
    except UntrustedError as error:
        raise KeyFileError(f"api_keys {path} {error}") from error
    except OSError as error:
        raise KeyFileError(f"api_keys {path} cannot be read: {error.strerror}") from error
    return parse_keys(data, path)


def parse_keys(data: bytes, path: str) -> tuple[Key, ...]:
    """Returns the keys of the file's content. path: for errors. Raises KeyFileError."""
    keys: dict[tuple[bytes, bytes], Key] = {}
    callers: dict[str, Caller] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        try:
            key = _parse_line(text)
            name = key.caller.name
            if len(keys) >= MAX_KEYS:
                raise ValueError(f"there are more than {MAX_KEYS} keys; let a gateway that knows its users hold one")
            if callers.setdefault(name, key.caller) != key.caller:
                raise ValueError(f"name {shown(name)} stands on two lines that allow different things")
            if (other := keys.setdefault((key.salt, key.digest), key)) is not key:
                raise ValueError(f"the key of {shown(name)} is that of {shown(other.caller.name)} on a line before")
        except ValueError as error:
            raise KeyFileError(f"api_keys {path}:{number}: {error}") from error
    if not keys:
        raise KeyFileError(f"api_keys {path} has no key; python -m jaxserve.keys NAME --file {path} adds one")
    return tuple(keys.values())


def _parse_line(text: bytes) -> Key:
    line = msgspec.json.decode(text, type=KeyLine)
    salt, digest = _from_hex("salt", line.salt, _SALT_BYTES), _from_hex("hash", line.hash, _HASH_BYTES)
    return Key(salt, digest, line.caller(), line.expiry())


def _from_hex(name: str, text: str, length: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != length:
        raise ValueError(f"{name} is {shown(text)}; it must be {2 * length} hexadecimal digits")
    return value


def _check_name(name: str) -> None:
    check_identity("name", name)
    if not name or not name.isprintable():
        raise ValueError(f"name is {shown(name)}; it must be 1 to {MAX_ID_LENGTH} printable characters")
