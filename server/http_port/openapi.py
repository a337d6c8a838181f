"""Describes the HTTP port as an OpenAPI document; the sampling parameters follow from their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config.beam_fields import FlagOrWord
from jaxserve.config.http_config import HttpConfig
from jaxserve.config.parallel_samples import MAX_SAMPLES
from jaxserve.config.plain_params import Form, PlainField, plain_fields
from jaxserve.config.pooler_config import POOLING_TYPES
from jaxserve.config.sampling_fields import MAX_INT32, Biases, Flag, Ids, Number, Texts, Whole, word_of
from jaxserve.frontend.openai import CHAT_URL, COMPLETIONS_URL, field_names, neutral_values
from jaxserve.frontend.openai_embeddings import EMBEDDINGS_URL, ENCODING_FORMATS, NEUTRAL_FIELDS, SCORE_URLS
from jaxserve.frontend.openai_warm_up import WARM_UP_URL
from jaxserve.request import MAX_ID_LENGTH
from jaxserve.serving.access.callers import Anybody
from jaxserve.serving.access.request_headers import PRIORITY, TENANT, TIMEOUT
from jaxserve.serving.http_port.exchange import REQUEST_ID
from jaxserve.serving.http_port.guard import FLUSH_URL
from jaxserve.serving.http_port.openapi_chat import chat_fields, closed, reply_fields
from jaxserve.serving.http_port.routes.tokens import MAX_DETOKENIZED
from jaxserve.serving.served_model import ServedModel
from jaxserve.structured_outputs import MAX_CHOICES

Schema = dict[str, Any]

_ERRORS: Mapping[int, str] = {
    400: "The request is invalid; param names the field",
    401: "The key is missing or wrong",
    403: "The caller may not do this",
    404: "The model or path is unknown",
    408: "The request has not arrived in time, or its deadline has passed",
    409: "The request id belongs to an unfinished request",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "The queue is full; Retry-After says when to try again",
    500: "The request failed",
    501: "The server has no tokenizer",
    503: "The server is starting or draining, or its engine has failed",
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_PARAMS: Mapping[str, PlainField] = plain_fields()
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NAME: Schema = {"type": "string", "maxLength": MAX_ID_LENGTH}
_OPTIONS: Schema = {
    "tenant": _NAME,
    "cache_salt": _NAME,
    "prefix_caching": _FLAG,
    "priority": {
        "type": "integer",
        "minimum": -MAX_INT32,
        "maximum": MAX_INT32,
        "description": "lower is more urgent, as in vLLM",
    },
    "deadline": {"type": "number", "description": "seconds since 1970"},
}


def document(found: Mapping[str, Any], served: ServedModel, config: HttpConfig) -> Schema:
    """Returns the document. found: that of the routes that describe themselves."""
    limits = _Limits(served)
    generated = {
        url: {"post": _operation(name, _body(url, limits, config), "Generation", headers=True, events=True)}
        for url, name in ((COMPLETIONS_URL, "completions"), (CHAT_URL, "chat_completions"))
    }
    known = {
        **generated,
        **{url: {"post": post} for url, post in _embedding_operations(limits, config).items()},
        WARM_UP_URL: {"post": _operation("warm_up", _warm_up(limits, config), "WarmUp", headers=True)},
        FLUSH_URL: {"post": _operation("reset_prefix_cache", None, "Flush")},
        "/tokenize": {"post": _operation("tokenize", _tokenize(limits), "Tokens")},
        "/detokenize": {"post": _operation("detokenize", _detokenize(limits), "Text")},
        "/v1/models": {"get": _operation("models", None, "Models")},
        "/v1/models/{model}": {"get": _one_model(served.name)},
        "/version": {"get": _operation("version", None, "Version")},
    }
    for path in ("/health", "/health/ready", "/health/live"):
        get = _operation(path.strip("/").replace("/", "_"), None, "Health", errors=())
        get["responses"]["503"] = {**get["responses"]["200"], "description": _ERRORS[503]}
        known[path] = {"get": get | {"security": []}}
    schemas = {**found.get("components", {}).get("schemas", {}), **_schemas()}
    components: Schema = {**found.get("components", {}), "schemas": schemas}
    whole: Schema = {**found, "paths": {**known, **found.get("paths", {})}, "components": components}
    if not isinstance(served.callers, Anybody):
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"key": []}]
    return whole


class _Limits:
    """Holds what bounds requests to this model; before it is loaded, what bounds those to any."""

    def __init__(self, served: ServedModel):
        limits = None if served.frontend is None else served.frontend.ready.limits
        self.context = MAX_INT32 if limits is None else limits.max_model_len
        self.max_logprobs = MAX_INT32 if limits is None else limits.max_logprobs
        self.samples = MAX_SAMPLES if limits is None else limits.max_n
        self.token_id: Schema = {
            "type": "integer",
            "minimum": 0,
            "maximum": MAX_INT32 if limits is None else limits.vocab_size - 1,
        }
        self.embedding_size = MAX_INT32 if limits is None else max(limits.embedding_size, 1)
        self.model: Schema = {"enum": [served.name, None], "description": "the served model"}


def _operation(
    name: str,
    body: Schema | None,
    answer: str,
    *,
    headers: bool = False,
    events: bool = False,
    errors: Sequence[int] = tuple(_ERRORS),
) -> Schema:
    content: Schema = {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}
    if events:
        content["text/event-stream"] = {}
    of_body = (408, 413, 415) if body is None else ()
    operation: Schema = {
        "operationId": name,
        "responses": {
            "200": {"description": "The answer", "content": content},
            **{
                str(status): {
                    "description": _ERRORS[status],
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
                for status in errors
                if status not in of_body
            },
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if headers:
        operation["parameters"] = [
            {"name": name, "in": "header", "required": False, "schema": schema}
            for name, schema in (
                (REQUEST_ID, _NAME),
                (TENANT, _NAME),
                (PRIORITY, _whole(-MAX_INT32, MAX_INT32)),
                (TIMEOUT, {"type": "number", "exclusiveMinimum": 0}),
            )
        ]
    return operation


def _embedding_operations(limits: _Limits, config: HttpConfig) -> dict[str, Schema]:
    """Returns the operations for embeddings and scores."""
    ids = {"type": "array", "items": limits.token_id, "minItems": 1, "maxItems": limits.context}
    text = _TEXT | {"minLength": 1}
    some = {"anyOf": [text, ids]}
    several = {"type": "array", "items": some, "minItems": 1, "maxItems": config.max_embedding_inputs}
    given: Schema = {"anyOf": [text, ids, several]}
    common: Schema = {
        "model": limits.model,
        "user": _TEXT,
        "request_id": _NAME | {"minLength": 1},
        "pooling_type": {"enum": list(POOLING_TYPES)},
        "normalize": _FLAG,
        "dimensions": _whole(1, limits.embedding_size),
        "truncate_prompt_tokens": {"anyOf": [{"const": -1}, _whole(1, limits.context)]},
        **_OPTIONS,
        **{name: {"enum": list(values)} for name, values in NEUTRAL_FIELDS.items()},
    }
    embed = _object({**common, "input": given, "encoding_format": {"enum": list(ENCODING_FORMATS)}}, required="input")
    scores: Schema = {"anyOf": []}
    for first, second in (("text_1", "text_2"), ("queries", "documents")):
        body = _object({**common, first: given, second: given}, required=first)
        body["properties"][second], body["required"] = given, [first, second]
        scores["anyOf"].append(body)
    operations = {EMBEDDINGS_URL: _operation("embeddings", embed, "Embeddings", headers=True)}
    for url in SCORE_URLS:
        operations[url] = _operation(url.strip("/").replace("/", "_"), scores, "Scores", headers=True)
    return operations


def _warm_up(limits: _Limits, config: HttpConfig) -> Schema:
    """Returns the schema of a body that warms the prefix cache."""
    ids = {"type": "array", "items": limits.token_id, "minItems": 1, "maxItems": limits.context}
    text = _TEXT | {"minLength": 1}
    some = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": config.max_prompts}
    common = {"model": limits.model, "user": _TEXT, "request_id": _NAME | {"minLength": 1}, **_OPTIONS}
    common["prefix_caching"] = {"const": True}
    return {
        "anyOf": [
            _object({**common, "prompt": {"anyOf": [text, ids, some]}}, required="prompt"),
            _object({**common, **chat_fields()}, required="messages"),
        ]
    }


def _one_model(name: str) -> Schema:
    model: Schema = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": _TEXT | {"minLength": 1},
        "example": name,
    }
    return _operation("one_model", None, "Model") | {"parameters": [model]}


def _body(url: str, limits: _Limits, config: HttpConfig) -> Schema:
    """Returns the schema of a body to one of openai.URLS."""
    fields = {name: _of_param(field, limits) | {"description": field.row.meaning} for name, field in _PARAMS.items()}
    fields["n"] |= {"maximum": limits.samples}
    logprobs = _whole(-1, limits.max_logprobs)
    fields |= {name: fields[name] | {"maximum": limits.max_logprobs} for name in ("logprobs", "prompt_logprobs")}
    if url == CHAT_URL:
        fields |= {"logprobs": dict(_FLAG), "top_logprobs": logprobs | {"description": "needs logprobs"}}
    fields |= {name: {"enum": list(values)} for name, values in neutral_values(url).items()}
    fields |= {
        "model": limits.model,
        "metadata": {"type": "object", "additionalProperties": _TEXT},
        **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), _TEXT),
        "stream": _FLAG,
        "stream_options": _object({"include_usage": _FLAG, "include_obfuscation": _FLAG}),
        "return_token_ids": _FLAG,
        "return_tokens_as_token_ids": _FLAG,
        "request_id": _NAME | {"minLength": 1},
        **_OPTIONS,
        **_structured_fields(),
    }
    if url == COMPLETIONS_URL:
        ids = {"type": "array", "items": limits.token_id, "minItems": 1, "maxItems": limits.context - 1}
        text = _TEXT | {"minLength": 1}
        some = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": config.max_prompts}
        own, fields = "prompt", {**fields, "echo": _FLAG, "prompt": {"anyOf": [text, ids, some]}}
    else:
        most = {"max_completion_tokens": fields["max_tokens"]}
        own, fields = "messages", {**fields, **chat_fields(), **reply_fields(), **most}
    names = set(field_names(url))
    body = _object({name: schema for name, schema in fields.items() if name in names}, required=own)
    return body | {"additionalProperties": True} if config.allow_unknown_fields else body


def _structured_fields() -> Schema:
    """Returns the schemas of the fields that constrain an output, of which a body has one."""
    text = _TEXT | {"minLength": 1}
    schema: Schema = {"anyOf": [{"type": "object"}, text]}
    choices = {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_CHOICES}
    named = {"type": "object", "required": ["schema"], "properties": {"name": _TEXT, "schema": {"type": "object"}}}
    formats: list[Schema] = [
        closed({"type": {"enum": ["text", "json_object"]}}, "type"),
        closed({"type": {"const": "json_schema"}, "json_schema": named}, "type", "json_schema"),
        {"required": ["type"], "properties": {"type": {"const": "structural_tag"}}},
    ]
    kinds = {"json": schema, "regex": text, "choice": choices, "grammar": text, "structural_tag": schema}
    options = {"disable_any_whitespace": _FLAG, "disable_additional_properties": _FLAG, "whitespace_pattern": text}
    return {
        "structured_outputs": _object({**kinds, "json_object": _FLAG, **options}),
        "response_format": {"type": "object", "anyOf": formats},
        "guided_json": schema,
        "guided_regex": text,
        "guided_choice": choices,
        "guided_grammar": text,
        "guided_whitespace_pattern": text,
    }


def _tokenize(limits: _Limits) -> Schema:
    both = {"model": limits.model, "add_special_tokens": _FLAG, "return_token_strs": _FLAG}
    return {
        "anyOf": [
            _object({**both, "prompt": _TEXT}, required="prompt"),
            _object({**both, **chat_fields()}, required="messages"),
        ]
    }


def _detokenize(limits: _Limits) -> Schema:
    tokens = {"type": "array", "items": limits.token_id, "maxItems": MAX_DETOKENIZED}
    return _object({"model": limits.model, "tokens": tokens}, required="tokens")


def _object(fields: Mapping[str, Schema], required: str | None = None) -> Schema:
    """Returns the schema of an object whose other fields may be null, and which has no further ones."""
    return {
        "type": "object",
        "required": [] if required is None else [required],
        "properties": {name: schema if name == required else _or_null(schema) for name, schema in fields.items()},
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return schema | {"enum": [*(one for one in schema["enum"] if one is not None), None]}
    return {"anyOf": [schema, {"type": "null"}]}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _of_param(field: PlainField, limits: _Limits) -> Schema:
    """Returns the schema of a sampling parameter; where its kind is not known here, by its form."""
    match field.row.kind:
        case Number(low, high, open_low):
            return {"type": "number", "exclusiveMinimum" if open_low else "minimum": low, "maximum": high}
        case Whole(low, high, without):
            return _whole(low, high) | ({"not": {"enum": list(without)}} if without else {})
        case Flag():
            return dict(_FLAG)
        case FlagOrWord(words):
            return {"enum": [True, False, *(word_of(member) for member in words)]}
        case Texts(max_items, max_length):
            text = {"type": "string", "minLength": 1, "maxLength": max_length}
            return {"anyOf": [text, {"type": "array", "items": text, "maxItems": max_items}]}
        case Ids(max_items, least_items):
            return {"type": "array", "items": limits.token_id, "minItems": least_items, "maxItems": max_items}
        case Biases(max_items, low, high):
            number = {"type": "number", "minimum": low, "maximum": high}
            keys = {"type": "string", "pattern": "^[0-9]{1,10}$"}
            return {"type": "object", "propertyNames": keys, "additionalProperties": number, "maxProperties": max_items}
    match field.form:
        case Form.WORD:
            return {"enum": [word_of(member) for member in field.type]}
        case Form.LIST:
            return {"type": "array"}
        case Form.MAPPING:
            return {"type": "object", "additionalProperties": {"type": "number"}}
        case Form.OBJECT:
            return {"type": "object"}
        case _:
            return {}


def _results(item: Mapping[str, Schema]) -> Schema:
    """Returns the schema of a response that lists such items, one for each input."""
    data = {"type": "object", "required": list(item), "properties": dict(item)}
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), _COUNT)
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "data", "usage"],
        "properties": {
            "id": _TEXT,
            "object": {"const": "list"},
            "created": _COUNT,
            "model": _TEXT,
            "data": {"type": "array", "minItems": 1, "items": data},
            "usage": {"type": "object", "required": list(usage), "properties": usage},
        },
    }


def _schemas() -> Schema:
    usage = {
        "type": "object",
        "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
        "properties": dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
    }
    model = {
        "type": "object",
        "required": ["id", "object", "created", "owned_by"],
        "properties": {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT},
    }
    return {
        "Error": _ERROR,
        "Generation": {
            "type": "object",
            "required": ["id", "object", "created", "model", "choices", "usage"],
            "properties": {
                "id": _TEXT,
                "object": {"enum": ["text_completion", "chat.completion"]},
                "created": _COUNT,
                "model": _TEXT,
                "choices": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["index", "finish_reason"],
                        "properties": {
                            "index": _COUNT,
                            "finish_reason": {"enum": ["stop", "length", "tool_calls", "abort"]},
                        },
                    },
                },
                "usage": usage,
            },
        },
        "Embeddings": _results(
            {"object": {"const": "embedding"}, "index": _COUNT, "embedding": {"type": ["array", "string"]}}
        ),
        "Scores": _results({"object": {"const": "score"}, "index": _COUNT, "score": {"type": "number"}}),
        "WarmUp": {
            "type": "object",
            "required": ["id", "object", "created", "model", "prompt_tokens", "cached_tokens", "computed_tokens"],
            "properties": {
                **dict.fromkeys(("created", "prompt_tokens", "cached_tokens", "computed_tokens"), _COUNT),
                **dict.fromkeys(("id", "model"), _TEXT),
                "object": {"const": "cache.warm_up"},
            },
        },
        "Flush": {"type": "object", "required": ["freed_pages"], "properties": {"freed_pages": _COUNT}},
        "Model": model,
        "Models": {
            "type": "object",
            "required": ["object", "data"],
            "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": model}},
        },
        "Tokens": {
            "type": "object",
            "required": ["count", "max_model_len", "tokens"],
            "properties": {
                "count": _COUNT,
                "max_model_len": _COUNT,
                "tokens": {"type": "array", "items": _COUNT},
                "token_strs": {"type": ["array", "null"], "items": _TEXT},
            },
        },
        "Text": {"type": "object", "required": ["prompt"], "properties": {"prompt": _TEXT}},
        "Version": {"type": "object", "required": ["version"], "properties": {"version": _TEXT}},
        "Health": {
            "type": "object",
            "required": ["status"],
            "properties": {"status": {"enum": ["ready", "starting", "draining", "failed"]}},
        },
    }
