"""An engine says how often its steps read pages once that rows share."""

from __future__ import annotations

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest
from tests.kernels.packing import needs_avx512_bf16

PROMPT = tuple(range(3, 103)) * 4
PAGE = 16


@needs_avx512_bf16
def test_rows_of_one_prompt_are_counted_in_every_step_that_decodes_them():
    """Of four heads each: eight rows of one prompt go together on few threads, and else are counted as apart."""
    config = EngineConfig(
        architecture=ModelConfig("LlamaForCausalLM", 128, 64, 64, 1, 4, 4, 32, 512),
        load_format="dummy",
        dtype="bfloat16",
        attention="cpu",
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=128),
        cache=CacheConfig(num_pages=257, page_size=PAGE),
        token_buckets=(128,),
        row_buckets=(8,),
    )
    engine = InlineEngine(config)

    def serve(names: list[str], prompt: tuple[int, ...], tokens: int) -> dict[str, int]:
        before = engine.core.stats().shared_reads
        for name in names:
            engine.send(AddRequest(EngineRequest(name, prompt, max_tokens=tokens)))
        while engine.core.busy:
            engine.receive()
        after = engine.core.stats().shared_reads
        return {name: count - before[name] for name, count in after.items()}

    assert not any(serve(["alone"], PROMPT, 4).values())
    found = serve([f"row {number}" for number in range(8)], PROMPT, 5)
    rows, read = (found["rows_together"] + found["rows_apart"], found["tokens_together"] + found["tokens_apart"])
    assert rows >= 8 * 4  # each but the first token of every row is computed by a step of rows of one token
    assert read >= 4 * 128
    assert (found["steps"] > 0) == (found["rows_together"] > 0)
    engine.close()
