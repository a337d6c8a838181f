"""The plan of the memory against what a process really needs: after the start an engine allocates what was planned."""

from __future__ import annotations

import json
import pathlib
import textwrap

import pytest

from tests.models.scripts import run_script

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = {
    "model": str(ROOT / "models" / "tiny" / "checkpoint"),
    "dtype": "float32",
    "num_pages": 8193,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "token_buckets": [8, 64],
    "compilation_cache_dir": None,
}
MB = 1_000_000
HOST_BYTES = 48 * MB
"""Room for what no plan of the device's memory holds: the requests, their tokens and Python's own."""

MEASURE = textwrap.dedent("""
    import json, sys
    import jax
    from benchmarks import memory_child

    run, clients = memory_child._run, []
    memory_child._run = lambda client, requests: (clients.append(client), run(client, requests))[1]
    found = memory_child.engine(json.loads(sys.argv[1]), 8)
    # The same engine, but it copies its pool once.
    before = memory_child.resident()["VmRSS"]
    memory_child.forget_peak()
    copies = jax.block_until_ready([pool + 0 for pool in clients[0].core.runner._arrays.pools])
    run(clients[0], 1)
    print(json.dumps(found | {"wasted": memory_child.resident()["VmHWM"] - before}))
""")


@pytest.mark.slow(reason="compiles without a cache and serves until every page was used")
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux alone")
def test_growth_after_the_start_is_within_the_plan():
    found = json.loads(run_script(MEASURE, json.dumps(OPTIONS)).splitlines()[-1])
    plan = found["plan"]
    assert plan["pages"] > 4 * HOST_BYTES
    assert found["steps"] > 100
    assert found["ready"] - found["before"] > plan["pages"] + plan["weights"], "the pool is resident when it is ready"
    assert found["load_peak"] - found["ready"] < plan["temporaries"] + HOST_BYTES
    assert found["wasted"] > plan["temporaries"] + 2 * HOST_BYTES, "what is not planned is seen"
