"""Answers requests for embeddings, in OpenAI's shape, and for scores, in vLLM's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec

from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.openai_embeddings import (
    EmbeddingBody,
    embedding_json,
    embedding_usage,
    embeddings_head,
    parse_embeddings,
    parse_score,
    score_response,
)
from jaxserve.pooling_params import pair_scores
from jaxserve.serving.embedding_calls import Embedded, EmbeddingCall, embed_all
from jaxserve.serving.http_port.body_route import BodyRoute
from jaxserve.serving.http_port.exchange import Exchange
from jaxserve.serving.served_model import ServedModel


class Embeddings(BodyRoute):
    """Answers requests for embeddings, or for scores; an ASGI application.

    Args:
        scores: which of the two.
        served: the model.
        config: of the port.
        max_body_bytes: of a request.
    """

    def __init__(self, scores: bool, served: ServedModel, config: HttpConfig, max_body_bytes: int):
        self._scores = scores
        super().__init__(served, max_body_bytes)
        self._config = config

    async def _serve(self, exchange: Exchange) -> None:
        served, created = self._served, int(time.time())
        request_id = exchange.request_id()
        frontend = served.accepting()
        body = await exchange.read_json(frontend, self._parse)
        request_id, options, trace = self._opened(exchange, request_id, body, "for embeddings")
        call = EmbeddingCall(body.inputs, body.params, options, request_id, exchange.caller.name, trace)
        with exchange.canceled_when_gone():
            found = await embed_all(frontend, call)
            usage = embedding_usage(
                sum(one.prompt_tokens for one in found),
                sum(one.truncated_tokens for one in found),
                sum(one.cached_tokens for one in found),
            )
            if body.num_first is not None:
                scores = pair_scores([one.embedding for one in found], body.num_first)
                await exchange.answer_json(score_response(request_id, served.name, created, scores, usage))
            else:
                head = embeddings_head(request_id, served.name, created)
                await exchange.answer_parts(_parts(head, body.encoding_format, found, usage))

    def _parse(self, body: dict[str, object]) -> EmbeddingBody:
        with self._served.rejections():
            return (parse_score if self._scores else parse_embeddings)(
                body, allow_unknown=self._config.allow_unknown_fields, max_inputs=self._config.max_embedding_inputs
            )


def _parts(
    head: dict[str, object], encoding_format: str, found: Sequence[Embedded], usage: dict[str, object]
) -> Iterator[bytes]:
    """Yields the parts of a response, an embedding each: encoded together they would hold up other requests."""
    yield msgspec.json.encode(head)[:-1] + b',"data":['
    for index, one in enumerate(found):
        yield (b"," if index else b"") + embedding_json(index, one.embedding, encoding_format)
    yield b'],"usage":' + msgspec.json.encode(usage) + b"}"
