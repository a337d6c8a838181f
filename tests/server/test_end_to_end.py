"""The real server over a real engine in its own process, with a model of random weights: only texts are meaningless."""

import asyncio
import concurrent.futures
import io
import signal
import sys
import zipfile

import grpc
import httpx
import pytest

from benchmarks.dashboard_check import free_port
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import AsyncClient, Client, join
from tests.server.fakes import VOCAB_SIZE, save_tokenizer
from tests.server.process import Process
from tests.server.test_metrics_route import samples
from tests.trace_format import check_trace

CONFIG = f"""
EngineConfig.load_format = 'dummy'
EngineConfig.dtype = 'float32'
SchedulerConfig.max_num_seqs = 8
SchedulerConfig.max_num_batched_tokens = 16
EngineConfig.token_buckets = (16,)
EngineConfig.row_buckets = (8,)
CacheConfig.num_pages = 33
ModelConfig.architecture = 'LlamaForCausalLM'
ModelConfig.vocab_size = {VOCAB_SIZE}
ModelConfig.hidden_size = 16
ModelConfig.intermediate_size = 32
ModelConfig.num_hidden_layers = 1
ModelConfig.num_attention_heads = 2
ModelConfig.num_key_value_heads = 1
ModelConfig.head_dim = 32
ModelConfig.max_position_embeddings = 256
ModelConfig.rms_norm_eps = 1e-5
ModelConfig.rope_theta = 10000.0
ModelConfig.tie_word_embeddings = True
ModelConfig.bos_token_id = 1
ModelConfig.eos_token_ids = (2,)
ModelConfig.dtype = 'float32'
ServerConfig.port = 0
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = directory / "random.gin"
    config.write_text(CONFIG + f"EngineConfig.tokenizer = '{directory}'\n")
    http_port = f"--gin.ServerConfig.http_port={free_port()}"
    process = Process([sys.executable, "-m", "jaxserve.server", "--config", str(config), http_port])
    yield process
    process.close()


def check_metrics(url: str, client: Client) -> None:
    """What the engine and the front end count, after one request of 40 tokens and one that was refused."""
    values = samples(httpx.get(f"{url}/metrics").text)
    prompt = len(client.tokenize("copy: abc\n"))
    expected = {
        "engine_ready": 1,
        "prompt_tokens_total": prompt,
        "generation_tokens_total": 40,
        "request_success_total{'finished_reason': 'length'}": 1,
        "admission_rejections_total{'reason': 'invalid'}": 1,
        "num_requests_running": 0,
        "kv_cache_usage_perc": 0,
        "kv_cache_pages{'state': 'free'}": 32 - (prompt + 39) // 16,
        "kv_cache_pages{'state': 'cached'}": (prompt + 39) // 16,  # the full ones
        "time_to_first_token_seconds_count": 1,
        "request_queue_time_seconds_count": 1,
        "request_prefill_time_seconds_count": 1,
        "inter_token_latency_seconds_count": 39,
        "iteration_tokens_sum": prompt + 39,  # the last token is never computed on
        "batch_composition_sum{'kind': 'prefill'}": prompt,
        "batch_composition_sum{'kind': 'decode'}": 39,
        "bucket_padding_tokens_total": 16 * values["num_steps_total"] - prompt - 39,
        "step_time_seconds_count": values["num_steps_total"],
        "step_gap_seconds_count": values["num_steps_total"],
        "step_host_overhead_seconds_count": values["num_steps_total"],
    }
    assert {name: values[name] for name in expected} == expected
    parts = ("queue_time", "prefill_time", "decode_time")
    seconds = sum(values[f"request_{part}_seconds_sum"] for part in parts)
    assert 0 < values["step_host_overhead_seconds_sum"] < values["step_time_seconds_sum"]
    assert 0 < values["device_busy_seconds_total"] <= seconds <= values["e2e_request_latency_seconds_sum"]
    assert values["inter_token_latency_seconds_sum"] == pytest.approx(values["request_decode_time_seconds_sum"])


def check_captures(url: str, client: Client) -> None:
    """A timeline of a request, and a profile."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answer = threads.submit(httpx.post, f"{url}/debug/timeline?seconds=0.3", timeout=60)
        while not answer.done():
            client.generate_text("copy: abc\n", SamplingParams(max_tokens=40, ignore_eos=True), request_id="shown")
    trace = answer.result().json()
    check_trace(trace)
    assert any(event["name"] == "request shown" for event in trace["traceEvents"])
    assert trace["otherData"]["steps"] > 0
    assert "copy" not in answer.result().text
    profile = httpx.post(f"{url}/debug/profile?seconds=0.1", timeout=120)
    with zipfile.ZipFile(io.BytesIO(profile.content)) as archive:
        assert any(name.endswith(".xplane.pb") for name in archive.namelist())
    assert httpx.post(f"{url}/debug/profile?seconds=1000").status_code in (400, 422)


def test_a_whole_life(process):
    """One start, because compiling is what takes the time: answers, faults, cancels, then a drain under load."""
    address, http_address = process.until(r"ready on (\S+) and (\S+) in").groups()
    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with Client(address) as client:
        alone = client.generate_text("copy: abc\n", long)
        assert (alone.finish_reason, alone.usage.output_tokens) == (FinishReason.LENGTH, 40)
        assert alone.text == client.detokenize(alone.token_ids)
        with pytest.raises(grpc.RpcError, match="max_model_len 256"):
            client.generate_text("a" * 300, long)
        check_metrics(f"http://{http_address}", client)
        check_captures(f"http://{http_address}", client)

    async def together() -> None:
        async with AsyncClient(address) as client:
            compiled = (await client.server_info()).stats.num_compilations
            answers = await asyncio.gather(*(client.generate_text("copy: abc\n", long) for _ in range(24)))
            assert {answer.token_ids for answer in answers} == {alone.token_ids}
            tasks = [asyncio.ensure_future(client.generate_text(f"{number}\n", long)) for number in range(40)]
            for task in tasks[::3]:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await client.generate_text("copy: abc\n", long)).token_ids == alone.token_ids
            stats = (await client.server_info()).stats
            assert stats.compile_misses == 0
            assert stats.num_compilations == compiled > 0
            left = [asyncio.ensure_future(client.generate_text("copy: abc\n", long)) for _ in range(8)]
            begun = client.generate("copy: abc\n", long)
            first = await anext(begun)
            process.popen.send_signal(signal.SIGTERM)
            assert join([first, *[chunk async for chunk in begun]]).token_ids == alone.token_ids
            outcomes = await asyncio.gather(*left, return_exceptions=True)
            for outcome in outcomes:  # accepted before the signal: whole; after it: refused
                if isinstance(outcome, grpc.aio.AioRpcError):
                    assert outcome.code() is grpc.StatusCode.UNAVAILABLE
                else:
                    assert outcome.token_ids == alone.token_ids

    asyncio.run(together())
    code, lines = process.end()
    assert code == 0, lines
    assert not any("Traceback" in line for line in lines)
