"""Makes an API key: `python -m jaxserve.keys NAME [--file KEYS] [--tenant NAME] [--admin] ...`.

The key is printed once and stored nowhere: the file of keys (AccessConfig.api_keys) has its hash. With --file the line
is added to the file, which a running server then reads again; without it the line is printed too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from jaxserve.serving.access.key_file import KeyFileError, new_key, parse_keys, read_keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a key; returns the exit code: 0, or 1 with one line where the file or a value is wrong."""
    parser = argparse.ArgumentParser(prog="jaxserve.keys", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("name", metavar="NAME", help="whose key it is; requests are seen only by their own name")
    parser.add_argument("--file", metavar="KEYS", help="file that the key's line is added to; made if it is not there")
    tenant = parser.add_mutually_exclusive_group()
    tenant.add_argument("--tenant", metavar="NAME", help="tenant of all its requests (default: the key's name)")
    tenant.add_argument("--any-tenant", action="store_true", help="each request names its tenant, as a gateway's do")
    priority = parser.add_mutually_exclusive_group()
    priority.add_argument(
        "--priority", type=int, metavar="N", help="of all its requests; a higher number is more urgent (default: 0)"
    )
    priority.add_argument("--any-priority", action="store_true", help="each request may name its priority")
    parser.add_argument("--admin", action="store_true", help="may make calls that concern the whole server")
    parser.add_argument(
        "--kv-events", action="store_true", help="may subscribe to KV events: of its tenant, or with --admin of all"
    )
    parser.add_argument("--expires", metavar="TIME", help="date or time (ISO 8601, UTC) from which it is refused")
    for name, meaning in (
        ("max-concurrent-requests", "requests at one time"),
        ("requests-per-minute", "requests a minute"),
        ("tokens-per-minute", "tokens of prompts and outputs a minute"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"limit of {meaning} (default: none)")
    parsed = parser.parse_args(arguments)
    try:
        key, line = _make(parsed)
        if parsed.file is not None:
            _add(pathlib.Path(parsed.file), line)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(key)
    if parsed.file is None:
        print(line)
    else:
        print(f"added {parsed.name} to {parsed.file}; the key is shown only here", file=sys.stderr)
    return 0


def _make(parsed: argparse.Namespace) -> tuple[str, str]:
    """Returns a key and its line."""
    fields: dict[str, object] = {
        "admin": parsed.admin,
        "kv_events": parsed.kv_events,
        "expires": parsed.expires,
    }
    if parsed.any_tenant or parsed.tenant is not None:
        fields["tenant"] = parsed.tenant
    if parsed.any_priority or parsed.priority is not None:
        fields["priority"] = parsed.priority
    for name in ("max_concurrent_requests", "requests_per_minute", "tokens_per_minute"):
        fields[name] = getattr(parsed, name)
    known = read_keys(parsed.file) if parsed.file is not None and os.path.exists(parsed.file) else ()
    return new_key(parsed.name, known, **fields)


def _add(path: pathlib.Path, line: str) -> None:
    """Adds a line to the file, which is replaced as a whole: a server that reads it meanwhile sees it before or after.

    Raises KeyFileError where the file would no longer be valid.
    """
    before = path.read_bytes() if path.exists() else b""
    after = before + (b"\n" if before and not before.endswith(b"\n") else b"") + line.encode() + b"\n"
    parse_keys(after, str(path))
    target = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # readable by this user only
    try:
        with open(descriptor, "wb") as file:
            file.write(after)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    try:
        read_keys(str(path))
    except KeyFileError as error:
        raise KeyFileError(f"the key was added, but a server refuses the file: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
