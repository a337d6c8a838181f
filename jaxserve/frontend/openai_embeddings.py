"""Parses bodies of requests for embeddings (OpenAI's) and scores (vLLM's), and builds their responses."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.openai_checks import check_neutral, check_text, hint
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import OPTION_NAMES, RequestOptions

EMBEDDINGS_URL = "/v1/embeddings"
SCORE_URLS = ("/v1/score", "/score")

MAX_INPUTS = 2048
"""Maximum number of inputs of one request, which is OpenAI's."""

ENCODING_FORMATS = ("float", "base64")

EMBEDDING_FIELDS = ("input", "encoding_format")
SCORE_FIELDS = ("text_1", "text_2", "queries", "documents")
COMMON_FIELDS = (
    "model",
    "user",
    "request_id",
    "pooling_type",
    "normalize",
    "use_activation",
    "dimensions",
    "truncate_prompt_tokens",
    *OPTION_NAMES,
)
NEUTRAL_FIELDS: Mapping[str, Sequence[Any]] = {
    "add_special_tokens": (True,),
    "truncation_side": ("left",),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "mm_processor_kwargs": ({},),
}
"""Unsupported fields of vLLM with the values that have no effect; null never has."""

Input = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class EmbeddingBody:
    """Holds a parsed request for embeddings, or for scores.

    Attributes:
        inputs: what is embedded, each a text or token ids; of scores the first texts, then the second.
        num_first: of scores, how many of the inputs are first texts; else None.
        params: of all inputs.
        encoding_format: one of ENCODING_FORMATS.
        model, options, request_id, unknown: as in `openai.BodyRequest`.
    """

    inputs: Sequence[Input]
    num_first: int | None
    params: PoolingParams
    encoding_format: str
    model: str | None
    options: RequestOptions
    request_id: str | None
    unknown: Sequence[str]


def parse_embeddings(
    body: Mapping[str, Any], *, allow_unknown: bool = False, lower_first: bool = True, max_inputs: int = MAX_INPUTS
) -> EmbeddingBody:
    """Parses the body of a request for embeddings. A field that is null counts as absent.

    Args:
        body: the JSON object.
        allow_unknown: passes over unknown fields, and names them in the result.
        lower_first: a lower `priority` is more urgent, as in vLLM; else a higher one is.
        max_inputs: maximum number of inputs.

    Raises:
        ValueError: names the field.
    """
    fields, unknown = _known(body, EMBEDDING_FIELDS, allow_unknown)
    if "input" not in fields:
        raise ValueError("body has no input")
    inputs = parse_inputs("input", fields["input"], max_inputs)
    encoding_format = fields.get("encoding_format", "float")
    if encoding_format not in ENCODING_FORMATS:
        raise ValueError(
            f"encoding_format is {shown(encoding_format)}; it must be one of {', '.join(ENCODING_FORMATS)}"
        )
    return _body(fields, inputs, None, encoding_format, unknown, lower_first)


def parse_score(
    body: Mapping[str, Any], *, allow_unknown: bool = False, lower_first: bool = True, max_inputs: int = MAX_INPUTS
) -> EmbeddingBody:
    """Parses the body of a request for scores; arguments and errors are those of `parse_embeddings`."""
    fields, unknown = _known(body, SCORE_FIELDS, allow_unknown)
    pairs = [("text_1", "text_2"), ("queries", "documents")]
    given = [pair for pair in pairs if any(name in fields for name in pair)]
    if len(given) != 1 or not all(name in fields for name in given[0]):
        raise ValueError("body must have text_1 and text_2, or queries and documents")
    (names,) = given
    first, second = (parse_inputs(name, fields[name], max_inputs) for name in names)
    check_pairs(names, len(first), len(second), max_inputs)
    return _body(fields, [*first, *second], len(first), "float", unknown, lower_first)


def parse_inputs(name: str, value: Any, most: int) -> list[Input]:
    """Parses one input, a text or token ids, or a list of inputs. Raises ValueError."""
    if isinstance(value, str):
        inputs: list[Input] = [value]
    elif not isinstance(value, list):
        raise ValueError(f"{name} is of type {type(value).__name__}; it must be text, token ids or a list of these")
    elif value and all(isinstance(item, int) for item in value):
        inputs = [value]
    else:
        check_count(name, len(value), most, "inputs")
        inputs = value
    if not inputs:
        raise ValueError(f"{name} is an empty list; at least one input is needed")
    for index, item in enumerate(inputs):
        where = name if len(inputs) == 1 else f"{name}[{index}]"
        if not isinstance(item, str | list):
            raise ValueError(f"{where} is {shown(item)}; an input is a text or a list of token ids")
        if not item:
            raise ValueError(f"{where} is empty; at least one token is needed")
    return inputs


def check_pairs(names: Sequence[str], first: int, second: int, most: int) -> None:
    """Checks that so many first and second texts can be paired: one with each of several, or each with its own."""
    if first not in (1, second):
        raise ValueError(
            f"{names[0]} has {first} inputs and {names[1]} {second}; it must have one, or as many as {names[1]}"
        )
    check_count(f"{names[0]} and {names[1]}", first + second, most, "inputs")


def embedding_json(index: int, embedding: bytes, encoding_format: str) -> bytes:
    """Encodes an item of a response's data."""
    head = b'{"object":"embedding","index":%d,"embedding":' % index
    if encoding_format == "base64":
        return head + b'"' + base64.b64encode(embedding) + b'"}'
    return head + msgspec.json.encode(np.frombuffer(embedding, "<f4").tolist()) + b"}"


def embeddings_head(request_id: object, model: str, created: int) -> dict[str, Any]:
    """Returns the response object of a request for embeddings without its data and usage."""
    return {"id": f"embd-{request_id}", "object": "list", "created": created, "model": model}


def embeddings_response(
    request_id: object,
    model: str,
    created: int,
    embeddings: Sequence[bytes],
    encoding_format: str,
    usage: Mapping[str, Any],
) -> dict[str, Any]:
    """Builds the response object of a request for embeddings."""
    data = [msgspec.json.decode(embedding_json(index, one, encoding_format)) for index, one in enumerate(embeddings)]
    return {**embeddings_head(request_id, model, created), "data": data, "usage": usage}


def score_response(
    request_id: object, model: str, created: int, scores: Sequence[float], usage: Mapping[str, Any]
) -> dict[str, Any]:
    """Builds the response object of a request for scores."""
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
    head = {"id": f"score-{request_id}", "object": "list", "created": created, "model": model}
    return {**head, "data": data, "usage": usage}


def embedding_usage(prompt_tokens: int, truncated_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Builds the usage object of a request for embeddings or scores.

    truncated_tokens: cut off its inputs; where there are any, it has their number, which is an addition to OpenAI's
    fields. cached_tokens: of its inputs, found in the prefix cache; likewise, as in a completion's usage.
    """
    counts = {"cached_tokens": cached_tokens, "truncated_tokens": truncated_tokens}
    details = {name: count for name, count in counts.items() if count}
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens,
        **({"prompt_tokens_details": details} if details else {}),
    }


def _known(body: Mapping[str, Any], own: Sequence[str], allow_unknown: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields that are not null, and the names of unknown ones. Raises ValueError."""
    fields = {name: value for name, value in body.items() if value is not None}
    known, unknown = {*own, *COMMON_FIELDS}, []
    for name, value in fields.items():
        if name in NEUTRAL_FIELDS:
            check_neutral(name, value, NEUTRAL_FIELDS[name])
        elif name not in known:
            if not allow_unknown:
                raise ValueError(f"body has the unknown field {shown(name)}; {hint(name, known | set(NEUTRAL_FIELDS))}")
            unknown.append(name)
    for name in ("model", "user", "request_id"):
        check_text(name, fields.get(name, ""))
    return fields, unknown


def _body(
    fields: Mapping[str, Any],
    inputs: Sequence[Input],
    num_first: int | None,
    encoding_format: str,
    unknown: Sequence[str],
    lower_first: bool,
) -> EmbeddingBody:
    options = RequestOptions(**{name: fields[name] for name in OPTION_NAMES if name in fields})
    names = ("pooling_type", "normalize", "dimensions", "truncate_prompt_tokens")
    params = {name: fields[name] for name in names if name in fields}
    if "use_activation" in fields:
        if "normalize" in params:
            raise ValueError("normalize and use_activation are the same; give one of them")
        params["normalize"] = fields["use_activation"]
    return EmbeddingBody(
        inputs=inputs,
        num_first=num_first,
        params=PoolingParams(**params),
        encoding_format=encoding_format,
        model=fields.get("model"),
        options=dataclasses.replace(options, priority=-options.priority) if lower_first else options,
        request_id=fields.get("request_id"),
        unknown=unknown,
    )
