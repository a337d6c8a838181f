"""EngineReady messages of engines that tests make up."""

from __future__ import annotations

from typing import Any

import msgspec

from jaxserve.engine.messages import EngineReady
from jaxserve.request_checks import ModelLimits
from jaxserve.runner.protocol import RunnerInfo


def engine_ready(
    *,
    usable_pages: int,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    max_num_seqs: int,
    max_num_waiting: int,
    architecture: str = "fake",
    compile_seconds: float = 0.0,
    start_seconds: float = 0.0,
    embedding_size: int = 0,
    **info: Any,
) -> EngineReady:
    """What an engine would say that has these figures and no model. info: other fields of RunnerInfo."""
    info = {"num_parameters": 0, "num_executables": 0, **info}
    runner = RunnerInfo(
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        page_size=16,
        num_pages=usable_pages + 1,
        architecture=architecture,
        dtype="float32",
        platform="cpu",
        attention="none",
        compile_seconds=compile_seconds,
        kv_cache="none",
        hidden_size=embedding_size,
        **info,
    )
    limits = ModelLimits(
        vocab_size, max_model_len, 16 * usable_pages, max_model_len, eos_token_ids, embedding_size=embedding_size
    )
    return EngineReady(runner, limits, max_num_seqs, max_num_waiting, start_seconds)


def changed(ready: EngineReady, **figures: Any) -> EngineReady:
    """The message with other figures, wherever it has them."""
    info, limits = msgspec.structs.asdict(ready)["info"], ready.limits
    usable = figures.pop("usable_pages", info.usable_pages)
    figures = {"num_pages": usable + 1, "pool_tokens": info.page_size * usable, **figures}
    if "max_model_len" in figures:
        figures.setdefault("max_prompt_len", figures["max_model_len"])
    found: dict[str, Any] = {}
    for name, part in (("info", info), ("limits", limits)):
        own = {key: value for key, value in figures.items() if key in part.__dataclass_fields__}
        found[name] = type(part)(**{**vars(part), **own})
    rest = {key: value for key, value in figures.items() if key in ready.__struct_fields__}
    assert figures.keys() <= {*vars(info), *vars(limits), *rest}
    return msgspec.structs.replace(ready, **found, **rest)
