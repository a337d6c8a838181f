"""Keeps the lines of a batch that are under way, and builds the response objects of finished ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from jaxserve.frontend.batch_lines import KeyedLine
from jaxserve.frontend.chat_format import ReplyPlan
from jaxserve.frontend.offline import FinishedRequest
from jaxserve.frontend.openai import CHAT_URL
from jaxserve.frontend.openai_embeddings import EmbeddingBody, embedding_usage, embeddings_response
from jaxserve.frontend.openai_logprobs import LogprobShapes
from jaxserve.frontend.openai_replies import ReplyMessage
from jaxserve.frontend.openai_responses import Answer, response_body
from jaxserve.frontend.tokenizer import Tokenizer


@dataclasses.dataclass
class OpenLine:
    """Holds a line under way: its requests' ids, one for each input, and what has finished of them.

    embeddings: its body, where it asks for some. plan: how the replies of a chat are parsed, where they are.
    """

    keyed: KeyedLine
    request_ids: Sequence[str]
    embeddings: EmbeddingBody | None = None
    plan: ReplyPlan | None = None
    finished: dict[str, FinishedRequest] = dataclasses.field(default_factory=dict)

    @property
    def completions(self) -> list[FinishedRequest]:
        """Finished requests, all of them, in the order of the inputs."""
        return [self.finished[name] for name in self.request_ids]

    def body(self, model: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Returns the response object of the line, whose requests have all succeeded. model: the name in it."""
        keyed, completions, created = self.keyed, self.completions, int(time.time())
        assert keyed.line is not None
        if self.embeddings is not None:
            return embeddings_response(
                keyed.number,
                model,
                created,
                [one.embedding for one in completions],
                self.embeddings.encoding_format,
                embedding_usage(
                    sum(len(one.prompt_token_ids) for one in completions),
                    sum(one.num_truncated_tokens for one in completions),
                    sum(one.num_cached_tokens for one in completions),
                ),
            )
        (completion,) = completions
        shapes = LogprobShapes(
            tokenizer,
            chat=keyed.line.url == CHAT_URL,
            as_ids=bool(keyed.line.body.get("return_tokens_as_token_ids")),
        )
        answers = [self._answer(completion, index, shapes) for index in range(len(completion.samples))]
        return response_body(keyed.line.url, keyed.number, model, created, answers)

    def _answer(self, completion: FinishedRequest, index: int, shapes: LogprobShapes) -> Answer:
        """Returns the answer that is one sample of a completion."""
        sample, prompt = completion.samples[index], completion.prompt_logprobs
        answer = Answer(
            sample.text,
            sample.finish_reason.value,
            len(completion.prompt_token_ids),
            len(sample.token_ids),
            completion.num_cached_tokens,
            sample.token_ids,
            truncated_tokens=completion.num_truncated_tokens,
            logprobs=None if sample.logprobs is None else shapes.of(sample.logprobs, sample.token_ids),
            prompt_logprobs=None if prompt is None else shapes.of_prompt(prompt),
            index=index,
        )
        if self.plan is None:
            return answer
        message = ReplyMessage(self.plan)
        message.add(sample.text)
        return message.finish(answer)
