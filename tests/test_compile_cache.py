"""The folder of compiled programs that the processes of a run of the tests share."""

import os
import pathlib

import jax.numpy as jnp
from jax._src.lru_cache import LRUCache

from tests import compile_cache


def test_entries_come_into_being_whole_and_are_what_jax_reads(tmp_path, monkeypatch):
    cache = LRUCache(str(tmp_path), max_size=-1)
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append((pathlib.Path(source).read_bytes(), pathlib.Path(target).exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    cache.put("a", b"program")
    assert seen == [(b"program", False)], "this process writes to jax's cache by renaming"
    assert cache.get("a") == b"program"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a-cache"]


def test_children_find_the_folder_and_write_nothing():
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == os.path.join(os.environ["XDG_CACHE_HOME"], "jax")
    assert float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) == float("inf")
    assert int(jnp.ones(3).sum()) == 3  # whatever the folder holds by now


def test_the_oldest_entries_go_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / name / "entry"
        path.parent.mkdir()
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    compile_cache.prune(tmp_path, 30)
    assert len(list(tmp_path.rglob("entry"))) == 3
    compile_cache.prune(tmp_path, 15)
    assert [path.parent.name for path in tmp_path.rglob("entry")] == ["new"]
