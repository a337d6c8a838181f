"""Converts requests for embeddings and scores between the wire and jaxserve's types, for server and client alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from jaxserve.config.pooler_config import POOLING_TYPES
from jaxserve.config.sampling_fields import check_count
from jaxserve.frontend.openai_embeddings import MAX_INPUTS, check_pairs
from jaxserve.pooling_params import PoolingParams
from jaxserve.serving.grpc_port.convert import refuse_unknown_bytes, refuse_unknown_fields
from jaxserve.serving.grpc_port.oversized import count_fields, fields
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

Input = str | Sequence[int]

_SERVICE = pb.DESCRIPTOR.services_by_name["JaxServe"].full_name

_NUMBERS = {name: getattr(pb, f"POOLING_TYPE_{name}") for name in POOLING_TYPES}
_NAMES = {number: name for name, number in _NUMBERS.items()}


def pooling_from_proto(proto: pb.PoolingParams) -> PoolingParams:
    """Returns the pooling parameters of a request. Raises ValueError naming the field."""
    refuse_unknown_fields(proto)
    if proto.pooling_type not in (pb.POOLING_TYPE_UNSPECIFIED, *_NAMES):
        raise ValueError(f"pooling_type is {proto.pooling_type}; it must be one of {', '.join(POOLING_TYPES)}")
    return PoolingParams(
        pooling_type=_NAMES.get(proto.pooling_type),
        normalize=proto.normalize if proto.HasField("normalize") else None,
        dimensions=proto.dimensions if proto.HasField("dimensions") else None,
        truncate_prompt_tokens=(proto.truncate_prompt_tokens if proto.HasField("truncate_prompt_tokens") else None),
    )


def pooling_to_proto(params: PoolingParams) -> pb.PoolingParams:
    """Returns the message that `pooling_from_proto` reads back unchanged."""
    kind = pb.POOLING_TYPE_UNSPECIFIED if params.pooling_type is None else _NUMBERS[params.pooling_type]
    names = ("normalize", "dimensions", "truncate_prompt_tokens")
    given = {name: value for name in names if (value := getattr(params, name)) is not None}
    return pb.PoolingParams(pooling_type=kind, **given)


def inputs_from_proto(name: str, proto: pb.EmbedInputs) -> list[Input]:
    """Returns the inputs of a request as texts or token ids. Raises ValueError naming the input."""
    refuse_unknown_fields(proto)
    check_count(name, len(proto.inputs), MAX_INPUTS, "inputs")
    if not proto.inputs:
        raise ValueError(f"{name} is empty; at least one input is needed")
    return [_input(f"{name}[{index}]", one) for index, one in enumerate(proto.inputs)]


def pairs_from_proto(request: pb.ScoreRequest) -> tuple[list[Input], int]:
    """Returns all inputs of a request for scores, and how many of them are queries. Raises ValueError."""
    queries = inputs_from_proto("queries", request.queries)
    documents = inputs_from_proto("documents", request.documents)
    check_pairs(("queries", "documents"), len(queries), len(documents), MAX_INPUTS)
    return [*queries, *documents], len(queries)


def inputs_to_proto(inputs: Sequence[Input]) -> pb.EmbedInputs:
    """Returns the message that `inputs_from_proto` reads back."""
    return pb.EmbedInputs(
        inputs=[
            pb.EmbedInput(text=one) if isinstance(one, str) else pb.EmbedInput(token_ids=pb.TokenIds(ids=one))
            for one in inputs
        ]
    )


def embedding_to_proto(embedding: bytes) -> pb.Embedding:
    """Returns the message of an embedding: float32 numbers as bytes."""
    return pb.Embedding(values=np.frombuffer(embedding, "<f4").tolist())


def oversized_checks() -> dict[str, Callable[[bytes], None]]:
    """Returns the check of a large unparsed request for each method, as `OversizedInterceptor` takes them."""
    found: dict[str, Callable[[bytes], None]] = {}
    for method, request, names in (
        ("Embed", pb.EmbedRequest, ("inputs",)),
        ("Score", pb.ScoreRequest, ("queries", "documents")),
    ):
        numbers = tuple(request.DESCRIPTOR.fields_by_name[name].number for name in names)
        found[f"/{_SERVICE}/{method}"] = _check_of(numbers)
    return found


def _check_of(numbers: tuple[int, ...]) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        """Raises DecodeError where the fields of these numbers have more inputs than a request may."""
        count = 0
        for number, start, end in fields(data):
            if number in numbers:
                count += count_fields(data[start:end], MAX_INPUTS + 1 - count)
        if count > MAX_INPUTS:
            raise DecodeError(f"it has more than {MAX_INPUTS} inputs; divide the request")

    return check


def _input(where: str, proto: pb.EmbedInput) -> Input:
    refuse_unknown_fields(proto)
    match proto.WhichOneof("input"):
        case "text":
            value: Input = proto.text
        case "token_ids":
            refuse_unknown_bytes(proto.token_ids)
            value = proto.token_ids.ids
        case _:
            raise ValueError(f"{where} is not set; give text or token_ids")
    if not value:
        raise ValueError(f"{where} is empty; at least one token is needed")
    return value
