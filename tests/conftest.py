"""Settings of every test: CPU only, reproducible hypothesis runs. Warnings are errors (pyproject.toml)."""

import collections
import gc
import os
import pathlib
import signal
import sys

from tests import budgets, compile_cache

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its platform")
os.environ["JAX_PLATFORMS"] = "cpu"

_held = compile_cache.use(os.environ.get("PYTEST_XDIST_WORKER", ""))

# A shell that runs the suite in the background has it ignore SIGINT; children that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

budgets.load_profile()

_ONE_LANE = (
    # No jax in the process under test, or only by way of an engine that other files start on both.
    "benchmarks",
    "engine",
    "frontend",
    "scheduler",
    "simulator",
    "test_batch",  # and all whose names begin so
    "test_beam_search.py",
    "test_checkpoint_meaning.py",
    "test_batch_timeline.py",
    "test_docs.py",
    "test_gin_config.py",
    "test_install.py",
    "test_layers.py",
    "test_limits_config.py",
    "test_startup_spans.py",
    "test_recorder.py",
    "test_request.py",
    "test_sampling_fields.py",
    "test_shown.py",
    "test_text.py",
    "test_timings.py",
    "kernels/test_cascade_h200.py",  # reads PTX, which the newer jax does not dump
    # llvmlite writes their instructions; runner/test_cpu_programs calls them by way of both
    "kernels/test_cpu_linear.py",
    "kernels/test_panel_products.py",
    "kernels/test_panel_weights.py",  # and models/test_quantized_checkpoints
    "kernels/test_triton_cascade.py",  # interpreted, as runner/test_triton_programs.py is
    "models/test_checkpoint_files.py",
    "models/test_config.py",
    "models/test_end_tokens.py",
    "models/test_expert_checkpoints.py",
    "models/test_family_configs.py",
    "models/test_family_matrix.py",
    "models/test_family_parity.py",  # models/test_layer_kinds has what their layers are made of on both
    "models/test_kv_scales.py",  # magnitudes of what dense attention computes, which test_parity compares on both
    "models/test_tiny_tasks.py",
    "models/test_tiny_train.py",  # trains the shipped model, for developers
    "runner/test_build_set.py",  # threads and their order around the compiler; other files start engines on both
    "runner/test_embeddings.py",  # test_llm_embed and HTTP's answers run the pooling program on both
    "runner/test_grouped_layers.py",  # models/test_layer_kinds serves two groups on both
    "runner/test_expert_identity.py",  # kernels' bits, in both by kernels/test_grouped_matmul and models/test_experts
    "runner/test_explain.py",  # its plans and estimates have tests of their own
    "runner/test_memory_measured.py",  # a process's memory; test_memory plans it on both
    "runner/test_packing.py",
    "runner/test_resolve.py",
    "runner/test_triton_programs.py",  # interpreted; both compile for a GPU what is run here
    "runner/test_trust.py",
    # gRPC and processes: test_end_to_end and the quick ones run on both.
    "faults",
    "server/http/test_http_beam_search.py",
    "server/http/test_http_bounds.py",
    "server/http/test_http_errors.py",
    "server/http/test_http_tokens.py",
    "server/test_access",
    "server/test_admission_grpc.py",
    "server/test_captures.py",
    "server/test_client_ports.py",
    "server/test_command_line.py",
    "server/test_connections.py",
    "server/test_convert.py",
    "server/test_deploy.py",
    "server/test_gateway_launcher.py",
    "server/test_held_open.py",
    "server/test_kv_events.py",
    "server/test_large_messages.py",
    "server/test_metrics_route.py",
    "server/test_page.py",
    "server/test_prefix_cache_ports.py",
    "server/test_request_headers.py",
    "server/test_server_process.py",
    "server/test_tracing.py",
    "server/test_vllm",
    "test_engine_meter.py",
    "test_llm_prefix_cache.py",
)
"""Beginnings of paths of tests that neither another jax nor another Python can make fail; see docs/development.md."""

_THINNED = ("kernels", "models", "runner")
_KEPT_WHOLE = (
    "kernels/test_attention_h200.py",
    "kernels/test_grouped_matmul_h200.py",
    "kernels/test_kv_write_h200.py",
    "models/test_quantized_h200.py",
    "runner/test_aot_programs.py",
)
"""What is compiled for a GPU: machines with one have the second lane's jax."""
_EVERY = 3

_FOR_GPU = (
    "kernels/test_attention_h200.py",
    "kernels/test_grouped_matmul_h200.py",
    "kernels/test_kv_write_h200.py",
    "models/test_quantized_h200.py",
    "runner/test_aot_",
    "runner/test_estimate.py",
)
"""What is compiled for a GPU and read, so that XLA's options matter."""


def _thin_second_lane(items, here):
    """Marks all but every third case of a test with more than three cases: another jax makes a function fail, and not
    one of its cases alone. The first lane runs them all."""
    cases = collections.defaultdict(list)
    for item in items:
        path = item.path.relative_to(here).as_posix()
        if path.startswith(_THINNED) and not path.startswith(_KEPT_WHOLE):
            cases[item.path, getattr(item, "originalname", item.name)].append(item)
    for of_one_test in cases.values():
        if len(of_one_test) > _EVERY:
            for number, item in enumerate(of_one_test):
                if number % _EVERY:
                    item.add_marker("one_lane")


def pytest_collection_modifyitems(config, items):
    """Marks what `.ci/run` leaves out of its second lane, takes out what only `make test-all` runs, and begins with the
    slow ones, so that no worker is left with one at the end."""
    here = pathlib.Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(_ONE_LANE):
            item.add_marker("one_lane")
        if item.path.relative_to(here).as_posix().startswith(_FOR_GPU):
            item.add_marker("for_gpu")
    _thin_second_lane(items, here)
    if not budgets.ALL:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Has this process write to jax's cache, if any test that it runs has imported jax.

    What was imported and collected lives as long as the process: the garbage collector need not pass over it. It runs
    less often, because tracing makes many objects and little garbage.
    """
    if "jax" in sys.modules:
        compile_cache.write_whole_entries()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)
