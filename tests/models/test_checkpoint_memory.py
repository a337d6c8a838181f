"""Loading a checkpoint holds one parameter on the host beside those already placed."""

import textwrap

import jax
import numpy as np
import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.parameter import get
from jaxserve.models.loading import checkpoint
from tests.models.checkpoints import BASE, SHAPES, tensor_shapes, write_checkpoint, write_shape
from tests.models.scripts import run_script

MEASURE = textwrap.dedent("""
    import dataclasses, re, sys
    import jax, numpy as np
    from jaxserve.models import params
    from jaxserve.models.loading import checkpoint
    from jaxserve.models.config import ModelConfig
    from jaxserve.models.quantization import KINDS, Quantization

    def peak():
        # Not ru_maxrss: a process starts with its parent's.
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

    directory, dtype, wasteful = sys.argv[1], sys.argv[2], sys.argv[3] == "wasteful"
    config, mesh = ModelConfig.from_directory(directory), params.make_mesh()
    if sys.argv[3] in KINDS:
        config = dataclasses.replace(config, quantization=Quantization.at_load(sys.argv[3]))
    jax.block_until_ready(jax.device_put(np.zeros(1 << 20), mesh.devices.flat[0]))
    if wasteful:  # a loader that gathers all parameters on the host before it sends the first
        place, held = checkpoint.jax.device_put, []
        checkpoint.jax.device_put = lambda buffer, sharding: held.append((buffer, sharding)) or np.zeros(())
    before = peak()
    weights = checkpoint.load(directory, config, dtype, mesh)
    if wasteful:
        weights = [place(buffer.copy(), sharding) for buffer, sharding in held]
        jax.block_until_ready(weights)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    print(peak() - before, size)
""")


ALLOWANCE = 24 * 1024 * 1024
"""Bytes of a process that are no weights: blocks that are quantized at a time, and what is imported late."""


def peak_while_loading(directory, dtype, manner):
    """(growth of the process's peak resident size while loading, bytes of the parameters)."""
    growth, size = map(int, run_script(MEASURE, directory, dtype, manner).split())
    return growth, size


@pytest.mark.parametrize(
    ("stored", "target"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_loading_never_holds_a_second_copy(tmp_path, stored, target):
    """On a CPU the parameters themselves are host memory: peak growth is their size and little more.

    Twenty layers, so that the largest parameter is about a twentieth of the whole.
    """
    raw = BASE | {"num_hidden_layers": 20, "hidden_size": 320, "intermediate_size": 1280, "vocab_size": 4096}
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in tensor_shapes(raw).items()}
    directory = write_checkpoint(tmp_path / "model", raw, tensors, shards=4, dtype=stored)
    growth, size = peak_while_loading(directory, target, "plain")
    assert size > 60e6
    assert growth < 1.35 * size
    if stored == target == "float32":
        growth, size = peak_while_loading(directory, target, "wasteful")
        assert growth > 1.7 * size  # the measurement sees a second copy where there is one


def test_quantizing_while_loading_holds_the_target_and_little_more(tmp_path):
    """At most twice the largest stored tensor beside the target form; the file is mapped, and its pages count while
    they are touched."""
    raw = BASE | {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 512}
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in tensor_shapes(raw).items()}
    directory = write_checkpoint(tmp_path / "model", raw, tensors, shards=4, dtype="bfloat16")
    largest = 2 * 512 * 2048
    growth, size = peak_while_loading(directory, "bfloat16", "int4")
    stored = 2 * sum(array.size for array in tensors.values())
    assert size < 0.32 * stored
    assert growth < size + 2 * largest + ALLOWANCE


def test_the_largest_parameter_alone_is_held_on_the_host(tmp_path, monkeypatch):
    """Counts the bytes of host buffers that are alive whenever one is sent to a device."""
    directory = write_shape(tmp_path / "model", SHAPES["everything"])
    alive = {"now": 0, "most": 0}

    class Buffer(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive["now"] -= self.nbytes

    def empty(shape, dtype=float):
        buffer = np.ndarray.__new__(Buffer, shape, dtype)
        alive["now"] += buffer.nbytes
        alive["most"] = max(alive["most"], alive["now"])
        return buffer

    monkeypatch.setattr(checkpoint.np, "empty", empty)
    # The copy stands for a device's memory: on a CPU a device may keep the host's buffer for its own.
    place = jax.device_put
    monkeypatch.setattr(checkpoint.jax, "device_put", lambda buffer, sharding: place(np.array(buffer), sharding))
    weights = checkpoint.load(directory, ModelConfig.from_directory(directory), "float32", params.make_mesh())
    monkeypatch.undo()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert alive["most"] == largest
    assert get(weights, ("layers", 0, "mlp", "down")).shape == (64, 96)
