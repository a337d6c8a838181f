"""Configures the HTTP port, as a frozen dataclass that validates itself. Standard library only."""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import at_least


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """Configures what the HTTP port accepts. What clients may hold open is bounded by `LimitsConfig`, as for gRPC, and
    the size of a body by `ServerConfig.max_message_bytes`.

    allow_unknown_fields: fields of a body that nobody knows are passed over, and named in the log and in the response's
    header x-jaxserve-warning; else such a request is refused.
    max_header_bytes: request line and headers of one request.
    max_prompts: prompts of one request; each counts as a request of its own everywhere else.
    max_embedding_inputs: inputs of one request for embeddings or scores; no more of them run at once than max_num_seqs.
    """

    allow_unknown_fields: bool = False
    max_header_bytes: int = 64 * 1024
    max_prompts: int = 1024
    max_embedding_inputs: int = 2048

    def __post_init__(self) -> None:
        if not isinstance(self.allow_unknown_fields, bool):
            raise ValueError(f"allow_unknown_fields is {self.allow_unknown_fields!r}; it must be True or False")
        at_least("max_header_bytes", self.max_header_bytes, 1024)
        at_least("max_prompts", self.max_prompts, 1)
        at_least("max_embedding_inputs", self.max_embedding_inputs, 1)
