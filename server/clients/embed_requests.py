"""Builds the messages and bodies of Embed and Score calls, for the clients of both ports, and reads the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxserve.pooling_params import PoolingParams
from jaxserve.serving.grpc_port.embed_convert import Input, inputs_to_proto, pooling_to_proto
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

Inputs = str | Sequence[Input]
"""One text, or texts and lists of token ids."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Holds the embedding of each input, in order, and the tokens of all inputs."""

    embeddings: list[list[float]]
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """Holds the cosine of each pair, in order, and the tokens of all texts."""

    scores: list[float]
    prompt_tokens: int


def listed(inputs: Inputs) -> list[Input]:
    """Returns the inputs as a list."""
    return [inputs] if isinstance(inputs, str) else list(inputs)


def embed_request(inputs: Inputs, params: PoolingParams | None, **fields: Any) -> pb.EmbedRequest:
    """Builds the message of an Embed call; fields: see `grpc_client.generate_request`."""
    pooling = None if params is None else pooling_to_proto(params)
    return pb.EmbedRequest(inputs=inputs_to_proto(listed(inputs)), pooling_params=pooling, **fields)


def score_request(queries: Inputs, documents: Inputs, params: PoolingParams | None, **fields: Any) -> pb.ScoreRequest:
    """Builds the message of a Score call; fields: see `grpc_client.generate_request`."""
    return pb.ScoreRequest(
        queries=inputs_to_proto(listed(queries)),
        documents=inputs_to_proto(listed(documents)),
        pooling_params=None if params is None else pooling_to_proto(params),
        **fields,
    )


def embeddings_of(response: pb.EmbedResponse) -> Embeddings:
    """Reads the answer to an Embed call."""
    return Embeddings([list(one.values) for one in response.embeddings], response.usage.prompt_tokens)


def scores_of(response: pb.ScoreResponse) -> Scores:
    """Reads the answer to a Score call."""
    return Scores(list(response.scores), response.usage.prompt_tokens)


def pooling_fields(params: PoolingParams | None) -> dict[str, Any]:
    """Returns the fields of an HTTP body for pooling parameters: those that are given."""
    values = {} if params is None else dataclasses.asdict(params)
    return {name: value for name, value in values.items() if value is not None}
