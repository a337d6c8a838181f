"""Continuous batching of Hugging Face transformers as a side of a comparison: `python transformers_side.py OPTIONS`.

OPTIONS is JSON: model, dtype, max_model_len, max_num_seqs. Runs in the peer's own environment, so it imports nothing of
this repository. The protocol: benchmarks/sides/__init__.py.
"""

import importlib.metadata
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE_SIZE = 256
"""Its own default. Pages for every request at its longest, so that nothing waits for memory."""


def main() -> None:
    """Serves lines until standard input ends."""
    options = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=getattr(torch, options["dtype"]), attn_implementation="sdpa"
    )
    batching = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=options["max_num_seqs"] * -(-options["max_model_len"] // PAGE_SIZE),
        max_batch_tokens=512,
        max_requests_per_batch=options["max_num_seqs"],
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    packages = ("transformers", "accelerate", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=batching) as manager:
        say({"side": "ready", "versions": versions, "threads": torch.get_num_threads()})
        for number, line in enumerate(sys.stdin):
            seconds, made = run(manager, json.loads(line), f"run{number}", model.config.eos_token_id)
            say({"side": "done", "seconds": seconds, "output_tokens": made})


def run(manager, work: dict, label: str, eos_token_id: int) -> tuple[float, int]:
    """Seconds for the whole work, and the tokens that came of it."""
    start = time.perf_counter()
    for number, (prompt, count) in enumerate(zip(work["prompts"], work["new_tokens"], strict=True)):
        manager.add_request(
            prompt,
            request_id=f"{label}-{number}",
            max_new_tokens=count,
            eos_token_id=-1 if work["ignore_eos"] else eos_token_id,
        )
    made = finished = 0
    while finished < len(work["prompts"]):
        result = manager.get_result(timeout=1.0)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the generation thread has ended")
            continue
        if result.error is not None:
            raise RuntimeError(result.error)
        if result.is_finished():
            finished += 1
            made += len(result.generated_tokens)
    return time.perf_counter() - start, made


def say(message: dict) -> None:
    """One line on standard output, at once."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
