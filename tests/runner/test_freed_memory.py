"""Freed memory stays with the process: programs whose temporaries are large take no page faults once they are warm."""

from __future__ import annotations

import json
import platform
import textwrap

import pytest

from tests.models.scripts import run_script

MEASURE = textwrap.dedent("""
    import json, resource, sys
    from jaxserve.runner.freed_memory import keep_freed_memory, use_one_arena

    done = [use_one_arena()] if sys.argv[1] == "one" else []
    import jax
    import jax.numpy as jnp
    from jaxserve.programs.compiler import compiler_options

    # A product of 128 MiB that nothing is fused with, more than the arena of a thread can hold.
    call = jax.jit(lambda left, right: jnp.max(left @ right, axis=1))
    left, right = jnp.ones((4096, 16)), jnp.ones((16, 8192))
    program = call.lower(left, right).compile(compiler_options("cpu"))
    done.append(keep_freed_memory())

    def faults(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            program(left, right).block_until_ready()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count

    faults(8)  # until small blocks have found other places than the large ones
    temporaries = program.memory_analysis().temp_size_in_bytes // resource.getpagesize()
    print(json.dumps({"done": done, "faults": faults(16), "temporaries": temporaries}))
""")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
@pytest.mark.parametrize("arenas", ["one", "many"])
def test_large_temporaries_are_reused(arenas):
    """With an arena for each thread they are not, which says that this measures something."""
    found = json.loads(run_script(MEASURE, arenas).splitlines()[-1])
    assert all(found["done"])
    assert found["temporaries"] >= 2**15
    if arenas == "one":
        assert found["faults"] < found["temporaries"] / 3  # now and then a small block cuts a large one
    else:
        assert found["faults"] > found["temporaries"] / 2
