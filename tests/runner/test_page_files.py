"""Pages in files: what is read back is what was written, or nothing, whatever happened to the files meanwhile."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jaxserve.config.settings import CacheConfig
from jaxserve.kv_cache import page_files
from jaxserve.kv_cache.content_keys import cache_secret
from jaxserve.kv_cache.page_files import HEADER_BYTES, PageFiles, fingerprint

PAGE = 4096
SECRET, MODEL = b"s" * 16, fingerprint("a model", 1)


def opened(directory, identity: bytes = MODEL, secret: bytes = SECRET, page: int = PAGE, most: int = 1 << 20):
    return PageFiles(str(directory), identity, secret, page, most)


def key_of(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest() + (b"\1\0" if number % 3 == 0 else b"")


def content(key: bytes) -> bytes:
    return (hashlib.blake2b(key).digest() * (PAGE // 64))[:PAGE]


def filled(directory, count: int, **others) -> list[bytes]:
    """Writes pages and closes the directory; returns their keys."""
    files, keys = opened(directory, **others), [key_of(number) for number in range(count)]
    for key in keys:
        files.write(key, content(key))
    files.close()
    return keys


def paths(directory) -> list[pathlib.Path]:
    return sorted(pathlib.Path(directory).glob("*.page"))


def test_what_was_written_is_read_by_the_next_process(tmp_path):
    keys = filled(tmp_path, 5)
    files = opened(tmp_path)
    assert set(files.keys) == set(keys)
    assert [files.read(key) for key in keys] == [content(key) for key in keys]
    assert files.read(key_of(9)) is None
    files.clear()
    assert (len(files), paths(tmp_path)) == (0, [])


def test_files_are_bounded_and_the_one_used_longest_ago_goes_first(tmp_path):
    room = 3 * (HEADER_BYTES + PAGE)
    keys = filled(tmp_path, 3, most=room)
    files = opened(tmp_path, most=room)
    files.read(keys[0])
    assert files.write(key_of(3), content(key_of(3))) == [keys[1]]
    assert files.keys == (keys[2], keys[0], key_of(3))
    assert files.num_bytes == sum(path.stat().st_size for path in paths(tmp_path)) == room
    files.close()
    files = opened(tmp_path, most=room - 1)
    assert len(files) == 2, "a smaller bound counts at the start"


def test_a_page_larger_than_all_room_is_not_written(tmp_path):
    files = opened(tmp_path, most=PAGE)
    assert files.write(key_of(1), content(key_of(1))) == []
    assert len(files) == 0


@pytest.mark.parametrize(
    "other",
    [{"identity": fingerprint("a model", 2)}, {"page": PAGE // 2}],
    ids=["other model", "other page shape"],
)
def test_files_of_another_configuration_are_refused_in_one_line_and_deleted(tmp_path, caplog, other):
    filled(tmp_path, 4)
    files = opened(tmp_path, **other)
    assert (len(files), files.num_refused, paths(tmp_path)) == (0, 4, [])
    (line,) = caplog.messages
    assert "4 files of disk_cache_dir" in line


def test_files_under_another_secret_are_refused_when_they_are_read(tmp_path):
    """Where nothing but the secret differs, which the fingerprint of a runner covers too."""
    keys = filled(tmp_path, 2)
    files = opened(tmp_path, secret=b"t" * 16)
    assert [files.read(key) for key in keys] == [None, None]
    assert (files.num_refused, len(files)) == (2, 0)


def test_a_file_under_the_name_of_another_page_is_refused(tmp_path):
    keys = filled(tmp_path, 2)
    first, second = (tmp_path / f"{key.hex()}.page" for key in keys)
    os.replace(first, second)
    assert len(opened(tmp_path)) == 0


def test_links_and_partial_files_are_refused_and_other_files_are_left_alone(tmp_path):
    (key,) = filled(tmp_path, 1)
    target = tmp_path / "target"
    target.write_bytes((tmp_path / f"{key.hex()}.page").read_bytes())
    (tmp_path / f"{key.hex()}.page").unlink()
    (tmp_path / f"{key.hex()}.page").symlink_to(target)
    (tmp_path / f"{key_of(5).hex()}.partial").write_bytes(b"half")
    assert (len(opened(tmp_path)), target.exists()) == (0, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "target"]


def test_no_two_processes_use_one_directory(tmp_path):
    files = opened(tmp_path)
    with pytest.raises(ValueError, match=r"disk_cache_dir is .* which another process uses"):
        opened(tmp_path)
    files.close()
    opened(tmp_path)


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"disk_cache_dir is .* which cannot be used"):
        opened(tmp_path / "file")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_and_can_be_written_again(tmp_path, seed):
    rng, keys = random.Random(seed), filled(tmp_path, 30)
    damaged = set()
    late = opened(tmp_path) if seed % 2 else None  # damaged before or after the start
    for key in rng.sample(keys, 20):
        path = tmp_path / f"{key.hex()}.page"
        data = bytearray(path.read_bytes())
        match rng.choice(("byte", "byte", "header", "cut", "longer", "gone")):
            case "byte":
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case "header":
                data[rng.randrange(HEADER_BYTES)] ^= 1 << rng.randrange(8)
            case "cut":
                del data[rng.randrange(len(data)) :]
            case "longer":
                data += b"x"
            case "gone":
                path.unlink()
                damaged.add(key)
                continue
        path.write_bytes(bytes(data))
        damaged.add(key)
    files = late or opened(tmp_path)
    for key in keys:
        assert files.read(key) == (None if key in damaged else content(key))
    assert set(files.keys) == set(keys) - damaged
    for key in damaged:
        files.write(key, content(key))
        assert files.read(key) == content(key)


def test_a_directory_keeps_a_secret_for_the_processes_that_use_it(tmp_path):
    config = CacheConfig(swap_space=1.0, disk_cache_dir=str(tmp_path / "new"))
    secret = cache_secret(config)
    assert secret is not None
    assert (len(secret), cache_secret(config)) == (64, secret)
    assert (tmp_path / "new" / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["secret"]
    assert cache_secret(CacheConfig()) is None


@pytest.mark.parametrize("others", [{}, {"swap_space": 1.0, "enable_host_caching": False}])
def test_a_directory_without_host_memory_is_refused(others):
    with pytest.raises(ValueError, match="disk_cache_dir is 'x'; pages get there by way of host memory"):
        CacheConfig(disk_cache_dir="x", **others)


WRITER = """
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("page_files", {module!r})
page_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_files)
files = page_files.PageFiles({directory!r}, {identity!r}, {secret!r}, {page}, {most})
print("ready", flush=True)
number = {begin}
while True:
    number += 1
    key = hashlib.blake2b(b"%d" % number, digest_size=16).digest() + (b"\\1\\0" if number % 3 == 0 else b"")
    files.write(key, (hashlib.blake2b(key).digest() * ({page} // 64))[:{page}])
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_wrong_page(tmp_path):
    """Pages are those of 64 KiB that fit 2 MiB, so that files are written, renamed and deleted all the time."""
    big, rng, seen = 16 * PAGE, random.Random(1), 0
    for round_ in range(6):
        told = {
            "module": page_files.__file__, "directory": str(tmp_path), "identity": MODEL, "secret": SECRET,
            "page": big, "most": 2 << 20, "begin": 1000 * round_,
        }  # fmt: skip
        child = subprocess.Popen([sys.executable, "-I", "-c", textwrap.dedent(WRITER.format(**told))], stdout=-1)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.005, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        files = opened(tmp_path, page=big, most=2 << 20)
        assert files.num_bytes <= 2 << 20
        for key in files.keys:
            assert files.read(key) == (hashlib.blake2b(key).digest() * (big // 64))[:big]
        seen += len(files)
        assert not list(tmp_path.glob("*.partial"))
        files.close()
    assert seen > 0
