"""The real server over a real engine in its own process, with a model of random weights: only texts are meaningless."""

import asyncio
import signal
import sys

import grpc
import pytest

from jaxserve.request import FinishReason, SamplingParams
from jaxserve.serving.grpc_client import AsyncClient, Client, join
from tests.server.fakes import VOCAB_SIZE, save_tokenizer
from tests.server.process import Process

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
ModelConfig.head_dim = 8
ModelConfig.max_position_embeddings = 256
ModelConfig.rms_norm_eps = 1e-5
ModelConfig.rope_theta = 10000.0
ModelConfig.tie_word_embeddings = True
ModelConfig.bos_token_id = 1
ModelConfig.eos_token_ids = (2,)
ModelConfig.dtype = 'float32'
ServerConfig.port = 0
ServerConfig.http_port = 0
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = directory / "random.gin"
    config.write_text(CONFIG + f"EngineConfig.tokenizer = '{directory}'\n")
    process = Process([sys.executable, "-m", "jaxserve.server", "--config", str(config)])
    yield process
    process.close()


def test_a_whole_life(process):
    """One start, because compiling is what takes the time: answers, faults, cancels, then a drain under load."""
    address = process.until(r"ready on (\S+) in").group(1)
    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with Client(address) as client:
        alone = client.generate_text("copy: abc\n", long)
        assert (alone.finish_reason, alone.usage.output_tokens) == (FinishReason.LENGTH, 40)
        assert alone.text == client.detokenize(alone.token_ids)
        with pytest.raises(grpc.RpcError, match="max_model_len 256"):
            client.generate_text("a" * 300, long)

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
