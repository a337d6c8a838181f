"""Answers warm-ups of the prefix cache."""

from __future__ import annotations

import time

from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.openai import BodyRequest
from jaxserve.frontend.openai_warm_up import parse_warm_up, warm_up_response
from jaxserve.serving.http_port.body_route import BodyRoute
from jaxserve.serving.http_port.exchange import Exchange
from jaxserve.serving.served_model import ServedModel
from jaxserve.serving.warming import warm_up


class WarmUps(BodyRoute):
    """Answers requests to warm the prefix cache; an ASGI application.

    Args:
        served: the model.
        config: of the port.
        max_body_bytes: of a request.
    """

    def __init__(self, served: ServedModel, config: HttpConfig, max_body_bytes: int):
        super().__init__(served, max_body_bytes)
        self._config = config

    async def _serve(self, exchange: Exchange) -> None:
        served, created = self._served, int(time.time())
        request_id = exchange.request_id()
        frontend = served.accepting()
        body = await exchange.read_json(frontend, self._parse)
        request_id, options, trace = self._opened(exchange, request_id, body, "to warm the prefix cache")
        with exchange.canceled_when_gone():
            prompts = body.prompts if body.chat is None else [await frontend.render_chat(body.chat)]
            warmed = await warm_up(frontend, prompts, options, request_id, exchange.caller.name, trace)
            await exchange.answer_json(warm_up_response(served.name, created, warmed))

    def _parse(self, body: dict[str, object]) -> BodyRequest:
        with self._served.rejections():
            return parse_warm_up(
                body, allow_unknown=self._config.allow_unknown_fields, max_prompts=self._config.max_prompts
            )
